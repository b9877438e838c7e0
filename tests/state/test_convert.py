"""The state of a running job goes on with other blocks."""

import re

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_close
from helpers.arrays import assert_same
from helpers.arrays import refused
from helpers.arrays import to_numpy
from helpers.cases import SCHEMES
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.models import block_adam
from helpers.training import built
from helpers.training import train
from keras_blockwise.state.storage import values_by_weight

# Whatever the axes of these weights are taken for is as good as any other.
pytestmark = pytest.mark.filterwarnings("ignore:Names and shapes")

Adam = keras.optimizers.Adam
SHAPES = {
    "conv/kernel": (2, 3, 4, 6),
    "conv/bias": (6,),
    "dense/kernel": (6, 4),
    "dense/bias": (4,),
    "embedding/embeddings": (5, 2),
}
SOURCES = {
    "adam": lambda **kwargs: Adam(0.01, **kwargs),
    "adamw": lambda **kwargs: keras.optimizers.AdamW(0.01, **kwargs),
    "nadam": lambda **kwargs: keras.optimizers.Nadam(0.01, **kwargs),
    "amsgrad": lambda **kwargs: Adam(0.01, amsgrad=True, **kwargs),
}


def rmsprop(blocking="output_unit", **kwargs):
    return kb.BlockRMSprop(0.01, blocking=blocking, jit_compile=False, **kwargs)


def trained(optimizer, steps=3, shapes=SHAPES):
    """The optimizer in the middle of training, and its weights."""
    weights = make_variables(shapes)
    train(optimizer, weights, make_gradients(steps, shapes))
    return optimizer, weights


def twins_of(weights):
    twins = make_variables(SHAPES)
    for twin, weight in zip(twins, weights):
        twin.assign(weight)
    return twins


def slots(optimizer, name):
    return to_numpy(v for v in optimizer.variables if v.name.endswith(name))


def per_coordinate(optimizer, name):
    """A statistic in the shape of each weight, in float64."""
    accumulators = values_by_weight(optimizer.block_state)[name]
    return [
        np.kron(
            np.reshape(
                np.float64(accumulators[i]), p.accumulator_shape or p.grid
            ),
            np.ones(p.block_shape),
        )
        for i, p in enumerate(optimizer.partitions)
        if p.num_blocks
    ]


def brute_force(statistics, partitions):
    """The mean over the block of each coordinate, one block at a time."""
    means = [np.empty(p.shape) for p in partitions]
    for i, p in enumerate(partitions):
        for block in np.ndindex(*p.grid):
            where = tuple(
                slice(k * n, (k + 1) * n) for k, n in zip(block, p.tile)
            )
            members = [(i, where)]
            if p.group is not None:
                members = [
                    (j, ...)
                    for j, q in enumerate(partitions)
                    if q.group == p.group
                ]
            entries = [statistics[j][w].ravel() for j, w in members]
            means[i][where] = np.concatenate(entries).mean()
    return [m for m, p in zip(means, partitions) if p.num_blocks]


@pytest.mark.filterwarnings("ignore:The output layer is not known")
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        *(("adam", scheme) for scheme in SCHEMES),
        *(
            (kind, scheme)
            for kind in ("adamw", "nadam", "amsgrad")
            for scheme in ("coordinate", "output_unit", "layer")
        ),
    ],
)
def test_from_keras_adam(kind, scheme):
    source, weights = trained(SOURCES[kind]())
    target = built(block_adam(scheme, amsgrad=kind == "amsgrad"), weights)
    before = to_numpy(source.variables + weights)
    kb.convert_state(source, target)
    assert_same(source.variables + weights, before)
    assert int(target.iterations) == 3
    assert_same(slots(target, "_momentum"), slots(source, "_momentum"))
    for name in ["velocity", "velocity_hat"][: 1 + target.amsgrad]:
        old = [np.float64(v) for v in slots(source, f"_{name}")]
        means = brute_force(old, target.partitions)
        assert_close(per_coordinate(target, name), means, 1e-7)
        if scheme == "coordinate":
            assert_same(slots(target, f"_{name}"), slots(source, f"_{name}"))


@pytest.mark.parametrize("kind", SOURCES)
def test_coordinate_blocks_go_on_as_adam(kind):
    source, weights = trained(SOURCES[kind]())
    twins = twins_of(weights)
    decay = 0.004 if kind == "adamw" else None  # Keras's default of AdamW.
    target = block_adam(
        "coordinate", amsgrad=kind == "amsgrad", weight_decay=decay
    )
    if kind == "nadam":
        target = kb.BlockNadam(0.01, blocking="coordinate", jit_compile=False)
    kb.convert_state(source, built(target, twins))
    for gradients in make_gradients(5, SHAPES, seed=2):
        source.apply(tensors(gradients))
        target.apply(tensors(gradients))
        assert_close(twins, weights, 2e-6, 1e-7)
    assert int(target.iterations) == 8


def test_adam_of_a_loaded_model(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(Adam(0.01), "mse")
    model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    blocking = kb.Blocking.from_model(loaded)
    target = built(block_adam(blocking), loaded.trainable_variables)
    kb.convert_state(loaded.optimizer, target)
    kernel, _ = slots(model.optimizer, "_velocity")
    np.testing.assert_allclose(
        slots(target, "_velocity")[0], kernel.mean(0, keepdims=True), 1e-6
    )


STRIPS = {"conv/kernel": (1, 1, None, 3), "dense/kernel": (3, 2)}
WIDER = {"conv/kernel": (2, 3, None, 3), "dense/kernel": (None, 4)}
NESTING = {  # Finer, then coarser.
    "tiles": (
        kb.Blocking("coordinate", STRIPS),
        kb.Blocking("variable", WIDER),
    ),
    "units": ("output_unit", "variable"),
    "filters": ("filter", "output_unit"),
    "tiles in a layer": (kb.Blocking("coordinate", STRIPS), "layer"),
    "layers in a model": ("layer", "model"),
    "a layer in part": (
        kb.Blocking("layer", {"dense/bias": "coordinate"}),
        "model",
    ),
}
MAKE = {
    "BlockAdam": lambda blocking: block_adam(blocking, amsgrad=True),
    "AdamMini": lambda blocking: kb.AdamMini(
        0.01, blocking=blocking, jit_compile=False
    ),
    "Adalayer": lambda blocking: kb.Adalayer(
        0.01, blocking=blocking, jit_compile=False
    ),
    "BAGM": lambda blocking: kb.BAGM(
        0.01, blocking=blocking, jit_compile=False
    ),
    "BAG": lambda blocking: kb.BAG(0.01, blocking=blocking, jit_compile=False),
    "BlockRMSprop": lambda blocking: rmsprop(
        blocking, centered=True, momentum=0.5
    ),
    "BCOS": lambda blocking: kb.BCOS(
        0.01, blocking=blocking, jit_compile=False
    ),
    "SPAM": lambda blocking: kb.SPAM(
        0.01, blocking=blocking, jit_compile=False
    ),
}


@pytest.mark.parametrize("coarser", [True, False], ids=["coarser", "finer"])
@pytest.mark.parametrize(
    "name, nesting",
    [("BlockAdam", nesting) for nesting in NESTING]
    + [(name, "layers in a model") for name in MAKE][1:],
)
def test_from_one_blocking_to_another(name, nesting, coarser):
    first, second = NESTING[nesting][:: 1 if coarser else -1]
    source, weights = trained(MAKE[name](first))
    target = built(MAKE[name](second), weights)
    kb.convert_state(source, target)
    assert_same(slots(target, "_momentum"), slots(source, "_momentum"))
    assert int(target.iterations) == 3
    for statistic in target.rule().second_moment.statistics:
        means = per_coordinate(source, statistic)
        if coarser:
            means = brute_force(means, target.partitions)
        # From coarse to fine, nothing is computed.
        tolerance = 1e-6 if coarser else 0.0
        assert_close(per_coordinate(target, statistic), means, tolerance)


def test_same_blocks_are_copied_bitwise_and_go_on_bitwise():
    source, weights = trained(rmsprop("layer", centered=True, momentum=0.5))
    twins = twins_of(weights)
    target = built(rmsprop("layer", centered=True, momentum=0.5), twins)
    kb.convert_state(source, target)
    for gradients in make_gradients(2, SHAPES, seed=2):
        assert_same(target.variables, source.variables)
        source.apply(tensors(gradients))
        target.apply(tensors(gradients))
    assert_same(twins, weights)


def test_what_keras_keeps_is_carried_over():
    options = {"use_ema": True, "gradient_accumulation_steps": 2}
    source, weights = trained(
        block_adam(skip_nonfinite=True, **options), steps=4
    )
    for _ in range(2):
        source.apply(tensors([np.full(w.shape, np.nan) for w in weights]))
    source.apply(tensors([np.full(w.shape, 0.5) for w in weights]))
    assert int(source.skipped_steps) > 0
    target = block_adam("layer", skip_nonfinite=True, **options)
    target.learning_rate = 0.25
    kb.convert_state(source, built(target, weights))
    for kind in "iteration", "skipped_steps", "_average", "_accumulator":
        assert slots(source, kind)
        assert_same(slots(target, kind), slots(source, kind))
    assert np.any(slots(target, "_accumulator")[0])
    assert float(target.learning_rate) == 0.25  # A choice, not a state.


def test_keras_averages_and_accumulators_are_carried_over():
    options = {"use_ema": True, "gradient_accumulation_steps": 2}
    source, weights = trained(Adam(0.01, **options), steps=5)
    target = built(block_adam("variable", **options), weights)
    kb.convert_state(source, target)
    for kind in "iteration", "_average", "_accumulator":
        assert_same(slots(target, kind), slots(source, kind))
    assert np.any(slots(target, "_average")[0])


def test_averages_that_the_source_lacks_start_at_the_weights():
    source, weights = trained(Adam(0.01))
    target = built(block_adam(use_ema=True, ema_momentum=0.5), weights)
    kb.convert_state(source, target)
    assert_same(slots(target, "_average"), weights)


def test_variables_without_an_update_are_left_out():
    """As the scales of a float8 layer, to which Keras assigns the gradient."""
    shapes = {"a/kernel": (2, 3), "a/scale": (3,), "b/kernel": (3, 4)}
    weights = make_variables(shapes)
    weights[1].overwrite_with_gradient = True
    source = Adam(0.01)
    train(source, weights, make_gradients(3, shapes))
    target = built(block_adam("variable", use_ema=True), weights)
    kb.convert_state(source, target)
    assert_same(slots(target, "_momentum"), slots(source, "_momentum"))
    old = slots(source, "_velocity")
    for value, v in zip(slots(target, "_velocity"), old, strict=True):
        np.testing.assert_allclose(value, [[v.mean()]], 1e-6)
    assert_same(slots(target, "_average"), [weights[0], weights[2]])

    coarser = built(block_adam("model"), weights)
    kb.convert_state(target, coarser)
    (value,) = slots(coarser, "_velocity")
    expected = np.concatenate([v.ravel() for v in old]).mean()
    np.testing.assert_allclose(value, expected, 1e-6)


def other_variables(**changes):
    shapes = {**SHAPES, **changes}
    return make_variables({k: v for k, v in shapes.items() if v is not None})


def test_a_second_moment_is_left_out_where_there_are_no_blocks():
    source, weights = trained(block_adam())
    rules = {"dense/kernel": "output_unit"}
    target = built(block_adam(kb.Blocking("none", rules)), weights)
    kb.convert_state(source, target)
    assert_same(slots(target, "_momentum"), slots(source, "_momentum"))
    assert_same(slots(target, "_velocity"), slots(source, "_velocity")[2:3])


REFUSED = {
    "no blocks to blocks": (
        lambda: block_adam("none"),
        lambda: block_adam("variable"),
        "'conv/kernel'.*blocks of None in source",
    ),
    "tiles that overlap": (
        lambda: block_adam(kb.Blocking("variable", {"dense/kernel": (2, 4)})),
        lambda: block_adam(kb.Blocking("variable", {"dense/kernel": (3, 4)})),
        "'dense/kernel'.*blocks of \\(2, 4\\).*of \\(3, 4\\)",
    ),
    "rows to columns": (
        lambda: block_adam("output_unit"),
        lambda: block_adam("input_unit"),
        "'conv/kernel'.*\\(2, 3, 4, 1\\).*\\(2, 3, 1, 6\\)",
    ),
    "another class": (
        lambda: kb.BAGM(0.01, jit_compile=False),
        block_adam,
        "source=BAGM, target=BlockAdam",
    ),
    "another class of Keras": (
        lambda: keras.optimizers.SGD(0.01),
        block_adam,
        "source=SGD, target=BlockAdam",
    ),
    "Adam to BAGM": (
        lambda: Adam(0.01),
        lambda: kb.BAGM(0.01),
        "source=Adam, target=BAGM",
    ),
    "back to Keras": (block_adam, lambda: Adam(0.01), "target=Adam"),
    "a slot too few": (
        lambda: Adam(0.01),
        lambda: block_adam(amsgrad=True),
        "'momentum', 'velocity'\\] in source.*'velocity_hat'\\] in target",
    ),
    "a slot too many": (
        lambda: rmsprop(momentum=0.5),
        rmsprop,
        "'momentum', 'velocity'\\] in source and \\['velocity'\\] in target",
    ),
    "another accumulation": (
        lambda: Adam(0.01, gradient_accumulation_steps=2),
        block_adam,
        "gradient_accumulation_steps.*2 in source and 1 in target",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_whole(kind):
    make_source, make_target, message = REFUSED[kind]
    source, weights = trained(make_source())
    target = built(make_target(), weights)
    assert_not_converted(source, target, message)


def assert_not_converted(source, target, message):
    variables = source.variables + target.variables
    with refused(variables, message, (ValueError, TypeError)) as error:
        kb.convert_state(source, target)
    text = str(error.value)
    assert re.match("`(source|target)`|The blocks of variable '", text)
    assert "Received: " in text
    assert "\n" not in text


@pytest.mark.parametrize("make", [block_adam, lambda: Adam(0.01)])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dense/kernel": (5, 4)}, "dense.kernel.* \\(6, 4\\)'.*\\(5, 4\\)'"),
        ({"conv/kernel": (1, 3, 4, 6)}, "conv.kernel.*\\(1, 3, 4, 6\\)"),
        ({"dense/bias": None}, "dense.bias.*embedding.embeddings"),
        ({"more/bias": (3,)}, "None. Received: 'more.bias"),
    ],
    ids=["shape", "shape that broadcasts", "fewer", "more"],
)
def test_refuses_other_variables(make, changes, message):
    source = built(make(), other_variables(**changes))
    target = built(block_adam(), other_variables())
    assert_not_converted(source, target, message)


def test_refuses_what_is_not_built():
    optimizer, weights = trained(block_adam())
    for source, target in (Adam(0.01), optimizer), (optimizer, block_adam()):
        name = "source" if target is optimizer else "target"
        with pytest.raises(ValueError, match=f"`{name}` must be built"):
            kb.convert_state(source, target)


def test_refuses_groups_that_overlap():
    shapes = {"a/kernel": (2, 2), "a/bias": (2,), "b/bias": (2,)}
    source, weights = trained(
        block_adam(kb.Blocking("layer", {"b/bias": "variable"})), shapes=shapes
    )
    # Shares a/kernel with b and leaves out a/bias.
    target = kb.Blocking("model", {"a/bias": "variable"})
    assert_not_converted(
        source,
        built(block_adam(target), weights),
        "The blocks of variable 'a/kernel'.*shared by 2 variables.*by 2",
    )


@pytest.mark.parametrize("wrapped", ["source", "target", "both"])
def test_what_a_loss_scale_optimizer_wraps_is_converted(wrapped):
    ends = []
    for wrap in (True, False):
        optimizers = {
            "source": keras.optimizers.Adam(0.1),
            "target": kb.BlockAdam(0.1),
        }
        variables = make_variables()
        optimizers["source"].apply(tensors(make_gradients(1)[0]), variables)
        given = dict(optimizers)
        for name in optimizers:
            if wrap and wrapped in (name, "both"):
                given[name] = keras.optimizers.LossScaleOptimizer(given[name])
            if not given[name].built:
                given[name].build(variables)
        kb.convert_state(**given)
        ends.append(to_numpy(optimizers["target"].variables))
    assert_same(*ends)


def test_a_loss_scale_optimizer_that_is_not_built():
    wrapper = keras.optimizers.LossScaleOptimizer(kb.BAG())
    with pytest.raises(ValueError, match="`source` must be built"):
        kb.convert_state(wrapper, wrapper)


def muon(output_layer, blocking="output_unit"):
    return kb.BlockMuon(
        0.01, blocking=blocking, output_layer=output_layer, jit_compile=False
    )


def test_other_blocks_of_muon():
    source, weights = trained(muon("dense"))
    target = built(muon("dense", "variable"), weights)
    kb.convert_state(source, target)
    assert_same(slots(target, "momentum"), slots(source, "momentum"))
    expected = brute_force(
        per_coordinate(source, "velocity"), target.partitions
    )
    assert_close(per_coordinate(target, "velocity"), expected, 1e-6)


@pytest.mark.parametrize(
    "source, target", [("conv", "dense"), ("dense", "conv")]
)
def test_another_output_layer(source, target):
    source, weights = trained(muon(source), steps=1)
    target = built(muon(target), weights)
    with refused(target.variables, "'conv/kernel', a hidden matrix in "):
        kb.convert_state(source, target)
