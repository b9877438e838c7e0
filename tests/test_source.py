"""Rules about the source itself: who imports what, and who names what."""

import ast
import inspect
from pathlib import Path

import keras
import pytest

import keras_blockwise as kb

SOURCES = {
    path.stem: ast.parse(path.read_text())
    for path in sorted(Path(kb.__file__).parent.rglob("*.py"), reverse=True)
}
by_module = pytest.mark.parametrize("module", SOURCES)


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
    names = [name.split(".") for name in imported_names(module)]
    return {
        name[-2] if name[-2] in SOURCES else name[-1]
        for name in names
        if name[0] == "keras_blockwise"
    }


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
    assert {"execution", "optimizers", "partition", "step"} < set(SOURCES)
    assert "partition" in siblings("step")
    assert "_backend_update_step" in private_names_of_keras()
    assert "_iterations" in private_names_of_keras()


@by_module
def test_only_execution_imports_tensorflow(module):
    packages = {name.partition(".")[0] for name in imported_names(module)}
    assert ("tensorflow" in packages) == (module == "execution")


@by_module
def test_nobody_imports_the_source_of_keras(module):
    for name in imported_names(module):
        assert not name.startswith(("keras.src", "tensorflow.python"))
    assert "src" not in attributes(module)


@by_module
def test_only_execution_names_private_parts_of_keras(module):
    if module == "execution":
        return
    used = attributes(module) | own_names(module)
    assert not used & private_names_of_keras()


@by_module
def test_private_names_are_ones_own(module):
    if module == "execution":
        return
    assert set(filter(is_private, attributes(module))) <= own_names(module)


# Module -> the modules of the package that it may import.
IMPORTS = {
    "accumulators": set(),
    "partition": set(),
    "reshaping": {"partition"},
    "momentum": {"accumulators"},
    "axes": {"partition"},
    "layer_axes": {"axes", "partition"},
    "schemes": {"axes", "partition"},
    "inference": {"axes", "partition", "schemes"},
    "entries": set(),
    "execution": {"entries", "reduction"},
    "reduction": {"partition", "reshaping"},
    "step": {
        "accumulators",
        "momentum",
        "partition",
        "reduction",
        "reshaping",
    },
    "blocking": {"axes", "inference", "layer_axes", "partition", "schemes"},
}


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_go_one_way(module):
    assert siblings(module) <= IMPORTS[module]


@by_module
def test_nobody_imports_the_optimizers(module):
    if module != "__init__":
        assert not siblings(module) & {"optimizers", "__init__"}


def test_the_step_imports_no_optimizer_and_no_variable():
    names = imported_names("step")
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


# The private hooks of Keras that `execution.py` overrides or calls.
HOOKS = {
    "_all_reduce_sum_gradients": ["grads_and_vars"],
    "_apply_weight_decay": ["variables"],
    "_backend_apply_gradients": ["grads", "trainable_variables"],
    "_backend_update_step": ["grads", "trainable_variables", "learning_rate"],
    "_clip_gradients": ["grads"],
    "_get_variable_index": ["variable"],
    "_overwrite_model_variables_with_average_value": ["trainable_variables"],
    "_overwrite_variable_with_gradient": ["variable"],
    "_update_model_variables_moving_average": ["trainable_variables"],
    "_use_weight_decay": ["variable"],
}


@pytest.mark.parametrize("name", HOOKS)
def test_signatures_of_keras(name):
    hook = getattr(keras.optimizers.Optimizer, name)
    assert list(inspect.signature(hook).parameters) == ["self", *HOOKS[name]]
    ours = getattr(kb.BlockAdam, name)
    assert list(inspect.signature(ours).parameters) == ["self", *HOOKS[name]]


def test_every_hook_is_pinned():
    used = attributes("execution") | own_names("execution")
    hooks = {
        name
        for name in used & private_names_of_keras()
        if callable(getattr(keras.optimizers.Optimizer, name, None))
    }
    assert hooks == set(HOOKS)


def test_private_attributes_of_keras_exist():
    """Those that are no methods, and so have no signature."""
    optimizer = keras.optimizers.SGD(use_ema=True)
    optimizer.build([keras.Variable(0.0)])
    for name in (
        "_distribution_strategy",
        "_iterations",
        "_model_variables_moving_average",
        "_trainable_variables",
    ):
        assert name in attributes("execution")
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
