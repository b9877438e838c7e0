"""AdamMini: Adam-mini's blocks and decay, and its step in float64.

The authors' own package is in `tests/pytorch/test_adam_mini_reference.py`.
"""

import json

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.models import optimizer_for
from helpers.transformer import transformer

L = keras.layers
IDS = np.arange(15).reshape(3, 5) % 11

# The tiles of every variable: embeddings by row, query and key by head, value,
# attention output and dense kernels by output, biases by entry, norms whole.
TILES = {
    "embed/embeddings": (1, 8),
    "norm_0_attention/gamma": (8,),
    "norm_0_attention/beta": (1,),
    "attention_0/query/kernel": (8, 1, 4),
    "attention_0/query/bias": (1, 1),
    "attention_0/key/kernel": (8, 1, 4),
    "attention_0/key/bias": (1, 1),
    "attention_0/value/kernel": (8, 1, 1),
    "attention_0/value/bias": (1, 1),
    "attention_0/attention_output/kernel": (2, 4, 1),
    "attention_0/attention_output/bias": (1,),
    "norm_0_mlp/gamma": (8,),
    "norm_0_mlp/beta": (1,),
    "up_0/kernel": (8, 1),
    "up_0/bias": (1,),
    "down_0/kernel": (12, 1),
    "down_0/bias": (1,),
    "norm/gamma": (8,),
    "norm/beta": (1,),
    "logits/kernel": (8, 1),
    "logits/bias": (1,),
}
# What decays: the rest are biases and normalizations.
DECAYED = {path for path in TILES if path.endswith(("kernel", "embeddings"))}


def exact(model, **kwargs):
    return optimizer_for(model, "adam_mini", cls=kb.AdamMini, **kwargs)


def inferred(model, **kwargs):
    return kb.AdamMini(jit_compile=False, **kwargs)


# Without the layers, the blocks of an attention layer are a guess, and right.
GUESS = "ignore:Names and shapes allow more than one choice:UserWarning"
each_way = pytest.mark.parametrize(
    "make",
    [
        exact,
        pytest.param(inferred, marks=pytest.mark.filterwarnings(GUESS)),
    ],
)


def tiles_by_path(optimizer, model):
    return {
        variable.path: partition.block_shape
        for variable, partition in zip(
            model.trainable_variables, optimizer.partitions
        )
    }


def tiles_of_transformer(make, **kwargs):
    model = transformer()
    optimizer = make(model, **kwargs)
    optimizer.build(model.trainable_variables)
    return tiles_by_path(optimizer, model)


@each_way
def test_blocks_of_a_transformer(make):
    assert tiles_of_transformer(make) == TILES


@each_way
def test_value_in_one_block(make):
    expected = TILES | {"attention_0/value/kernel": (8, 2, 4)}
    assert tiles_of_transformer(make, value="variable") == expected


def test_guesses_are_told():
    with pytest.warns(UserWarning, match="query/kernel' of shape") as record:
        tiles_of_transformer(inferred)
    assert len(record) == 1


def test_value_needs_the_blocks_of_adam_mini():
    with pytest.raises(ValueError, match="`blocking` must be one of.*'layer'"):
        kb.AdamMini(value="variable", blocking="layer")
    with pytest.raises(ValueError, match="`value` must be one of.*'head'"):
        kb.AdamMini(value="head")


def test_value_keeps_the_rules():
    model = transformer()
    rules = {"logits/kernel": "coordinate"}
    blocking = kb.Blocking.from_model(model, "adam_mini", rules)
    optimizer = kb.AdamMini(value="variable", blocking=blocking)
    optimizer.build(model.trainable_variables)
    received = tiles_by_path(optimizer, model)
    assert received["logits/kernel"] == (1, 1)
    assert received["attention_0/value/kernel"] == (8, 2, 4)


def test_everything_else_is_one_block():
    layers = [
        L.Conv1D(4, 3),
        L.SeparableConv1D(4, 3, use_bias=False),
        L.BatchNormalization(),
        L.PReLU(),
        L.LSTM(3),
    ]
    model = keras.Sequential([keras.Input((8, 2)), *layers])
    optimizer = exact(model)
    optimizer.build(model.trainable_variables)
    for variable, partition in zip(
        model.trainable_variables, optimizer.partitions
    ):
        if variable.path.endswith(("bias", "beta")):
            assert partition.block_size == 1
        else:
            assert partition.num_blocks == 1


def test_other_blocks_on_demand():
    model = transformer()
    optimizer = kb.AdamMini(blocking="variable")
    optimizer.build(model.trainable_variables)
    assert all(p.num_blocks == 1 for p in optimizer.partitions)


def decayed(model):
    """Which variables a step without a gradient makes smaller, by path."""
    variables = model.trainable_variables
    for variable in variables:
        variable.assign(np.full(variable.shape, 2.0))
    # Without the momentum of earlier steps.
    for variable in model.optimizer.variables[2:]:
        variable.assign(np.zeros(variable.shape))
    model.optimizer.learning_rate = 0.5
    model.optimizer.apply(
        [keras.ops.zeros(v.shape) for v in variables], variables
    )
    paths = set()
    for variable in variables:
        value = np.unique(variable)
        if value != 2.0:
            np.testing.assert_allclose(value, 2.0 * (1 - 0.5 * 0.25))
            paths.add(variable.path)
    return paths


@each_way
def test_weight_decay_leaves_out_biases_and_normalizations(make, tmp_path):
    model = transformer()
    model.compile(make(model, weight_decay=0.25), "mse")
    model.train_on_batch(IDS, np.zeros((3, 5, 11)))
    model.save(tmp_path / "model.keras")
    assert decayed(model) == DECAYED
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert decayed(loaded) == DECAYED


def test_more_can_be_left_out_of_weight_decay():
    model = transformer()
    optimizer = exact(model, weight_decay=0.25)
    optimizer.exclude_from_weight_decay(var_names=["embed"])
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    assert decayed(model) == DECAYED - {"embed/embeddings"}


@pytest.mark.parametrize("value", ["output_unit", "variable"])
@each_way
def test_config(make, value):
    model = transformer()
    optimizer = make(model, value=value, weight_decay=0.25)
    for built in (False, True):
        if built:
            optimizer.build(model.trainable_variables)
        config = json.loads(json.dumps(optimizer.get_config()))
        restored = kb.AdamMini.from_config(config)
        assert restored.value == value
        assert restored.get_config() == config
    restored.build(model.trainable_variables)
    assert restored.partitions == optimizer.partitions
    assert restored.value == value


def test_steps_of_the_paper():
    """Algorithm 1, with an epsilon whose place can be seen."""
    shape, tile, epsilon, beta_1, beta_2 = (6, 4), (6, 1), 0.5, 0.75, 0.875
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape)
    variable = keras.Variable(w, dtype="float64", name="kernel")
    optimizer = kb.AdamMini(
        0.25, beta_1, beta_2, epsilon, weight_decay=0.5, blocking=tile
    )
    m, v = np.zeros(shape), np.zeros((1, 4))
    for t in range(1, 6):
        g = rng.normal(size=shape)
        optimizer.apply([keras.ops.convert_to_tensor(g)], [variable])
        w = w * (1 - 0.25 * 0.5)
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * np.mean(g * g, 0, keepdims=True)
        root = np.sqrt(v) / np.sqrt(1 - beta_2**t)
        w = w - 0.25 * m / (1 - beta_1**t) / (root + epsilon)
        np.testing.assert_allclose(variable, w, rtol=1e-12)
