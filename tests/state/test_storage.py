"""Small state that is kept together is stepped and saved as if it were not."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CASES
from cases import make_gradients
from cases import make_variables
from cases import program_of
from cases import slots_of
from cases import tensors
from replicas import two_replicas

import keras_blockwise as kb
from keras_blockwise import state

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
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.fixture(params=[2, 3, 5])
def together(request):
    """How many slots are kept together; the rest of each kind are alone."""
    return request.param


def build(monkeypatch, together, make, dtypes=("float32",), **kwargs):
    """An optimizer and its variables, the dtypes taking turns."""
    monkeypatch.setattr(state, "TOGETHER", together)
    variables = [
        make_variables({path: shape}, dtypes[i % len(dtypes)], seed=i)[0]
        for i, (path, shape) in enumerate(SHAPES.items())
    ]
    optimizer = make(0.1, **{"blocking": MIXED, **kwargs})
    optimizer.build(variables)
    return optimizer, variables


def train(built, gradients=None, orders=None):
    """Weights and state after some steps, each on the variables in an order."""
    optimizer, variables = built
    orders = orders or [range(len(variables))]
    for step, given in enumerate(gradients or make_gradients(STEPS, SHAPES)):
        optimizer.learning_rate = 0.1 / (1 + step)
        order = orders[step % len(orders)]
        optimizer.apply(
            [tensors([given[i]], variables[i].dtype)[0] for i in order],
            [variables[i] for i in order],
        )
    return {
        **{v.path: v.numpy() for v in variables},
        **slots_of(optimizer),
        "iterations": optimizer.iterations.numpy(),
    }


def assert_same(monkeypatch, together, make, gradients=None, orders=None, **kw):
    """Without XLA, which rounds less often, nothing differs at all."""
    kw["jit_compile"] = False
    results = []
    counts = []
    for number in (together, 10**6):
        built = build(monkeypatch, number, make, **kw)
        results.append(train(built, gradients, orders))
        counts.append(len(built[0].variables))
    assert counts[0] < counts[1]
    assert_equal(*results)


def assert_equal(actual, expected, tolerance=0.0):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        np.testing.assert_allclose(
            np.float64(actual[name]),
            np.float64(value),
            tolerance,
            tolerance,
            err_msg=name,
        )


@by_case
@pytest.mark.parametrize("blocking", ["layer", "output_unit", MIXED], ids=str)
def test_a_step_is_that_of_each_by_itself(monkeypatch, case, blocking):
    assert_same(monkeypatch, 2, case.make, blocking=blocking)


def test_one_accumulator_of_all(monkeypatch):
    assert_same(monkeypatch, 3, kb.BAGM, blocking="model")


def test_any_number_together(monkeypatch, together):
    assert_same(monkeypatch, together, kb.BlockAdam, amsgrad=True)


@by_case
def test_compiled(monkeypatch, case):
    results = [
        train(build(monkeypatch, number, case.make, jit_compile=True))
        for number in (2, 10**6)
    ]
    assert_equal(*results, tolerance=2e-6)


@by_case
def test_steps_on_some_of_the_variables(monkeypatch, case, together):
    """In another order, and with one or none of those kept together."""
    orders = [[7, 2, 0], [1], list(range(8)), [3, 6, 5]]
    assert_same(monkeypatch, together, case.make, orders=orders)


def test_what_has_no_step_stays_as_it_is(monkeypatch):
    built = build(monkeypatch, 2, kb.BlockAdam, jit_compile=True)
    before = train(built)
    after = train(built, make_gradients(1, SHAPES, seed=5), [[0, 1, 5]])
    stepped = ("dense_kernel", "dense_bias", "conv")
    for name, value in before.items():
        if name.replace("/", "_").startswith(stepped):
            assert (after[name] != value).all(), name
        elif name != "iterations":
            np.testing.assert_array_equal(after[name], value, name)


def test_weight_decay_of_some(monkeypatch, together):
    def make(*args, **kwargs):
        optimizer = kb.BAGM(*args, weight_decay=0.25, **kwargs)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    assert_same(monkeypatch, together, make)
    optimizer, variables = build(monkeypatch, together, make)
    before = [v.numpy() for v in variables]
    optimizer.learning_rate = 0.5
    optimizer.apply([tf.zeros(v.shape) for v in variables])
    for variable, value in zip(variables, before):
        factor = 1.0 if "bias" in variable.name else 0.875
        np.testing.assert_allclose(variable, factor * value, 1e-6)


@pytest.mark.parametrize("momentum_dtype", [None, "bfloat16"])
def test_several_dtypes(monkeypatch, together, momentum_dtype):
    assert_same(
        monkeypatch,
        together,
        kb.BlockAdam,
        dtypes=("float32", "bfloat16", "float64"),
        momentum_dtype=momentum_dtype,
    )


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_step_that_is_not_finite_is_left_out(monkeypatch, jit_compile):
    gradients = make_gradients(3, SHAPES)
    finite = [gradients[0], gradients[2]]
    gradients[1][3] = np.array([1.0, np.inf, 1.0])
    results = []
    for given in (gradients, finite):
        built = build(
            monkeypatch,
            2,
            kb.BAGM,
            skip_nonfinite=True,
            jit_compile=jit_compile,
        )
        built[0].learning_rate = 0.1
        optimizer, variables = built
        for values in given:
            optimizer.apply(tensors(values, "float32"), variables)
        results.append(
            {**{v.path: v.numpy() for v in variables}, **slots_of(optimizer)}
        )
    assert_equal(*results)


@pytest.mark.parametrize("case", CASES[1:5], ids=lambda case: case.id)
def test_replicas_with_data_of_their_own(monkeypatch, case):
    strategy = two_replicas()
    replicas = [make_gradients(STEPS, SHAPES, seed) for seed in range(2)]
    with strategy.scope():
        optimizer, variables = build(monkeypatch, 2, case.make)

    @tf.function(autograph=False)
    def step(*given):
        strategy.run(lambda *given: optimizer.apply(given), given)

    for pair in zip(*replicas):
        values = [
            [tf.constant(x, "float32") for x in given] for given in zip(*pair)
        ]
        step(
            *(
                strategy.experimental_distribute_values_from_function(
                    lambda context, own=own: own[
                        context.replica_id_in_sync_group
                    ]
                )
                for own in values
            )
        )
    one, own_variables = build(monkeypatch, 10**6, case.make, jit_compile=False)
    for pair in zip(*replicas):
        sums = [np.add(*given) for given in zip(*pair)]
        one.apply(tensors(sums, "float32"), own_variables)
    assert_equal(slots_of(optimizer), slots_of(one), 2e-6)
    for variable, other in zip(variables, own_variables):
        values = strategy.experimental_local_results(variable.value)
        np.testing.assert_array_equal(*values)
        np.testing.assert_allclose(values[0], other, 2e-6, 2e-6)


@by_case
def test_a_saved_state_does_not_tell(monkeypatch, case):
    """Each slot is saved by itself, so either loads what the other saved."""
    built = [
        build(monkeypatch, number, case.make, use_ema=True, jit_compile=False)
        for number in (2, 10**6, 3)
    ]
    for own in built[:2]:
        train(own)
    built[2][0].load_own_variables(saved(built[0][0]))
    together, alone, loaded = [saved(optimizer) for optimizer, _ in built]
    assert together.keys() == alone.keys() == loaded.keys()
    for key, value in alone.items():
        np.testing.assert_array_equal(together[key], value)
        np.testing.assert_array_equal(loaded[key], value)


def saved(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


def test_a_state_with_other_blocks_is_refused_whole(monkeypatch):
    other, _ = build(monkeypatch, 2, kb.BAGM, blocking="variable")
    loading, _ = build(monkeypatch, 2, kb.BAGM)
    before = slots_of(loading)
    message = r"'dense_kernel_velocity' is kernel/velocity \(\)\. Received: "
    with pytest.raises(ValueError, match=message):
        loading.load_own_variables(saved(other))
    assert_equal(slots_of(loading), before)


@pytest.mark.parametrize("built_before", [False, True])
def test_checkpoint_goes_on(monkeypatch, tmp_path, built_before):
    gradients = make_gradients(6, SHAPES)
    optimizer, variables = build(monkeypatch, 2, kb.BAGM)
    train((optimizer, variables), gradients[:3])
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
    assert_equal(slots_of(resumed), slots_of(optimizer))
    results = [
        train((o, v), gradients[3:])
        for o, v in [(optimizer, variables), (resumed, own_variables)]
    ]
    assert_equal(*results)


def test_state_moves_to_other_blocks(monkeypatch):
    targets = []
    for number in (2, 10**6):
        source, variables = build(
            monkeypatch, number, kb.BlockAdam, jit_compile=False
        )
        train((source, variables))
        monkeypatch.setattr(state, "TOGETHER", 3)
        target = kb.BlockAdam(blocking="model")
        target.build(variables)
        kb.convert_state(source, target)
        targets.append(slots_of(target))
    assert_equal(*targets)
    assert (targets[0]["conv_kernel_momentum"] != 0).all()


def test_sixteen_small_ones_of_a_kind_are_one_variable():
    """Other numbers are another format of a `tf.train.Checkpoint`."""
    shapes = {f"dense_{i}/kernel": (4095,) for i in range(35)}
    shapes |= {f"large_{i}/kernel": (64, 64) for i in range(16)}
    optimizer = kb.BlockAdam(blocking="coordinate")
    optimizer.build(make_variables(shapes))
    names = [v.name for v in optimizer.variables[2:]]
    sizes = [v.shape for v in optimizer.variables[2:]]
    small = ["small_momentum", "small_velocity"] * 2
    alone = [
        f"{path}_{slot}"
        for path in ["dense_32", "dense_33", "dense_34", *list(shapes)[35:]]
        for slot in ("kernel_momentum", "kernel_velocity")
    ]
    assert names == small + [n.replace("/kernel_k", "_k") for n in alone]
    assert sizes[:4] == [(16 * 4095,)] * 4
    assert sizes[4:10] == [(4095,)] * 6


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

    rng = np.random.default_rng(0)
    data = rng.normal(size=(8, 4)), rng.normal(size=(8, 4))
    model = make()
    model.fit(*data, verbose=0)
    assert any(v.name == "small_momentum" for v in model.optimizer.variables)
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    losses = [m.train_on_batch(*data) for m in (model, restored) * 3]
    assert losses[::2] == losses[1::2]
    assert len(set(losses)) == 3
