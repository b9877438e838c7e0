"""Small state that is kept together is stepped and saved as if it were not."""

import re

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_near
from helpers.arrays import assert_same
from helpers.arrays import refused
from helpers.arrays import to_numpy
from helpers.cases import few_classes
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import slots_of
from helpers.cases import tensors
from helpers.models import normal
from helpers.saving import own_variables
from helpers.tensorflow import tf
from helpers.training import falling
from helpers.training import train_on_batch
from keras_blockwise.state import storage

if tf is not None:
    from helpers.programs import program_of
    from helpers.replicas import distribute
    from helpers.replicas import local_values
    from helpers.replicas import replica_gradients
    from helpers.replicas import two_replicas

# The square kernels have default names here, and Dense is what they belong to.
pytestmark = pytest.mark.filterwarnings("ignore:Names and shapes")

STEPS = 4
# A square and a scalar, and no two neighbours with the same number of blocks.
SHAPES = {
    "dense/kernel": (4, 3),
    "dense/bias": (3,),
    "dense_1/kernel": (3, 3),
    "dense_1/bias": (3,),
    "embedding/embeddings": (5, 2),
    "conv/kernel": (2, 2, 2, 3),
    "scale/bias": (),
    "dense_2/kernel": (3, 1),
}
MIXED = kb.Blocking(
    "output_unit",
    {
        "dense/.*": "layer",
        "dense_1/kernel": (None, None),
        "conv/kernel": (1, 2, None, 1),
        "embedding/.*": "coordinate",
    },
)


@pytest.fixture(params=[2, 3, 5])
def together(request):
    """How many slots are kept together; the rest of each kind are alone."""
    return request.param


ALONE = 10**6


@pytest.fixture
def keep(monkeypatch):
    """Sets how many slots of a kind are kept together."""
    return lambda number: monkeypatch.setattr(storage, "TOGETHER", number)


@pytest.fixture
def build(keep):
    """An optimizer and its variables, the dtypes taking turns."""

    def build(together, make, dtypes=("float32",), **kwargs):
        keep(together)
        variables = [
            make_variables({path: shape}, dtypes[i % len(dtypes)], seed=i)[0]
            for i, (path, shape) in enumerate(SHAPES.items())
        ]
        optimizer = make(0.1, **{"blocking": MIXED, **kwargs})
        optimizer.build(variables)
        return optimizer, variables

    return build


def step_in_order(built, gradients=None, orders=None):
    """Weights and state after some steps, each on the variables in an order."""
    optimizer, variables = built
    orders = orders or [range(len(variables))]
    for step, given in enumerate(gradients or make_gradients(STEPS, SHAPES)):
        falling(optimizer, step)
        order = orders[step % len(orders)]
        ours = [variables[i] for i in order]
        dtypes = [variable.dtype for variable in ours]
        optimizer.apply(tensors([given[i] for i in order], dtypes), ours)
    return values_of(optimizer, variables)


def values_of(optimizer, variables):
    named = {variable.path: variable for variable in variables}
    named["iterations"] = optimizer.iterations
    return dict(zip(named, to_numpy(named.values()))) | slots_of(optimizer)


@pytest.fixture
def assert_alike(build):
    """Whether or not slots are kept together, steps end in the same numbers."""

    def assert_alike(together, make, gradients=None, orders=None, **kwargs):
        # Without XLA, which rounds less often, nothing differs at all.
        built = [
            build(number, make, **kwargs, jit_compile=False)
            for number in (together, ALONE)
        ]
        counts = [len(optimizer.variables) for optimizer, _ in built]
        assert counts[0] < counts[1]
        assert_same(*(step_in_order(own, gradients, orders) for own in built))

    return assert_alike


@pytest.mark.parametrize("blocking", [MIXED, "layer"], ids=str)
@few_classes
def test_a_step_is_that_of_each_by_itself(assert_alike, case, blocking):
    assert_alike(2, case.make, blocking=blocking)


def test_one_accumulator_of_all(assert_alike):
    assert_alike(3, kb.BAGM, blocking="model")


def test_any_number_together(assert_alike, together):
    assert_alike(together, kb.BlockAdam, amsgrad=True)


@few_classes
def test_compiled(build, case):
    results = [
        step_in_order(build(number, case.make, jit_compile=True))
        for number in (2, ALONE)
    ]
    assert_near(*results, 2e-6)


@few_classes
def test_steps_on_some_of_the_variables(assert_alike, case, together):
    """In another order, and with one or none of those kept together."""
    orders = [[7, 2, 0], [1], list(range(8)), [3, 6, 5]]
    assert_alike(together, case.make, orders=orders)


def test_what_has_no_step_stays_as_it_is(build):
    built = build(2, kb.BlockAdam, jit_compile=True)
    before = step_in_order(built)
    after = step_in_order(built, make_gradients(1, SHAPES, seed=5), [[0, 1, 5]])
    stepped = ("dense_kernel", "dense_bias", "conv")
    for name, value in before.items():
        if name.replace("/", "_").startswith(stepped):
            assert (after[name] != value).all(), name
        elif name != "iterations":
            np.testing.assert_array_equal(after[name], value, name)


def test_weight_decay_of_some(build, assert_alike, together):
    def make(*args, **kwargs):
        optimizer = kb.BAGM(*args, weight_decay=0.25, **kwargs)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    assert_alike(together, make)
    optimizer, variables = build(together, make)
    before = to_numpy(variables)
    optimizer.learning_rate = 0.5
    optimizer.apply(tensors([np.zeros(v.shape) for v in variables]))
    for variable, value in zip(variables, before):
        factor = 1.0 if "bias" in variable.name else 0.875
        np.testing.assert_allclose(variable, factor * value, 1e-6)


@pytest.mark.parametrize("momentum_dtype", [None, "bfloat16"])
def test_several_dtypes(assert_alike, together, momentum_dtype):
    assert_alike(
        together,
        kb.BlockAdam,
        dtypes=("float32", "bfloat16", "float64"),
        momentum_dtype=momentum_dtype,
    )


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_step_that_is_not_finite_is_left_out(build, jit_compile):
    gradients = make_gradients(3, SHAPES)
    finite = [gradients[0], gradients[2]]
    gradients[1][3] = np.array([1.0, np.inf, 1.0])
    results = []
    for given in (gradients, finite):
        optimizer, variables = build(
            2, kb.BAGM, skip_nonfinite=True, jit_compile=jit_compile
        )
        for values in given:
            optimizer.apply(tensors(values), variables)
        results.append(values_of(optimizer, variables))
    assert_same(*results)


@pytest.mark.tensorflow
@few_classes
def test_replicas_with_data_of_their_own(build, case):
    strategy = two_replicas()
    steps, sums = replica_gradients(strategy, STEPS, SHAPES)
    with strategy.scope():
        optimizer, variables = build(2, case.make)

    @tf.function(autograph=False)
    def step(*given):
        strategy.run(lambda *given: optimizer.apply(given), given)

    for replicas in steps:
        step(*distribute(strategy, list(map(tensors, replicas))))
    one, own_variables = build(ALONE, case.make, jit_compile=False)
    for given in sums:
        one.apply(tensors(given), own_variables)
    assert_near(slots_of(optimizer), slots_of(one), 2e-6)
    for variable, other in zip(variables, own_variables):
        values = local_values(strategy, variable)
        np.testing.assert_array_equal(*values)
        np.testing.assert_allclose(values[0], other, 2e-6, 2e-6)


@few_classes
def test_a_saved_state_does_not_tell(build, case):
    """Each slot is saved by itself, so either loads what the other saved."""
    built = [
        build(number, case.make, use_ema=True, jit_compile=False)
        for number in (2, ALONE, 3)
    ]
    for own in built[:2]:
        step_in_order(own)
    built[2][0].load_own_variables(own_variables(built[0][0]))
    together, alone, loaded = [own_variables(o) for o, _ in built]
    assert_same(together, alone)
    assert_same(loaded, alone)


def test_a_state_with_other_blocks_is_refused_whole(build):
    other, _ = build(2, kb.BAGM, blocking="variable")
    loading, _ = build(2, kb.BAGM)
    message = r"'dense_kernel_velocity' is kernel/velocity \(\)\. Received: "
    with refused(loading.variables, message):
        loading.load_own_variables(own_variables(other))


@pytest.mark.tensorflow
@pytest.mark.parametrize("built_before", [False, True])
def test_checkpoint_goes_on(build, tmp_path, built_before):
    gradients = make_gradients(6, SHAPES)
    optimizer, variables = build(2, kb.BAGM)
    step_in_order((optimizer, variables), gradients[:3])
    checkpoint = tf.train.Checkpoint(optimizer=optimizer)
    path = checkpoint.save(tmp_path / "checkpoint")
    resumed = kb.BAGM(0.1, blocking=MIXED)
    own_variables = make_variables(SHAPES)
    for variable, value in zip(own_variables, variables):
        variable.assign(value)
    if built_before:
        resumed.build(own_variables)
    tf.train.Checkpoint(optimizer=resumed).restore(path)
    resumed.build(own_variables)
    assert_same(slots_of(resumed), slots_of(optimizer))
    results = [
        step_in_order((o, v), gradients[3:])
        for o, v in [(optimizer, variables), (resumed, own_variables)]
    ]
    assert_same(*results)


def test_state_moves_to_other_blocks(build, keep):
    targets = []
    for number in (2, ALONE):
        source, variables = build(number, kb.BlockAdam, jit_compile=False)
        step_in_order((source, variables))
        keep(3)
        target = kb.BlockAdam(blocking="model")
        target.build(variables)
        kb.convert_state(source, target)
        targets.append(slots_of(target))
    assert_same(*targets)
    assert (targets[0]["conv_kernel_momentum"] != 0).all()


def test_sixteen_small_ones_of_a_kind_are_one_variable():
    """Other numbers are another format of a `tf.train.Checkpoint`."""
    shapes = {f"dense_{i}/kernel": (4095,) for i in range(35)}
    shapes |= {f"large_{i}/kernel": (64, 64) for i in range(16)}
    optimizer = kb.BlockAdam(blocking="coordinate")
    optimizer.build(make_variables(shapes))
    names = [v.name for v in optimizer.variables[2:]]
    sizes = [v.shape for v in optimizer.variables[2:]]
    small = ["small_momentum", "small_velocity"]
    small += ["small_momentum_1", "small_velocity_1"]
    alone = [
        f"{path}_{slot}"
        for path in ["dense_32", "dense_33", "dense_34", *list(shapes)[35:]]
        for slot in ("kernel_momentum", "kernel_velocity")
    ]
    assert names == small + [n.replace("/kernel_k", "_k") for n in alone]
    assert sizes[:4] == [(16 * 4095,)] * 4
    assert sizes[4:10] == [(4095,)] * 6


@pytest.mark.tensorflow
@pytest.mark.slow
def test_alike_programs_for_alike_variables():
    """XLA compiles once what is the same but for its arguments."""
    kernels = []
    for count in (16, 64):
        program = program_of(kb.BAGM(), (4, 5), map(str, range(count)))
        kernels.append(len(set(bodies_of(program))))
    assert kernels[0] == kernels[1]


def bodies_of(program):
    """The fused computations, without names, numbers of lines or metadata."""
    for body in re.findall(
        r"^%(?:fused|wrapped)\S* .*?^}", program, re.M | re.S
    ):
        yield re.sub(r"%[\w.-]+|param_[\d.]+|, metadata=\{[^}]*\}", "", body)


def test_fit_saves_and_goes_on(tmp_path):
    def make():
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(4) for _ in range(12)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        model.compile(kb.BlockAdam(0.01), "mse")
        return model

    data = normal((8, 4), (8, 4))
    model = make()
    model.fit(*data, verbose=0)
    assert any(v.name == "small_momentum" for v in model.optimizer.variables)
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    losses = [train_on_batch(m, *data) for m in (model, restored) * 3]
    assert losses[::2] == losses[1::2]
    assert len(set(losses)) == 3
