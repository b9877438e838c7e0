"""Every optimizer against the oracle: weights and state after 20 steps."""

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers import eight_bits
from helpers import oracle
from helpers.cases import HIDDEN
from helpers.cases import SCHEMES
from helpers.cases import Case
from helpers.cases import every_case
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import of_classes
from helpers.cases import slots_of
from helpers.cases import some_quick
from helpers.cases import tensors
from helpers.tensorflow import tf
from helpers.training import eager
from helpers.training import graph
from helpers.training import train
from keras_blockwise.algorithm.eight_bits import saves_memory
from keras_blockwise.blocking.partition import Partition
from keras_blockwise.state.storage import values_by_weight

STEPS = 20

# Shape of each variable, and its tile in each scheme: by hand, from what its
# layer computes. `None` in a tile is the whole axis; all of them where a scheme
# is not given.
VARIABLES = {
    "dense/kernel": (
        (4, 6),
        {
            "output_unit filter head adam_mini adam_mini_short": (None, 1),
            "input_unit": (1, None),
            "adablock": (1, None),
        },
    ),
    "dense/bias": (
        (6,),
        {
            "output_unit filter head adam_mini adam_mini_short": (1,),
            "adablock": (1,),
        },
    ),
    # Square: the shape does not tell rows from columns.
    "dense_1/kernel": (
        (3, 3),
        {
            "output_unit filter head adam_mini adam_mini_short": (None, 1),
            "input_unit": (1, None),
            "adablock": (1, None),
        },
    ),
    "embedding/embeddings": (  # The row of a token is its output.
        (5, 2),
        {
            "output_unit filter head adam_mini adam_mini_short": (1, None),
            "input_unit": (None, 1),
            "adablock": (1, None),
        },
    ),
    "query/kernel": (  # (in, heads, head_dim)
        (4, 2, 3),
        {
            "output_unit filter": (None, 1, 1),
            "input_unit": (1, None, None),
            "head adam_mini adam_mini_short": (None, 1, None),
            "adablock": (1, 1, None),
        },
    ),
    "query/bias": (  # (heads, head_dim)
        (2, 3),
        {
            "output_unit filter head adam_mini adam_mini_short": (1, 1),
            "adablock": (1, 1),
        },
    ),
    "value/kernel": (  # (in, heads, head_dim)
        (2, 2, 3),
        {
            "output_unit filter adam_mini": (None, 1, 1),
            "input_unit": (1, None, None),
            "head": (None, 1, None),
            "adablock": (1, 1, None),
        },
    ),
    "value/bias": (
        (2, 3),
        {
            "output_unit filter head adam_mini adam_mini_short": (1, 1),
            "adablock": (1, 1),
        },
    ),
    "conv2d/kernel": (  # (height, width, in, out)
        (2, 3, 4, 2),
        {
            "output_unit head": (None, None, None, 1),
            "input_unit": (None, None, 1, None),
            "filter": (None, None, 1, 1),
            "adablock": (None, None, 1, 1),
        },
    ),
    "conv2d/bias": (
        (2,),
        {
            "output_unit filter head adam_mini adam_mini_short": (1,),
            "adablock": (1,),
        },
    ),
    "conv2d_transpose/kernel": (  # (height, width, out, in)
        (2, 2, 2, 2),
        {
            "output_unit head": (None, None, 1, None),
            "input_unit": (None, None, None, 1),
            "filter": (None, None, 1, 1),
            "adablock": (None, None, 1, 1),
        },
    ),
    "depthwise_conv2d/kernel": (  # (height, width, in, multiplier)
        (2, 1, 3, 2),
        {
            "output_unit head filter": (None, None, 1, 1),
            "input_unit": (None, None, 1, None),
            "adablock": (None, None, 1, 1),
        },
    ),
    "conv3d/kernel": (
        (2, 1, 2, 2, 3),
        {
            "output_unit head": (None, None, None, None, 1),
            "input_unit": (None, None, None, 1, None),
            "filter": (None, None, None, 1, 1),
            "adablock": (None, None, None, 1, 1),
            # The last kernel: the output layer, as far as names can tell.
            "adalayer adalayer_sgd": (None, None, None, None, 1),
        },
    ),
    "scalar/bias": ((), {}),
}
SHAPES = {path: shape for path, (shape, _) in VARIABLES.items()}


def tiles_of(scheme):
    """The tile of every variable; a string instead names what they share.

    `None` is no tile at all.
    """
    if scheme in ("model", "none"):
        return dict.fromkeys(VARIABLES, "model" if scheme == "model" else None)
    if scheme == "layer":
        return {path: path.rpartition("/")[0] for path in VARIABLES}
    if scheme == "coordinate":
        return {path: (1,) * len(shape) for path, shape in SHAPES.items()}
    others = scheme != "adalayer_sgd"
    return {
        path: next(
            (tile for names, tile in tiles.items() if scheme in names.split()),
            (None,) * len(shape) if others else None,
        )
        for path, (shape, tiles) in VARIABLES.items()
    }


def label_arrays(tiles):
    """`tiles` as labels: equal where coordinates share an accumulator."""
    labels, groups, start = [], {}, 0
    for path, tile in tiles.items():
        if tile is None:
            labels.append(np.full(SHAPES[path], oracle.PLAIN))
        elif isinstance(tile, str):
            label = groups.setdefault(tile, start)
            labels.append(np.full(SHAPES[path], label))
        else:
            labels.append(oracle.tile_labels(SHAPES[path], tile, start))
        start = max(start, labels[-1].max() + 1)
    return labels


def expected_state(truth, case, tiles):
    """The state of the oracle, named and shaped as that of the optimizer."""
    state = {}
    kwargs = {
        "momentum": 0.0 if case.cls in (kb.BAG, kb.BlockRMSprop) else 0.9,
        **case.kwargs,
    }
    shared = set()
    for k, (path, tile) in enumerate(tiles.items()):
        name = path.replace("/", "_")
        if kwargs["momentum"]:
            state[f"{name}_momentum"] = truth.momentum[k]
        if tile in shared or tile is None or case.cls is kb.BCOS:
            continue
        if isinstance(tile, str):
            shared.add(tile)  # One number, with the first of the members.
            labels = truth.labels[k].flat[0]
        else:  # One number per tile: that of its first corner.
            labels = truth.labels[k][tuple(slice(None, None, n) for n in tile)]
        state[f"{name}_velocity"] = truth.velocity[labels]
        if case.cls is kb.AdaBlock and np.prod(tile) > 1:
            matrices = [truth.matrices[label] for label in labels.ravel()]
            state[f"{name}_velocity"] = np.reshape(
                matrices, (*labels.shape, *matrices[0].shape)
            )
        if "amsgrad" in kwargs:
            state[f"{name}_velocity_hat"] = truth.velocity_hat[labels]
        if "centered" in kwargs:
            state[f"{name}_average_gradient"] = truth.average_gradient[labels]
    return state


def learning_rate(step):
    """Changes during training; float32 holds it exactly."""
    return 2.0**-5 * (1 + step % 4)


def set_learning_rate(optimizer, step):
    optimizer.learning_rate = learning_rate(step)


def check_truth(
    case,
    tiles,
    dtype="float64",
    momentum_dtype=None,
    gradients=None,
    wrap=graph,
    jit_compile=False,
    decay=None,
    multipliers=None,
    plain_rate=1.0,
    **kwargs,
):
    """Trains an optimizer and its oracle and compares weights and state.

    Args:
        case: The optimizer.
        tiles: Path of each variable -> tile, or name of the group.
        dtype: Of the variables.
        momentum_dtype: As of the optimizer.
        gradients: Those of each step, by default random ones.
        wrap: Makes the function that steps of the optimizer.
        jit_compile: As of the optimizer.
        decay: Weight decay of each variable, to do by hand.
        multipliers: Factors of the learning rate, by path.
        plain_rate: A factor of it where there are no blocks.
        **kwargs: Further arguments of the optimizer.
    """
    shapes = {path: SHAPES[path] for path in tiles}
    variables = make_variables(shapes, dtype)
    arguments = dict(case.kwargs)
    momentum_dtype = arguments.pop("momentum_dtype", momentum_dtype)
    # `None` in a tile is the whole axis.
    tiles = {
        path: tile
        if tile is None or isinstance(tile, str)
        else tuple(t or n for n, t in zip(shapes[path], tile))
        for path, tile in tiles.items()
    }
    own = {}
    if case.cls is kb.AdaBlock:  # Each has a block of its own.
        tiles = {
            path: SHAPES[path] if isinstance(tile, str) else tile
            for path, tile in tiles.items()
        }
    if case.cls is kb.BlockMuon:
        own["matrices"] = [matrices_of(path) for path in tiles]
    truth = getattr(oracle, case.cls.__name__)(
        [to_float64(variable) for variable in variables],
        label_arrays(tiles),
        **own,
        store=rounding(dtype),
        store_momentum=storing(dtype, momentum_dtype or dtype, tiles),
        **arguments,
    )
    if momentum_dtype:
        kwargs["momentum_dtype"] = momentum_dtype
    if multipliers is not None:
        kwargs["learning_rate_multipliers"] = multipliers
    optimizer = case.make(jit_compile=jit_compile, **kwargs)
    factors = [np.float32((multipliers or {}).get(p, 1.0)) for p in tiles]
    gradients = gradients or make_gradients(STEPS, shapes)
    train(optimizer, variables, gradients, wrap, set_learning_rate)
    for step, given in enumerate(gradients):
        rates = np.float64(factors) * learning_rate(step)
        rates[[tile is None for tile in tiles.values()]] *= plain_rate
        for weight, own, rate in zip(truth.weights, decay or [], rates):
            weight *= 1 - own * rate
        finite = all(np.isfinite(g).all() for g in given if g is not None)
        if finite:  # The others are for `skip_nonfinite`.
            truth.step(given, rates)

    # Two units in the last place of what is rounded in each step.
    # (A scale of 8 bits is float32.)
    of_momentum = (momentum_dtype or dtype).replace("int8", "float32")
    low = max(dtype, of_momentum, key=TOLERANCES.get)
    tolerance = TOLERANCES[low]
    if case.cls is kb.AdaBlock and (jit_compile or dtype == "float32"):
        # Both find an eigenvalue to 1e-7 of the largest. Measured: 1.5e-5.
        # With bounds, steps are many times as large. Measured: 6.4e-5.
        least = 1e-4 if "bounds" in case.kwargs else 2e-5
        tolerance = max(tolerance, least)
    for path, variable, weight in zip(tiles, variables, truth.weights):
        assert_stored(path, variable, weight, dtype, tolerance)
    assert int(optimizer.iterations) == truth.t
    in_8_bits = momentum_dtype == "int8"
    state = decoded(optimizer) if in_8_bits else slots_of(optimizer)
    expected = expected_state(truth, case, tiles)
    assert state.keys() == expected.keys()
    for name, variable in state.items():
        value = expected[name]
        if name.endswith("momentum"):
            slot_dtype = momentum_dtype or dtype
            if in_8_bits:
                slot_dtype = variable.dtype
            assert_stored(name, variable, value, slot_dtype, TOLERANCES[low])
        else:
            slot_dtype = "float64" if dtype == "float64" else "float32"
            # That of a matrix comes from the momentum.
            exact = slot_dtype if case.cls is not kb.BlockMuon else low
            assert_stored(name, variable, value, slot_dtype, TOLERANCES[exact])
    return optimizer, variables, truth


def matrices_of(path):
    """The entries of the hidden matrix that a variable is, if it is one."""
    if path not in MATRICES:
        return None
    return np.arange(np.prod(SHAPES[path])).reshape(1, *MATRICES[path])


# Rows and columns of the matrices in `MIXED`.
MATRICES = {"dense/kernel": (4, 6), "query/kernel": (4, 6)}


def assert_stored(name, variable, expected, dtype, tolerance):
    assert variable.dtype == dtype
    assert variable.shape == np.shape(expected)
    np.testing.assert_allclose(
        to_float64(variable), expected, tolerance, tolerance, err_msg=name
    )


TOLERANCES = {
    "float64": 1e-11,
    "float32": 1e-5,
    "float16": 2.0**-9,
    "bfloat16": 2.0**-6,
}


def to_float64(variable):
    return np.float64(keras.ops.convert_to_numpy(variable))


def storing(dtype, momentum_dtype, tiles):
    """What storing a momentum does to it."""
    if momentum_dtype != "int8":
        rounded = rounding(momentum_dtype)
        return lambda m, k, t: rounded(m)
    rounded = rounding(dtype)
    partitions = [
        Partition(SHAPES[path], SHAPES[path] if isinstance(tile, str) else tile)
        for path, tile in tiles.items()
    ]
    item_size = np.dtype(dtype).itemsize
    saves = [saves_memory(partition, item_size) for partition in partitions]

    def store(m, k, t):
        if not saves[k]:
            return rounded(m)
        return eight_bits.stored(m, sum(saves[:k]), partitions[k], t - 1)

    return store


def decoded(optimizer):
    """The slots, with a momentum in 8 bits as numbers."""
    state = optimizer.block_state
    momentum = values_by_weight(state)["momentum"]
    slots = zip(state.slots, slots_of(optimizer).items(), strict=True)
    return {
        name: momentum[slot.index] if slot.name == "momentum" else value
        for slot, (name, value) in slots
        if slot.name != "momentum_scale"
    }


def rounding(dtype):
    """What storing a number in `dtype` does to it; the oracle's is float64."""
    if dtype in ("float32", "float64"):
        return np.float64
    return lambda x: np.float64(np.float64(x).astype(dtype))


# One row per class, with all of its statistics.
ONE_OF_EACH = [
    Case(kb.BlockAdam, {"amsgrad": True}),
    Case(kb.AdamMini),
    Case(kb.Adalayer, HIDDEN),
    Case(kb.BlockNadam),
    Case(kb.BAGM),
    Case(kb.BlockMuon, HIDDEN),
    Case(kb.BAG),
    Case(kb.BCOS),
    Case(kb.SPAM, {"reset_every": 9, "reset_warmup": 3}),
    Case(kb.AdaBlock, {"bounds": (8.0, 0.125)}),
    Case(kb.BlockRMSprop, {"centered": True, "momentum": 0.5}),
]
each_full_class = of_classes(ONE_OF_EACH)
# For what classes have in common: one with each kind of momentum, and one with
# matrices.
FEW = [
    case
    for case in ONE_OF_EACH
    if case.cls in (kb.BlockAdam, kb.BAGM, kb.BlockMuon)
]
each_of_few = pytest.mark.parametrize(
    "case", FEW, ids=lambda case: case.cls.__name__
)
few_quick = some_quick(ONE_OF_EACH, FEW.__contains__)
# Blocks with a mean square, its maximum, and a mean.
by_statistics = pytest.mark.parametrize(
    "case",
    [ONE_OF_EACH[0], ONE_OF_EACH[-1]],
    ids=lambda case: case.cls.__name__,
)

# A tile that splits two axes, a whole axis, two variables of unlike sizes that
# share an accumulator, one of them a scalar, and one without blocks.
MIXED = {
    "dense/kernel": (2, 3),
    "dense/bias": (None,),
    "embedding/embeddings": "model",
    "query/kernel": (None, 2, 1),
    "query/bias": (1, 1),  # Tells what the axes of the kernel are.
    "scalar/bias": "model",
    "value/bias": None,
}
MIXED_BLOCKING = kb.Blocking(
    "model",
    {
        path: "none" if tile is None else tile
        for path, tile in MIXED.items()
        if tile != "model"
    },
)


@pytest.mark.filterwarnings("ignore:Names and shapes allow more than one")
@pytest.mark.filterwarnings("ignore:The output layer is not known")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme):
    check_truth(ONE_OF_EACH[0], tiles_of(scheme), blocking=scheme)


@every_case
def test_cases(case):
    check_truth(case, MIXED, blocking=MIXED_BLOCKING)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ONE_OF_EACH, ids=lambda case: case.cls.__name__
)
def test_compiled(case):
    check_truth(
        case, MIXED, wrap=eager, jit_compile=True, blocking=MIXED_BLOCKING
    )


@each_of_few
@pytest.mark.parametrize(
    "wrap, jit_compile",
    [
        pytest.param(eager, False, id="eager-plain"),
        pytest.param(graph, True, id="graph-jit", marks=pytest.mark.slow),
        pytest.param(
            lambda optimizer: tf.function(
                optimizer.apply, jit_compile=True, autograph=False
            ),
            True,
            id="jit_function-jit",
            marks=[pytest.mark.tensorflow, pytest.mark.slow],
        ),
    ],
)
def test_modes(case, wrap, jit_compile):
    check_truth(
        case,
        MIXED,
        wrap=wrap,
        jit_compile=jit_compile,
        blocking=MIXED_BLOCKING,
    )


@by_statistics
@pytest.mark.parametrize(
    "path, tile",
    [
        ("dense/kernel", (None, 2)),
        ("dense/kernel", (2, None)),
        ("dense/kernel", (2, 2)),
        ("dense/kernel", (1, 3)),
        ("dense/kernel", (4, 6)),
        ("dense/bias", (3,)),
        ("query/kernel", (2, None, 1)),
        ("query/kernel", (2, 1, 3)),
        ("conv2d/kernel", (1, 3, 2, None)),
        ("conv3d/kernel", (1, None, 2, 1, 3)),
        ("scalar/bias", ()),
    ],
)
def test_tiles(case, path, tile):
    check_truth(case, {path: tile}, blocking=tile)


@pytest.mark.parametrize(
    "case",
    [
        Case(kb.BlockAdam, {"beta_1": 0.0, "epsilon": 0.0}),
        Case(kb.BlockAdam, {"beta_2": 0.0}),
        Case(kb.BlockAdam, {"epsilon": 0.5}),
        Case(kb.AdamMini, {"epsilon": 0.5}),
        Case(kb.Adalayer, {"epsilon": 0.5, "beta_1": 0.5, **HIDDEN}),
        Case(kb.BlockNadam, {"beta_1": 0.0, "epsilon": 0.5}),
        Case(kb.BAGM, {"beta_2": 0.0, "epsilon": 0.5}),
        Case(kb.BAGM, {"accumulator": "polynomial", "power": 0.0}),
        Case(kb.BAGM, {"accumulator": "polynomial", "nesterov": False}),
        Case(kb.BlockRMSprop, {"rho": 0.0, "epsilon": 0.5}),
        pytest.param(
            Case(kb.AdaBlock, {"beta_1": 0.0, "epsilon": 0.5}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Case(kb.AdaBlock, {"beta_2": 0.5, "epsilon": 0.5}),
            marks=pytest.mark.slow,
        ),
        Case(kb.BCOS, {"momentum": 0.0}),
        Case(kb.BCOS, {"momentum": 0.5, "epsilon": 0.5}),
        Case(kb.BlockMuon, {"beta_2": 0.0, "epsilon": 0.5, **HIDDEN}),
        Case(kb.BlockMuon, {"ns_steps": 1, **HIDDEN}),
    ],
    ids=lambda case: case.id,
)
def test_hyper_parameters(case):
    check_truth(case, MIXED, blocking=MIXED_BLOCKING)


@each_full_class
def test_float32(case):
    check_truth(case, MIXED, "float32", blocking=MIXED_BLOCKING)


@each_full_class
def test_bfloat16(case):
    check_low_precision(case, "bfloat16")


@each_of_few
def test_float16(case):
    check_low_precision(case, "float16")


def check_low_precision(case, dtype):
    _, variables, truth = check_truth(
        case, MIXED, dtype, blocking=MIXED_BLOCKING
    )
    shapes = {path: SHAPES[path] for path in MIXED}
    for before, after, weight in zip(
        make_variables(shapes, dtype), variables, truth.weights
    ):
        # With its 0.999 in bfloat16, which is 1, nothing would move.
        moved, expected = (
            np.abs(x - to_float64(before)).max()
            for x in (to_float64(after), np.reshape(weight, before.shape))
        )
        assert moved > 0.01 or expected < 0.01


@each_of_few
@pytest.mark.parametrize(
    "dtype, momentum_dtype",
    [
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float64", "int8"),
    ],
)
def test_momentum_dtype(case, dtype, momentum_dtype):
    check_truth(case, MIXED, dtype, momentum_dtype, blocking=MIXED_BLOCKING)


def missing():
    """Gradients of which some are missing, in other ways at other steps."""
    patterns = [
        "",
        "embedding/embeddings",  # A part of the group.
        "scalar/bias dense/kernel",  # The other part.
        "embedding/embeddings scalar/bias dense/bias",  # All of the group.
        "dense/kernel query/kernel dense/bias",
    ]
    gradients = make_gradients(STEPS, {path: SHAPES[path] for path in MIXED})
    return [
        [
            None if path in patterns[step % len(patterns)].split() else g
            for path, g in zip(MIXED, given)
        ]
        for step, given in enumerate(gradients)
    ]


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@few_quick
def test_missing_gradients(case):
    check_truth(case, MIXED, gradients=missing(), blocking=MIXED_BLOCKING)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_missing_gradients_compiled():
    check_truth(
        Case(kb.BAGM),
        MIXED,
        gradients=missing(),
        wrap=eager,
        jit_compile=True,
        blocking=MIXED_BLOCKING,
    )


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@each_of_few
def test_skip_nonfinite(case, jit_compile):
    """As if the steps with an infinity or a NaN had not been."""
    gradients = make_gradients(STEPS, {path: SHAPES[path] for path in MIXED})
    for step, value in [(0, np.nan), (5, np.inf), (6, -np.inf)]:
        gradients[step][2][0, 1] = value
    optimizer, *_ = check_truth(
        case,
        MIXED,
        gradients=gradients,
        wrap=eager if jit_compile else graph,
        jit_compile=jit_compile,
        blocking=MIXED_BLOCKING,
        skip_nonfinite=True,
    )
    assert int(optimizer.skipped_steps) == 3


@pytest.mark.parametrize("restart, jit_compile", [(True, False), (False, True)])
def test_spikes_and_resets(restart, jit_compile):
    """Three resets, and spikes before and after each."""
    arguments = {
        "spike_threshold": 4.0,
        "reset_every": 26,
        "reset_warmup": 9,
        "reset_bias_correction": restart,
    }
    gradients = make_gradients(84, {path: SHAPES[path] for path in MIXED})
    for given in gradients[::5]:
        given[2][0, 1] *= 64.0
    *_, truth = check_truth(
        Case(kb.SPAM, arguments),
        MIXED,
        gradients=gradients,
        wrap=eager if jit_compile else graph,
        jit_compile=jit_compile,
        blocking=MIXED_BLOCKING,
    )
    assert truth.spikes > 100


@each_full_class
def test_weight_decay(case):
    decay = [0.5] * len(MIXED)
    if case.cls is kb.AdamMini:
        decay = [0.0 if "bias" in path else 0.5 for path in MIXED]
    check_truth(
        case, MIXED, decay=decay, weight_decay=0.5, blocking=MIXED_BLOCKING
    )


# Two that share an accumulator differ.
MULTIPLIERS = {
    "dense/kernel": 0.3,
    "embedding/embeddings": 0.0,
    "scalar/bias": 2.0,
    "value/bias": 0.7,
}


@each_full_class
def test_multipliers(case):
    no_decay = case.cls is kb.AdamMini
    decay = [0.0 if no_decay and "bias" in path else 0.5 for path in MIXED]
    check_truth(
        case,
        MIXED,
        decay=decay,
        weight_decay=0.5,
        multipliers=MULTIPLIERS,
        blocking=MIXED_BLOCKING,
    )


# Some of one size take plain steps, some adapt.
PLAIN = {**MIXED, "dense/kernel": None, "query/bias": None}


@pytest.mark.parametrize("multipliers", [None, MULTIPLIERS])
@pytest.mark.parametrize("jit_compile", [True, False])
def test_sgd_learning_rate(jit_compile, multipliers):
    check_truth(
        Case(kb.Adalayer, {"sgd_learning_rate": (3.0, 0.5), "epsilon": 0.5}),
        PLAIN,
        momentum_dtype="float32",
        wrap=eager,
        jit_compile=jit_compile,
        decay=[0.5] * len(PLAIN),
        weight_decay=0.5,
        multipliers=multipliers,
        plain_rate=6.0,
        output_layer="dense",
        blocking=kb.Blocking(
            "adalayer", {p: t or "none" for p, t in PLAIN.items()}
        ),
    )


@pytest.mark.filterwarnings("ignore:Names and shapes allow more than one")
@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param("coordinate", marks=pytest.mark.slow),
        "output_unit",
        pytest.param("none", marks=pytest.mark.slow),
    ],
)
def test_multipliers_compiled(scheme):
    check_truth(
        Case(kb.BAGM),
        tiles_of(scheme),
        wrap=eager,
        jit_compile=True,
        multipliers=MULTIPLIERS,
        blocking=kb.Blocking(scheme, {"dense_1/kernel": scheme}),
    )


def test_group_of_two_dtypes_has_the_wider_accumulator():
    variables = make_variables({"dense/kernel": (2, 3)}, "float32")
    variables += make_variables({"dense/bias": (1,)}, "float64")
    gradients = [np.arange(6.0).reshape(2, 3), np.array([1 + 2.0**-40])]
    optimizer = kb.BAG(
        blocking="layer", initial_accumulator_value=0.0, epsilon=0.0
    )
    optimizer.build(variables)
    optimizer.apply(
        [tensors([g], v.dtype)[0] for g, v in zip(gradients, variables)]
    )
    (velocity,) = [v for v in optimizer.variables if "velocity" in v.name]
    assert velocity.dtype == "float64"
    # Float32 would lose the last term.
    expected = (55 + (1 + 2.0**-40) ** 2) / 7
    np.testing.assert_allclose(to_float64(velocity), expected, rtol=1e-15)
    assert [v.dtype for v in variables] == ["float32", "float64"]
