"""Rules about the source itself: who imports what, and who names what."""

import ast
import inspect
import re
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import keras
import pytest

import keras_blockwise as kb
from helpers import processes

ROOT = Path(kb.__file__).parent
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
}
SOURCES = {
    module: ast.parse(path.read_text()) for module, path in PATHS.items()
}
by_module = pytest.mark.parametrize("module", SOURCES)
# Who may name TensorFlow; what of this runs on other backends is in `plain`.
TENSORFLOW = (
    "execution.tensorflow",
    "execution.sharing",
    "execution.xla_cpu",
)


def nodes(module, kind):
    return [n for n in ast.walk(SOURCES[module]) if isinstance(n, kind)]


def imported_names(module):
    """Everything imported, as `package.module.name`."""
    names = [
        alias.name for node in nodes(module, ast.Import) for alias in node.names
    ]
    for node in nodes(module, ast.ImportFrom):
        assert node.level == 0, f"{module}: imports are absolute"
        names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def siblings(module):
    """The modules of the package that a module imports."""
    found = set()
    for name in imported_names(module):
        package, _, name = name.partition(".")
        if package == "keras_blockwise":
            while name and name not in SOURCES:
                inside = f"{name}.__init__"
                if inside in SOURCES:
                    name = inside
                    break
                name = name.rpartition(".")[0]
            found.add(name or "__init__")
    return found - {module}


def attributes(module):
    return {node.attr for node in nodes(module, ast.Attribute)}


def own_names(module):
    """What a module defines, functions and attributes of `self`."""
    functions = {node.name for node in nodes(module, ast.FunctionDef)}
    return functions | {
        node.attr
        for node in nodes(module, ast.Attribute)
        if isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def private_names_of_keras():
    names = set()
    for cls in (keras.optimizers.Optimizer, keras.Variable, keras.layers.Layer):
        names.update(filter(is_private, dir(cls)))
    optimizer = keras.optimizers.SGD()
    optimizer.build([keras.Variable(0.0)])
    return names | set(filter(is_private, vars(optimizer)))


def test_the_tests_see_the_source():
    assert {"optimizers", "algorithm.step", "execution.plain"} < set(SOURCES)
    assert "blocking.partition" in siblings("algorithm.step")
    assert "execution.xla_cpu.__init__" in siblings("execution.tensorflow")
    assert "_backend_update_step" in private_names_of_keras()
    assert "_iterations" in private_names_of_keras()


@by_module
def test_only_two_rooms_import_tensorflow(module):
    packages = {name.partition(".")[0] for name in imported_names(module)}
    if "tensorflow" in packages:
        assert module.startswith(TENSORFLOW)


@by_module
def test_only_tensorflow_knows_the_tricks_for_a_cpu(module):
    if not module.startswith(TENSORFLOW):
        assert "cpu" not in PATHS[module].read_text().lower()
        assert not [n for n in siblings(module) if n.startswith(TENSORFLOW[-1])]


@by_module
def test_the_backend_is_chosen_once(module):
    if module != "execution.__init__":
        assert "keras.backend.backend" not in PATHS[module].read_text()


@by_module
def test_nobody_imports_the_source_of_keras(module):
    for name in imported_names(module):
        assert not name.startswith(("keras.src", "tensorflow.python"))
    assert "src" not in attributes(module)


@by_module
def test_only_execution_names_private_parts_of_keras(module):
    if module.startswith("execution."):
        return
    used = attributes(module) | own_names(module)
    assert not used & private_names_of_keras()


@by_module
def test_private_names_are_ones_own(module):
    if module.startswith("execution."):
        return
    assert set(filter(is_private, attributes(module))) <= own_names(module)


# Folder or module -> the folders and modules that it may import from, besides
# itself.
IMPORTS = {
    "validation": set(),
    "blocking": set(),
    "algorithm": {"blocking.partition"},
    "state": {"algorithm", "blocking"},
    "execution": {"algorithm", "blocking.partition", "state"},
    "multipliers": {"blocking", "validation"},
    "optimizer": {
        *("algorithm", "blocking", "execution"),
        *("multipliers", "state", "validation"),
    },
    "optimizers": {"algorithm", "blocking", "optimizer", "validation"},
    "plots": {"optimizer"},
    "callbacks": {"execution", "optimizer", "plots", "validation"},
    "tables": set(),
    "summary": {"blocking", "optimizer", "state", "tables"},
    "plan": {"blocking", "optimizer", "optimizers", "tables", "validation"},
    "__init__": {
        *("blocking", "callbacks", "multipliers", "optimizers", "plan"),
        *("plots", "state", "summary"),
    },
}


@by_module
def test_imports_go_one_way(module):
    room = module.partition(".")[0]
    allowed = (room, *IMPORTS[room])
    for name in siblings(module):
        assert name in allowed or name.startswith(
            tuple(f"{other}." for other in allowed)
        )


def test_no_imports_in_circles():
    graph = {module: siblings(module) for module in SOURCES}
    assert list(TopologicalSorter(graph).static_order())


def lines_of(node):
    """The lines of a function or a class, without its docstring."""
    first = node.body[0].lineno
    if ast.get_docstring(node) and len(node.body) > 1:
        first = node.body[1].lineno
    return node.end_lineno - first + 1


@by_module
def test_nothing_is_too_long_to_read(module):
    for function in nodes(module, ast.FunctionDef):
        assert lines_of(function) <= 50, function.name
    for cls in nodes(module, ast.ClassDef):
        assert lines_of(cls) <= 250, cls.name


@by_module
def test_no_function_is_unused(module):
    here = module.removesuffix(".__init__")
    elsewhere = set().union(*(attributes(m) for m in SOURCES))
    used = {
        node.id
        for node in nodes(module, ast.Name)
        if isinstance(node.ctx, ast.Load)
    }
    for node in SOURCES[module].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            imported = f"keras_blockwise.{here}.{node.name}"
            assert node.name in used | elsewhere or any(
                imported in imported_names(m) for m in SOURCES
            ), node.name


def test_the_step_imports_no_optimizer_and_no_variable():
    names = imported_names("algorithm.step")
    assert {n for n in names if n.startswith("keras.")} == {"keras.ops"}


def test_named_optimizers_have_no_arithmetic():
    """Apart from unions of types in annotations."""
    unions = set()
    for function in nodes("optimizers", ast.FunctionDef):
        for annotation in [
            function.returns,
            *(argument.annotation for argument in function.args.args),
        ]:
            unions.update(ast.walk(annotation) if annotation else ())
    operations = nodes("optimizers", (ast.BinOp, ast.AugAssign))
    assert not [node.lineno for node in operations if node not in unions]
    assert "ops" not in {node.id for node in nodes("optimizers", ast.Name)}
    assert "ops" not in attributes("optimizers")
    assert not any("ops" in name for name in imported_names("optimizers"))


@by_module
def test_nothing_is_printed_and_nothing_asserted(module):
    assert "print" not in {node.id for node in nodes(module, ast.Name)}
    assert not nodes(module, ast.Assert)


# The private hooks of Keras that `execution` overrides or calls.
HOOKS = {
    "_all_reduce_sum_gradients": ["grads_and_vars"],
    "_apply_weight_decay": ["variables"],
    "_backend_apply_gradients": ["grads", "trainable_variables"],
    "_backend_update_step": ["grads", "trainable_variables", "learning_rate"],
    "_clip_gradients": ["grads"],
    "_get_variable_index": ["variable"],
    "_overwrite_model_variables_with_average_value": ["trainable_variables"],
    "_overwrite_variable_with_gradient": ["variable"],
    "_trackable_children": ["save_type", "kwargs"],
    "_untrack_variable": ["variable"],
    "_update_model_variables_moving_average": ["trainable_variables"],
    "_use_weight_decay": ["variable"],
    "_var_key": ["variable"],
}


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", HOOKS)
def test_signatures_of_keras(name):
    hook = getattr(keras.optimizers.Optimizer, name)
    assert list(inspect.signature(hook).parameters) == ["self", *HOOKS[name]]
    ours = getattr(kb.BlockAdam, name)
    assert list(inspect.signature(ours).parameters) == ["self", *HOOKS[name]]


def used_by_execution():
    rooms = [module for module in SOURCES if module.startswith("execution.")]
    return set().union(*(attributes(m) | own_names(m) for m in rooms))


@pytest.mark.tensorflow
def test_every_hook_is_pinned():
    hooks = {
        name
        for name in used_by_execution() & private_names_of_keras()
        if callable(getattr(keras.optimizers.Optimizer, name, None))
    }
    assert hooks == set(HOOKS)


@pytest.mark.tensorflow
def test_private_attributes_of_keras_exist():
    """Those that are no methods, and so have no signature."""
    optimizer = keras.optimizers.SGD(
        use_ema=True, gradient_accumulation_steps=2
    )
    optimizer.build([keras.Variable(0.0)])
    for name in (
        "_accumulated_gradients",
        "_distribution_strategy",
        "_iterations",
        "_learning_rate",
        "_model_variables_moving_average",
        "_trainable_variables",
        "_update_uid",
    ):
        assert name in used_by_execution()
        assert hasattr(optimizer, name)


@pytest.mark.parametrize("name", kb.__all__)
def test_public_names_are_documented(name):
    doc = inspect.getdoc(getattr(kb, name))
    assert "Args:" in doc or "Example" in doc
    assert "{{" not in doc


@pytest.mark.parametrize("name", kb.__all__)
def test_arguments_are_documented(name):
    public = getattr(kb, name)
    doc = inspect.getdoc(public)
    for parameter in inspect.signature(public).parameters.values():
        if parameter.name == "table":  # For `from_config` alone.
            continue
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert f"    {parameter.name}:" in doc


def test_all_is_sorted_and_complete():
    imported = {name.rpartition(".")[2] for name in imported_names("__init__")}
    assert set(kb.__all__) == imported
    assert len(kb.__all__) == len(imported)


def test_the_lower_bounds_are_the_oldest_versions_that_are_tested():
    setup = ConfigParser()
    setup.read(processes.ROOT / "setup.cfg")
    required = setup["options"]["install_requires"]
    required += setup["options.extras_require"]["tensorflow"]
    bounds = re.findall(r"^(\S+)>=(\S+)$", required, re.M)
    oldest = (processes.ROOT / ".ci" / "oldest.txt").read_text()
    tested = dict(re.findall(r"^(\S+)==(\S+)$", oldest, re.M))
    assert {"keras", "numpy", "rich", "tensorflow"} == set(dict(bounds))
    for name, version in bounds:
        assert f"{tested[name]}.".startswith(f"{version}.")
