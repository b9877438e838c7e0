"""Bad input is refused early, in a sentence that says what was received."""

import ast
import math
import re
import traceback
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_same
from helpers.arrays import to_numpy
from helpers.cases import OPTIMIZERS
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.processes import TESTS
from helpers.saving import own_variables
from keras_blockwise.blocking.partition import Matrices
from keras_blockwise.optimizer import BlockwiseOptimizer

PACKAGE = Path(kb.__file__).parent
# Whose errors have a test file of their own.
ELSEWHERE = {
    "checks.py": "state/test_checks.py",
    "config.py": "test_damaged_config.py",
    "convert.py": "state/test_convert.py",
    "events.py": "test_monitor.py",
    "monitor.py": "test_monitor.py",
    "plan.py": "test_plan.py",
    "multipliers.py": "test_multipliers.py",
    "plots.py": "test_monitor.py",
    "rates.py": "test_callbacks.py",
    "tensorflow.py": "state/test_loading.py",
}
SHAPES = {"q/kernel": (32, 30), "q/bias": (30,)}
PATHS = r"q/kernel\n  q/bias"

NOT_NUMBERS = (math.nan, "0.5", True, None, [0.5], np.array([0.5]))
# Arguments in [0, 1), and arguments >= 0.
FRACTIONS = [
    (kb.BlockAdam, "beta_1"),
    (kb.BlockAdam, "beta_2"),
    (kb.AdamMini, "beta_1"),
    (kb.AdamMini, "beta_2"),
    (kb.Adalayer, "beta_1"),
    (kb.Adalayer, "beta_2"),
    (kb.BlockNadam, "beta_1"),
    (kb.BlockNadam, "beta_2"),
    (kb.BAGM, "momentum"),
    (kb.BAGM, "beta_2"),
    (kb.BlockMuon, "momentum"),
    (kb.BlockMuon, "beta_2"),
    (kb.AdaBlock, "beta_1"),
    (kb.AdaBlock, "beta_2"),
    (kb.BlockRMSprop, "rho"),
    (kb.BCOS, "momentum"),
    (kb.SPAM, "beta_1"),
    (kb.SPAM, "beta_2"),
    (kb.BlockRMSprop, "momentum"),
]
NON_NEGATIVE = [
    (kb.BlockAdam, "epsilon"),
    (kb.AdamMini, "epsilon"),
    (kb.Adalayer, "epsilon"),
    (kb.BlockNadam, "epsilon"),
    (kb.BAGM, "epsilon"),
    (kb.BAGM, "power"),
    (kb.BAG, "epsilon"),
    (kb.BAG, "initial_accumulator_value"),
    (kb.BlockMuon, "epsilon"),
    (kb.AdaBlock, "epsilon"),
    (kb.BlockRMSprop, "epsilon"),
    (kb.BCOS, "epsilon"),
    (kb.SPAM, "epsilon"),
    (kb.SPAM, "spike_threshold"),
]
NUMBERS = [
    (cls, name, value, r"a number in \[0, 1\.0\)")
    for cls, name in FRACTIONS
    for value in (*NOT_NUMBERS, -0.1, 1.0, 2)
] + [
    (cls, name, value, r"a number in \[0, inf\)")
    for cls, name in NON_NEGATIVE
    for value in (*NOT_NUMBERS, -1e-9, math.inf)
]
CHOICES = [
    (cls, name, value, re.escape(f"one of {choices}"))
    for cls, name, values, choices in [
        (kb.BlockAdam, "amsgrad", (None, "yes", 2), [True, False]),
        (kb.BAGM, "nesterov", (None, "yes"), [True, False]),
        (
            kb.BAGM,
            "accumulator",
            ("sum", None, 3.0),
            ["exponential", "polynomial"],
        ),
        (kb.BlockRMSprop, "centered", (None, "yes"), [True, False]),
        (kb.AdamMini, "value", ("head", None), ["output_unit", "variable"]),
        (kb.BAG, "skip_nonfinite", (None, "auto"), [True, False]),
        (kb.BAG, "stochastic_rounding", (None, "auto"), [True, False]),
        (kb.SPAM, "reset_bias_correction", (None, "yes"), [True, False]),
    ]
    for value in values
] + [
    (cls, name, value, "one of")
    for cls in (kb.BlockAdam, kb.AdamMini, kb.BAGM, kb.BlockRMSprop, kb.SPAM)
    for name, values in [
        ("jit_compile", ("yes", None, 2)),
        ("momentum_dtype", ("int4", "float", 16)),
    ]
    for value in values
]
LEARNING_RATES = [
    (cls, "learning_rate", value, "a number >= 0, a `LearningRateSchedule` or")
    for cls in OPTIMIZERS
    for value in (None, "0.1", -0.1, math.nan, math.inf, True, [0.1])
]
INTEGERS = [
    (cls, name, value, rf"an integer in \[{least}, {most}\]")
    for cls, name, least, most in [
        (kb.SPAM, "reset_every", 1, "inf"),
        (kb.BlockMuon, "ns_steps", 1, "inf"),
        (kb.SPAM, "reset_warmup", 0, 500),
        (kb.AdaBlock, "layers_per_step", 1, "inf"),
        (kb.AdaBlock, "seed", 0, 2**32 - 1),
    ]
    for value in (*NOT_NUMBERS, 0.5, 2.0, least - 1, math.inf)
    if value is not None or cls is not kb.AdaBlock
] + [(kb.SPAM, "reset_warmup", 501, r"an integer in \[0, 500\]")]
PAIRS = [
    (kb.AdaBlock, "bounds", value, "`None` or a pair of numbers > 0")
    for value in (
        *(0.5, "ab", (1.0,), (1.0, 2.0, 3.0), (0.0, 1.0), (1.0, 0.0)),
        *((1.0, -1.0), (math.inf, 1.0), (1.0, math.nan), (True, 1.0)),
    )
]
BESIDE = [
    (kb.Adalayer, "sgd_learning_rate", value, "a number >= 0 beside")
    for value in (
        *(math.nan, math.inf, -0.1, "0.5", True, [0.5], [0.5, 0.0]),
        *([0.5, math.nan], [-0.1, 0.5], [0.5, None], [0.1, 0.2, 0.3]),
    )
]
# Class, argument, value, and what the argument must be.
ARGUMENTS = [
    *NUMBERS,
    *INTEGERS,
    *PAIRS,
    *CHOICES,
    *LEARNING_RATES,
    *BESIDE,
]

KNOWN = "'coordinate'.*'layer'.*'model'.*'output_unit'.*'variable'"
SCHEME = "must be a string, or a tuple of positive integers and `None`"
BLOCKINGS = {
    "unknown scheme": (
        lambda: kb.Blocking("unit"),
        ValueError,
        f"`scheme` must be one of .*{KNOWN}.* or a tuple. Received: 'unit'",
    ),
    "unknown scheme of an optimizer": (
        lambda: kb.BAG(blocking="unit"),
        ValueError,
        "Received: 'unit'",
    ),
    **{
        f"scheme {scheme}": (
            lambda scheme=scheme: kb.BAG(blocking=scheme),
            TypeError,
            f"`scheme` {SCHEME}.*Received: {re.escape(repr(scheme))}",
        )
        for scheme in (
            None,
            3,
            [None, 1],
            (0,),
            (-1,),
            (1.0,),
            (True,),
            ("output_unit",),
        )
    },
    "rules are a list": (
        lambda: kb.Blocking(rules=[("a", "layer")]),
        TypeError,
        r"`rules` must map .*Received: rules=\[\('a', 'layer'\)\]",
    ),
    "rule with an unknown scheme": (
        lambda: kb.Blocking(rules={"a/b": "unit"}),
        ValueError,
        rf"`rules\['a/b'\]` must be one of .*{KNOWN}.*Received: 'unit'",
    ),
    "rule with a list": (
        lambda: kb.Blocking(rules={"a/b": [1]}),
        TypeError,
        rf"`rules\['a/b'\]` {SCHEME}.*Received: \[1\]",
    ),
    "malformed pattern": (
        lambda: kb.Blocking(rules={"a(b": "layer"}),
        ValueError,
        r"A key of `rules` must be .*unterminated.*Received: 'a\(b'",
    ),
    "number as a pattern": (
        lambda: kb.Blocking(rules={3: "layer"}),
        TypeError,
        "A key of `rules` must be .*Received: 3",
    ),
    "malformed output layer": (
        lambda: kb.BlockMuon(output_layer="a(b"),
        ValueError,
        r"`output_layer` must be .*unterminated.*Received: 'a\(b'",
    ),
    "number as an output layer": (
        lambda: kb.BlockMuon(output_layer=3),
        TypeError,
        "`output_layer` must be a string, .*Received: 3",
    ),
    "from_model without a model": (
        lambda: kb.Blocking.from_model("model"),
        TypeError,
        "`model` must be a `keras.Model`. Received: model='model'",
    ),
    "SGD+Adalayer with other blocks": (
        lambda: kb.Adalayer(sgd_learning_rate=0.5, blocking="layer"),
        ValueError,
        "`blocking` must be one of .*adalayer.*Received: blocking='layer'",
    ),
    "AdamMini with other blocks": (
        lambda: kb.AdamMini(value="variable", blocking="layer"),
        ValueError,
        "`blocking` must be one of .*adam_mini.*Received: blocking='layer'",
    ),
}

# Blocking, and the error of `build` on variables of SHAPES.
BUILDS = {
    "rank of a rule": (
        kb.Blocking(rules={"q/kernel": (None,)}),
        r"rule 'q/kernel' -> \(None,\), variable 'q/kernel': the tuple "
        r"must have one entry .*shape \(32, 30\)\. Received: 1 entries",
    ),
    "rank of a scheme": (
        (None, 1),
        r"Blocking \(None, 1\) .*variable 'q/bias': the tuple must have "
        r"one entry .*shape \(30,\)\. Received: 2 entries",
    ),
    "rule does not divide": (
        kb.Blocking(rules={".*kernel": (None, 7)}),
        r"rule '\.\*kernel' -> \(None, 7\), variable 'q/kernel': "
        "axis 1 has size 30, which 7 does not divide",
    ),
    "too large a tile": (
        kb.Blocking(rules={".*kernel": (64, 1)}),
        "axis 0 has size 32, which 64 does not divide",
    ),
    "rule matches nothing": (
        kb.Blocking(rules={"k/kernel": "layer", ".*bias": "variable"}),
        r"Every key of `rules` must match .*Received: \['k/kernel'\], "
        rf"which match none of\s+{PATHS}",
    ),
    "pattern matches a part only": (
        kb.Blocking(rules={"kernel": "layer"}),
        rf"Received: \['kernel'\], which match none of\s+{PATHS}",
    ),
    "two rules": (
        kb.Blocking(rules={".*kernel": "layer", "q/.*": "model"}),
        r"Variable 'q/kernel' must match one of the `rules` at most\. "
        r"Received: \['\.\*kernel', 'q/\.\*'\]",
    ),
}


def built_with(blocking):
    optimizer = kb.BAGM(blocking=blocking)
    optimizer.build(make_variables(SHAPES))
    return optimizer


def stranger():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    blocking = kb.Blocking.from_model(model)
    blocking.resolve(make_variables({"other/kernel": (3, 3)}))


def load_state_of(saved, shapes=SHAPES, cls=kb.BAG):
    saved.build(make_variables(shapes))
    optimizer = cls()
    optimizer.build(make_variables(SHAPES))
    optimizer.load_own_variables(own_variables(saved))


def unbuilt_summary():
    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile(kb.BAG())
    kb.summary(model)


def meanings(**weights):
    """The axes that are registered for a class do not fit its weight."""

    @kb.register_layer_axes(**weights)
    class Layer(keras.layers.Layer):
        def build(self, input_shape):
            self.gain = self.add_weight(shape=(2, 2), name="gain")

    model = keras.Sequential([keras.Input((2,)), Layer()])
    kb.Blocking.from_model(model)


OTHERS = {
    "state of another momentum dtype": (
        lambda: load_state_of(kb.BAGM(momentum_dtype="int8"), SHAPES, kb.BAGM),
        ValueError,
        "`momentum_dtype`.*kernel/momentum in int8.*`convert_state`",
    ),
    "nothing to keep in 8 bits": (
        lambda: kb.BlockRMSprop(momentum_dtype="int8").build(make_variables()),
        ValueError,
        '`momentum_dtype="int8"` must be given to an optimizer with a momentum',
    ),
    "argument of Keras": (
        lambda: kb.BAG(clipnorm="1"),
        ValueError,
        "`clipnorm` must be a number or `None`. Received: clipnorm='1'",
    ),
    "schedule": (
        lambda: kb.BAG.from_config(
            {"learning_rate": {"class_name": "Missing", "config": {}}}
        ),
        ValueError,
        "`learning_rate` must be a number or the config of a `LearningRateSch",
    ),
    "weights before build": (
        lambda: kb.BAG().set_weights([]),
        ValueError,
        "must be built before its weights are set. Received: one that is not",
    ),
    "partitions before build": (
        lambda: kb.BAG().partitions,
        ValueError,
        "BAG must be built before it has blocks. Call `optimizer.build",
    ),
    "unknown argument": (
        lambda: kb.BAG(lr=0.1),
        ValueError,
        "not recognized: {'lr': 0.1}",
    ),
    "argument of another optimizer": (
        lambda: kb.BAG(beta_2=0.5),
        ValueError,
        "not recognized: {'beta_2': 0.5}",
    ),
    "variables of another model": (
        stranger,
        ValueError,
        r"`Blocking.from_model` was given.*'other/kernel' of shape \(3, 3\)",
    ),
    "state of another optimizer": (
        lambda: load_state_of(kb.BAGM()),
        ValueError,
        "must be one of BAG. Received: the state of BAGM. None of it was",
    ),
    "state of other blocks": (
        lambda: load_state_of(kb.BAG(blocking="variable")),
        ValueError,
        r"'q_kernel_velocity' is kernel/velocity \(1, 30\)\. Received: "
        r"kernel/velocity \(1, 1\)\. None of it was loaded",
    ),
    "state of more variables": (
        lambda: load_state_of(kb.BAG(), {**SHAPES, "r/bias": (5,)}),
        ValueError,
        "must have 4 variables. Received: 5. None of it was loaded",
    ),
    "rank of a partition": (
        lambda: kb.Partition((4, 6), (4,)),
        ValueError,
        r"`block_shape` must have .*Received: block_shape=\(4,\)",
    ),
    "partition does not divide": (
        lambda: kb.Partition((4, 6), (4, 5)),
        ValueError,
        r"axis 1 has size 6, which 5 .*Received: block_shape=\(4, 5\)",
    ),
    "member of a group is cut": (
        lambda: kb.Partition((4, 6), (4, 1), "g"),
        ValueError,
        r"of a `group` must be .*Received: block_shape=\(4, 1\), group='g'",
    ),
    "rows of matrices": (
        lambda: Matrices((4, 6), (4, 6), (2,)),
        ValueError,
        r"`rows` must be axes of the shape \(4, 6\).*Received: rows=\(2,\)",
    ),
    "no such output layer": (
        lambda: kb.BlockMuon(output_layer="head").build(make_variables(SHAPES)),
        ValueError,
        "`output_layer` must be the path of a layer .*Received: "
        rf"output_layer='head', which matches none of\s+{PATHS}",
    ),
    "a block that is too large": (
        lambda: kb.AdaBlock(blocking="output_unit").build(
            make_variables({"q/kernel": (33, 3), "q/bias": (3,)})
        ),
        ValueError,
        r"of variable 'q/kernel' must have at most 32 entries.*Received: blocks"
        r' of \(33, 1\), 33 entries. Use `blocking="adablock"`, or',
    ),
    "meaning of an axis": (
        lambda: kb.register_layer_axes(gain="output width"),
        ValueError,
        "axes of weight 'gain' .*Received: gain='output width'",
    ),
    "not a layer class": (
        lambda: kb.register_layer_axes(3, gain="output"),
        TypeError,
        "`layer_class` must be a subclass of `keras.Layer`. Received: 3",
    ),
    "number of axes": (
        lambda: meanings(gain="output"),
        ValueError,
        r"axes 'output' .*/gain'.*Received: a variable of shape \(2, 2\)",
    ),
    "summary of an unbuilt model": (
        unbuilt_summary,
        ValueError,
        "`optimizer` must be .*Received: the model 'sequential",
    ),
    "summary of another optimizer": (
        lambda: kb.summary(keras.optimizers.SGD(name="mine")),
        TypeError,
        "`optimizer` must be an optimizer of keras_blockwise.*Received: .*SGD",
    ),
    "summary of a model without an optimizer": (
        lambda: kb.summary(
            keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        ),
        TypeError,
        "`optimizer` must be an optimizer of keras_blockwise.*Received: None",
    ),
    "update_step of a subclass": (
        lambda: type(
            "Mine", (kb.BAG,), {"update_step": lambda self, g, v, lr: None}
        )(),
        TypeError,
        "Mine must not have `update_step`.*Override `rule`, or `apply`",
    ),
    "Horovod": (
        # It makes a subclass of the same name, and the optimizer anew.
        lambda: type(
            "BAG", (kb.BAG,), {"get_gradients": lambda self, loss, params: None}
        ).from_config(kb.BAG().get_config()),
        TypeError,
        "BAG must not have `get_gradients`.*Horovod's.*each worker would train "
        "alone.*average by `hvd.DistributedGradientTape`",
    ),
    "update_step": (
        lambda: kb.BAG().update_step(1.0, *make_variables({"a/bias": ()}), 0.1),
        TypeError,
        r"Call `apply\(gradients, variables\)`. Received: variable 'bias'",
    ),
    "weight decay of a built optimizer": (
        lambda: built_with("layer").exclude_from_weight_decay(
            var_names=["bias"]
        ),
        ValueError,
        r"must be called before.*var_names=\['bias'\]. Make a new optimizer",
    ),
    "argument of a built optimizer": (
        lambda: setattr(built_with("layer"), "epsilon", 1.0),
        AttributeError,
        "`epsilon` must be given to the constructor: BAGM.*: epsilon=1.0. Make",
    ),
    "multipliers without the argument": (
        lambda: setattr(
            built_with("layer"), "learning_rate_multipliers", {"a": 1.0}
        ),
        ValueError,
        "`learning_rate_multipliers`.*constructor.*Received: ",
    ),
    "base class": (
        lambda: BlockwiseOptimizer(0.1, blocking="layer").rule(),
        NotImplementedError,
        "",
    ),
}


@pytest.mark.parametrize(
    ("cls", "name"), dict.fromkeys(row[:2] for row in ARGUMENTS)
)
def test_argument_of_an_optimizer(cls, name):
    for row in ARGUMENTS:
        if row[:2] != (cls, name):
            continue
        _, _, value, rule = row
        received = re.escape(f"Received: {name}={value!r}.")
        with pytest.raises(ValueError, match=f"`{name}` must be {rule}.*") as e:
            cls(**{name: value})
        assert re.search(received, str(e.value)), value


@pytest.mark.parametrize("kind", [*BLOCKINGS, *OTHERS])
def test_error(kind):
    call, exception, message = {**BLOCKINGS, **OTHERS}[kind]
    with pytest.raises(exception, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("key", [re.compile("a"), b"a"], ids=["Pattern", "b"])
def test_key_of_rules_must_be_text(key):
    with pytest.raises((TypeError, ValueError), match="key of `rules`"):
        kb.Blocking(rules={key: "layer"})


@pytest.mark.parametrize("kind", BUILDS)
def test_failing_build_leaves_no_trace(kind):
    blocking, message = BUILDS[kind]
    optimizer = kb.BAGM(blocking=blocking, use_ema=True)
    names = [variable.name for variable in optimizer.variables]
    weights = make_variables(SHAPES)
    before = to_numpy(weights)
    gradients = tensors([np.ones(shape) for shape in SHAPES.values()])
    for call in (
        lambda: optimizer.build(weights),
        lambda: optimizer.apply(gradients, weights),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            call()
    assert not optimizer.built
    assert [variable.name for variable in optimizer.variables] == names
    assert optimizer.get_config()["blocking"]["table"] is None
    with pytest.raises(ValueError, match="must be built"):
        optimizer.partitions  # noqa: B018
    assert_same(weights, before)


def test_fit_says_what_is_wrong():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    blocking = kb.Blocking(rules={".*kernel": (2, 1)})
    model.compile(kb.BlockAdam(blocking=blocking), "mse")
    with pytest.raises(ValueError, match="axis 0 has size 3, which 2 does not"):
        model.fit(np.ones((2, 3)), np.ones((2, 4)), verbose=0)


def raised_at(call):
    """Where an error was raised, if in the package."""
    try:
        call()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Path(frame.filename), frame.lineno
    return None


def test_every_raise_has_a_row():
    calls = [row[0] for row in (*BLOCKINGS.values(), *OTHERS.values())]
    calls += [lambda b=b: built_with(b) for b, _ in BUILDS.values()]
    calls += [lambda r=r: r[0](**{r[1]: r[2]}) for r in ARGUMENTS]
    covered = {raised_at(call) for call in calls}
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                lines = range(node.lineno, node.end_lineno + 1)
                if not any((path, line) in covered for line in lines):
                    missing.append(f"{path}:{node.lineno}")
    assert not missing


@pytest.mark.parametrize(("module", "tests"), ELSEWHERE.items())
def test_other_test_files_exist(module, tests):
    assert list(PACKAGE.rglob(module))
    assert (TESTS / tests).exists()
