"""Adalayer: its blocks, its output layer, and the rate of SGD."""

import json
import warnings

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.arrays import assert_same
from helpers.cases import make_gradients
from helpers.cases import make_variables
from helpers.cases import slots_of
from helpers.models import mlp
from helpers.models import needs_reversible_embedding
from helpers.models import optimizer_for
from helpers.models import product_data
from helpers.models import subclassed
from helpers.training import built
from helpers.training import train

L = keras.layers
schedules = keras.optimizers.schedules
UNKNOWN = r"The output layer is not known. Taken for it.*\['.*{}'\]\nIts output"


def adalayer(*args, **kwargs):
    return kb.Adalayer(*args, jit_compile=False, **kwargs)


def tiles_of(model, optimizer):
    """The tile of each variable, by its path within the model."""
    variables = model.trainable_variables
    optimizer.build(variables)
    return {
        "/".join(variable.path.split("/")[-2:]): partition.block_shape
        for variable, partition in zip(
            variables, optimizer.partitions, strict=True
        )
    }


def one_of_each():
    x = keras.Input((6,), dtype="int32")
    y = L.Embedding(7, 4, name="embedding")(x)
    y = L.LayerNormalization(name="layer_normalization")(y)
    y = L.GRU(3, name="gru")(y)
    y = L.Dense(5, name="dense")(y)
    y = L.BatchNormalization(scale=False, name="batch_normalization")(y)
    y = L.Dense(2, name="dense_1")(y)
    return keras.Model(x, L.Softmax()(y))


HIDDEN = {
    "embedding/embeddings": (7, 4),
    "gru_cell/kernel": (4, 9),
    "gru_cell/recurrent_kernel": (3, 9),
    "gru_cell/bias": (2, 9),
    "dense/kernel": (3, 5),
    "dense/bias": (5,),
}
ADAPTING = {
    "layer_normalization/gamma": (4,),
    "layer_normalization/beta": (4,),
    "batch_normalization/beta": (5,),
    "dense_1/kernel": (5, 1),
    "dense_1/bias": (1,),
}
RATES = {
    None: {**HIDDEN, **ADAPTING},
    0.5: {**dict.fromkeys(HIDDEN), **ADAPTING},
}
each_rate = pytest.mark.parametrize("rate", RATES)


@each_rate
def test_blocks_of_a_model(rate):
    model = one_of_each()
    optimizer = optimizer_for(
        model, "adalayer", cls=kb.Adalayer, sgd_learning_rate=rate
    )
    assert tiles_of(model, optimizer) == RATES[rate]
    assert {p.group for p in optimizer.partitions} == {None}


@each_rate
@pytest.mark.parametrize(
    "name", ["dense_1", "dense_1/kernel|dense_1/bias", ".*_1"]
)
def test_a_given_output_layer(name, rate):
    model = one_of_each()
    optimizer = adalayer(sgd_learning_rate=rate, output_layer=name)
    assert tiles_of(model, optimizer) == RATES[rate]


@each_rate
def test_a_guessed_output_layer(rate):
    model = one_of_each()
    with pytest.warns(UserWarning, match=UNKNOWN.format("dense_1/kernel")):
        tiles = tiles_of(model, adalayer(sgd_learning_rate=rate))
    assert tiles == RATES[rate]


def test_only_code_knows_the_output_of_a_subclassed_model():
    model = subclassed()
    blocking = kb.Blocking.from_model(model, "adalayer")
    with pytest.warns(UserWarning, match=UNKNOWN.format("b/kernel")):
        tiles = tiles_of(model, adalayer(blocking=blocking))
    assert tiles["b/kernel"] == (4, 1)
    tiles = tiles_of(model, adalayer(blocking=blocking, output_layer=".*/a"))
    assert (tiles["a/kernel"], tiles["b/kernel"]) == ((5, 1), (4, 3))


@needs_reversible_embedding
def test_a_tied_embedding_that_is_named():
    embedding = L.ReversibleEmbedding(7, 4, name="tied")
    x = keras.Input((5,))
    y = L.Dense(4, name="a")(embedding(x))
    model = keras.Model(x, embedding(y, reverse=True))
    tiles = tiles_of(model, adalayer(output_layer="tied"))
    assert tiles["tied/embeddings"] == (1, 4)
    assert tiles["a/kernel"] == (4, 4)


def test_a_rule_asks_for_the_output_layer():
    model = mlp()
    rules = {".*/out/.*": "adalayer"}
    blocking = kb.Blocking.from_model(model, "coordinate", rules)
    tiles = tiles_of(model, kb.BlockAdam(blocking=blocking))
    assert tiles["out/kernel"] == (4, 1)
    with pytest.warns(UserWarning, match=UNKNOWN.format("out/kernel")):
        tiles_of(model, kb.BAG(blocking=kb.Blocking("coordinate", rules)))


def test_output_units_of_a_kernel_that_may_be_transposed():
    """Its shape does not matter in any other layer."""
    variables = make_variables({"a/kernel": (3, 3), "b/kernel": (3, 3)})
    with pytest.warns(UserWarning, match="Names and shapes") as record:
        built(adalayer(output_layer="b"), variables)
    assert "'a/kernel'" not in str(record[0].message)
    assert len(record) == 1


def test_an_output_layer_that_there_is_not():
    with pytest.raises(ValueError, match="Received: output_layer='head'"):
        tiles_of(mlp(), adalayer(output_layer="head"))


def test_other_blocks_know_no_output_layer():
    model = one_of_each()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiles = tiles_of(model, adalayer(blocking="variable"))
    assert tiles["dense_1/kernel"] == (5, 2)


SHAPES = {"dense/kernel": (4, 3), "dense/bias": (3,)}


def ends(optimizer, **kwargs):
    return train(
        optimizer, make_variables(SHAPES), make_gradients(5, SHAPES), **kwargs
    )


def test_is_adam_mini_by_variable():
    options = {"blocking": "variable", "weight_decay": 0.0}
    ours = ends(adalayer(0.1, **options))
    assert_same(ours, ends(kb.AdamMini(0.1, jit_compile=False, **options)))


def test_is_block_adam_but_for_the_place_of_epsilon():
    def both(epsilon):
        options = {"epsilon": epsilon, "blocking": "variable"}
        ours = ends(adalayer(0.1, **options))
        theirs = ends(kb.BlockAdam(0.1, jit_compile=False, **options))
        return list(zip(ours, theirs))

    for ours, theirs in both(0.0):
        np.testing.assert_allclose(ours, theirs, 1e-5)
    kernel = both(0.1)[0]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


# The rate of SGD.


def plain_change(optimizer, steps=1, before=None):
    """What a constant gradient of 1 changes where there are no blocks."""
    variables = [
        keras.Variable(np.zeros((2, 2)), name="kernel") for _ in range(2)
    ]
    ones = [[np.ones((2, 2))] * 2] * steps
    train(optimizer, variables, ones, before=before)
    return float(np.mean(variables[0].numpy()))


SCHEDULES = {
    "decay": schedules.ExponentialDecay(0.5, 1, 0.5),
    "cosine": schedules.CosineDecay(0.5, 2),
    "warm-up": schedules.CosineDecay(
        0.125, 2, warmup_target=0.5, warmup_steps=2
    ),
    "pieces": schedules.PiecewiseConstantDecay([0, 2], [0.25, 0.5, 0.1]),
}


def rated(learning_rate, rate):
    """Takes plain steps of every variable."""
    rules = {"kernel": "none"}
    blocking = kb.Blocking("adalayer", rules)
    return adalayer(
        learning_rate,
        sgd_learning_rate=rate,
        blocking=blocking,
        output_layer="kernel",
    )


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_rate_follows_a_schedule(kind):
    schedule = SCHEDULES[kind]
    change = plain_change(rated(schedule, 2.0), steps=3)
    expected = -4.0 * sum(float(schedule(step)) for step in range(3))
    np.testing.assert_allclose(change, expected, 1e-6)


def test_a_learning_rate_that_is_set():
    def halve(optimizer, step):
        optimizer.learning_rate = 0.5 / 2**step

    change = plain_change(rated(0.5, 2.0), steps=3, before=halve)
    np.testing.assert_allclose(change, -2.0 * (1 + 0.5 + 0.25), 1e-6)


@pytest.mark.parametrize("set_to", [0.25, 0.0])
def test_a_config_keeps_the_ratio(set_to):
    optimizer = rated(0.5, 2.0)
    optimizer.learning_rate = set_to
    config = json.loads(json.dumps(optimizer.get_config()))
    restored = kb.Adalayer.from_config(config)
    restored.learning_rate = 0.5
    np.testing.assert_allclose(plain_change(restored), -2.0, 1e-6)


def test_another_schedule_needs_a_pair():
    def rate():
        return 0.5

    with pytest.raises(ValueError, match="or else a pair: .*Received: .*=2.0"):
        rated(rate, 2.0)
    change = plain_change(rated(rate, (2.0, 0.25)))
    np.testing.assert_allclose(change, -4.0, 1e-6)


def test_what_is_used_at_once_cannot_be_set():
    for name, optimizer in (
        ("sgd_learning_rate", adalayer()),
        ("output_layer", adalayer()),
        ("output_layer", kb.BlockMuon()),
    ):
        with pytest.raises(AttributeError, match=f"`{name}` must be given to"):
            setattr(optimizer, name, 0.5)


# Saved state.


def fitted(steps=3, **kwargs):
    model = mlp()
    blocking = kb.Blocking.from_model(model, "adalayer")
    model.compile(
        adalayer(0.05, blocking=blocking, **kwargs), "mse", run_eagerly=True
    )
    for _ in range(steps):
        model.train_on_batch(*product_data(8))
    return model


@pytest.mark.parametrize("rates", [(None, 0.5), (0.5, None)])
def test_state_of_the_other_form_is_refused(rates, tmp_path):
    saved, other = (fitted(sgd_learning_rate=rate) for rate in rates)
    saved.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="must have the blocks of this opt"):
        other.load_weights(tmp_path / "model.weights.h5")


@each_rate
def test_saved(rate, tmp_path):
    model = fitted(sgd_learning_rate=rate)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert loaded.optimizer.partitions == model.optimizer.partitions
    for each in (model, loaded):
        each.train_on_batch(*product_data(8))
    assert_same(model.get_weights(), loaded.get_weights())


def test_convert_from_adam_and_not_back():
    variables = make_variables({**SHAPES, "out/kernel": (3, 2)})
    adam = built(keras.optimizers.Adam(), variables)
    adam.apply([keras.ops.ones(v.shape) for v in variables])
    target = adalayer(sgd_learning_rate=0.5, output_layer="out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What the axes of `out` mean.
        target.build(variables)
    kb.convert_state(adam, target)
    velocity = slots_of(target)["out_kernel_velocity"]
    np.testing.assert_allclose(velocity, np.full((1, 2), 1e-3), 1e-6)
    whole = built(kb.BlockAdam(blocking="variable"), variables)
    with pytest.raises(ValueError, match="'dense/kernel' in `target` must be"):
        kb.convert_state(target, whole)


def test_summary():
    model = fitted(sgd_learning_rate=0.5, steps=1)
    report = kb.summary(model)
    assert [row.num_blocks for row in report.rows] == [0, 0, 1, 1]
    assert report.state_bytes == 4 * (12 + 4 + 4 + 1 + 1 + 1)
    assert "Adalayer, blocks by adalayer_sgd" in str(report)
