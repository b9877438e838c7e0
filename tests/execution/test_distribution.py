"""State that `keras.distribution` shards as the weights are: on JAX alone."""

import re

import keras
import numpy as np
import pytest

import keras_blockwise as kb

if keras.backend.backend() != "jax":
    pytest.skip("needs the devices of JAX", allow_module_level=True)

import jax

distribution = keras.distribution
MAKE = {
    "Adam": lambda: keras.optimizers.Adam(1e-3),
    "BlockAdam": lambda: kb.BlockAdam(1e-3),
    "BlockAdam of entries": lambda: kb.BlockAdam(1e-3, blocking="coordinate"),
    "BlockAdam of layers": lambda: kb.BlockAdam(1e-3, blocking="layer"),
    "BAGM": lambda: kb.BAGM(1e-3, use_ema=True),
    "BAGM in 8 bits": lambda: kb.BAGM(1e-3, momentum_dtype="int8"),
    "BlockRMSprop": lambda: kb.BlockRMSprop(1e-3, momentum=0.5, centered=True),
}
OURS = [name for name in MAKE if name != "Adam"]


def data_parallel():
    return distribution.DataParallel(devices=distribution.list_devices())


def model_parallel():
    """Two groups of four devices, which have parts of two kernels each.

    The patterns match the paths of slots as well.
    """
    mesh = distribution.DeviceMesh(
        (2, 4), ("batch", "model"), distribution.list_devices()
    )
    layouts = distribution.LayoutMap(mesh)
    layouts[".*up.*kernel.*"] = (None, "model")
    layouts[".*up.*bias.*"] = ("model",)
    layouts[".*down.*kernel.*"] = ("model", None)
    return distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    )


DISTRIBUTIONS = {"data": data_parallel, "model": model_parallel}


def train(make, distribute=None, fits=2, callbacks=None):
    """A model that was made and trained under a distribution."""
    if distribute:
        distribution.set_distribution(distribute())
    try:
        keras.utils.set_random_seed(0)
        layers = [
            keras.layers.Dense(256, activation="tanh", name="up"),
            keras.layers.Dense(128, activation="tanh", name="down"),
            keras.layers.Dense(1, name="out"),
        ]
        model = keras.Sequential([keras.Input((32,)), *layers])
        model.compile(make(), "mse")
        x = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
        for _ in range(fits):
            model.fit(x, x[:, :1], 32, 1, 0, callbacks, shuffle=False)
    finally:
        distribution.set_distribution(None)
    return model


def program_of_update(model):
    """What XLA makes of a step of the optimizer."""
    optimizer = model.optimizer
    weights = [v.value for v in model.trainable_variables]
    state = [v.value for v in optimizer.variables]
    shardings = [x.sharding for x in weights], [x.sharding for x in state]
    step = jax.jit(optimizer.stateless_apply, out_shardings=shardings)
    return step.lower(state, weights, weights).compile().as_text()


def bytes_sent(program):
    """The bytes of the results of each kind of collective."""
    sizes = {"f32": 4, "s32": 4, "pred": 1}
    sent = {}
    for result, kind in re.findall(
        r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute"
        r"|reduce-scatter)(?:-start)?\(",
        program,
    ):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result):
            count = np.prod([int(n) for n in dims.split(",") if n])
            sent[kind] = sent.get(kind, 0) + int(count) * sizes[dtype]
    return sent


def bytes_per_device(variables):
    return sum(v.value.addressable_shards[0].data.nbytes for v in variables)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "model") for name in OURS),
        ("BlockAdam", "data"),
        ("BAGM in 8 bits", "data"),
    ],
)
def test_numbers_of_one_device_and_nothing_gathered(name, how):
    make = MAKE[name]
    model = train(make, DISTRIBUTIONS[how])
    alone = train(make)
    for variables, expected in (
        (model.variables, alone.variables),
        (model.optimizer.variables, alone.optimizer.variables),
    ):
        for variable, other in zip(variables, expected, strict=True):
            ours, theirs = np.float64(variable), np.float64(other)
            if "8 bits" not in name:
                np.testing.assert_allclose(ours, theirs, 1e-5, 1e-6)
                continue
            # Of sums in another order, a code may be the next one.
            assert np.isclose(ours, theirs, 1e-5, 1e-6).mean() > 0.999
            unit = 1.0 if variable.dtype == "int8" else 1e-3
            np.testing.assert_allclose(ours, theirs, 0.0, unit)
    sent = bytes_sent(program_of_update(model))
    assert sent.keys() <= {"all-reduce"}
    # One number for each block that devices share, and for the mean.
    limit = {"data": 0, "model": 2 * 4 * 128 * 4}[how]
    assert sum(sent.values()) <= limit


def test_state_per_device_is_half_of_adam():
    adam = train(MAKE["Adam"], model_parallel, fits=1).optimizer.variables
    for name, share in (("BlockAdam", 0.52), ("BAGM in 8 bits", 0.16)):
        ours = train(MAKE[name], model_parallel, fits=1).optimizer.variables
        assert bytes_per_device(ours) <= share * bytes_per_device(adam)


@pytest.mark.parametrize("axes", [(None, "model"), ("model", None)])
def test_slots_have_the_layout_of_their_variable(axes):
    mesh = distribution.DeviceMesh(
        (2, 4), ("batch", "model"), distribution.list_devices()
    )
    layout = distribution.TensorLayout(axes, mesh)
    with keras.name_scope("dense"):
        kernel = keras.Variable(np.ones((8, 8)), name="kernel", layout=layout)
    optimizer = kb.BlockAdam(blocking="output_unit")
    optimizer.build([kernel])
    *_, momentum, velocity = (
        v.value.sharding.shard_shape(v.shape) for v in optimizer.variables
    )
    assert momentum == {(None, "model"): (8, 2), ("model", None): (2, 8)}[axes]
    assert velocity == {(None, "model"): (1, 2), ("model", None): (1, 8)}[axes]


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_rates_of_a_callback(kind):
    groups = {".*(up|down)/.*": 1.0, ".*out/.*": 1.0}
    x = np.random.default_rng(1).normal(size=(32, 32)).astype("float32")
    found = []
    for distribute in (None, DISTRIBUTIONS[kind]):
        own = kb.HessianInformedRates([(x, x[:, :1])], every=2)
        model = train(
            lambda: kb.BlockAdam(1e-4, learning_rate_multipliers=groups),
            distribute,
            callbacks=[own],
        )
        found.append(model.optimizer.learning_rate_multipliers)
    assert found[1] == pytest.approx(found[0], 1e-3)
    assert all(value != 1 for value in found[0].values())
