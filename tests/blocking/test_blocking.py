"""Which blocks every variable gets: schemes, rules and inference.

`test_layer_axes.py` has the blocks that a model's layers tell.
"""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_blockwise as kb
from helpers.cases import make_variables
from helpers.cases import tensors
from helpers.tensorflow import tf


def variables_of(layer, *shape):
    """Of a model of one layer, which has its default name."""
    keras.backend.clear_session(free_memory=False)
    inputs = keras.Input(shape)
    layer = layer()
    name = type(layer).__name__
    if name.endswith("HeadAttention"):
        outputs = layer(inputs, inputs)
    elif name.endswith("Attention"):
        outputs = layer([inputs, inputs])
    else:
        outputs = layer(inputs)
    return keras.Model(inputs, outputs).trainable_variables


def tiles_under(scheme, variables, rules=None):
    rows = kb.Blocking(scheme, rules).resolve(variables)
    return [row.partition.block_shape for row in rows]


# A layer, the shape of its input, and for every variable the end of its path,
# its shape, and its tiles under output_unit, input_unit and filter. Square
# wherever that makes a wrong axis possible.
BIAS_4 = ((4,), (1,), (4,), (1,))
DEPTHWISE = ((3, 3, 4, 2), (3, 3, 1, 1), (3, 3, 1, 2), (3, 3, 1, 1))
RECURRENT = ((4, 16), (4, 1), (1, 16), (4, 1))
QUERY = {
    "kernel": ((4, 2, 3), (4, 1, 1), (1, 2, 3), (4, 1, 1)),
    "bias": ((2, 3), (1, 1), (2, 3), (1, 1)),
}
LAYERS = {
    "Dense": (
        lambda: layers.Dense(4),
        (4,),
        {"kernel": ((4, 4), (4, 1), (1, 4), (4, 1)), "bias": BIAS_4},
    ),
    "Dense, no bias": (
        lambda: layers.Dense(4, use_bias=False),
        (4,),
        {"kernel": ((4, 4), (4, 1), (1, 4), (4, 1))},
    ),
    "SpectralNormalization": (
        lambda: layers.SpectralNormalization(layers.Dense(4)),
        (4,),
        {"kernel": ((4, 4), (4, 1), (1, 4), (4, 1)), "bias": BIAS_4},
    ),
    "TimeDistributed": (
        lambda: layers.TimeDistributed(layers.Dense(4)),
        (5, 4),
        {"kernel": ((4, 4), (4, 1), (1, 4), (4, 1)), "bias": BIAS_4},
    ),
    "Conv1D": (
        lambda: layers.Conv1D(4, 4),
        (6, 4),
        {
            "kernel": ((4, 4, 4), (4, 4, 1), (4, 1, 4), (4, 1, 1)),
            "bias": BIAS_4,
        },
    ),
    "Conv2D": (
        lambda: layers.Conv2D(4, 3),
        (6, 6, 4),
        {
            "kernel": (
                (3, 3, 4, 4),
                (3, 3, 4, 1),
                (3, 3, 1, 4),
                (3, 3, 1, 1),
            ),
            "bias": BIAS_4,
        },
    ),
    "Conv2DTranspose": (
        lambda: layers.Conv2DTranspose(4, 3, use_bias=False),
        (6, 6, 4),
        {"kernel": ((3, 3, 4, 4), (3, 3, 1, 4), (3, 3, 4, 1), (3, 3, 1, 1))},
    ),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        (6, 6, 4),
        {"kernel": DEPTHWISE, "bias": ((8,), (1,), (8,), (1,))},
    ),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(4, 3, depth_multiplier=2),
        (6, 6, 4),
        {
            "depthwise_kernel": DEPTHWISE,
            "pointwise_kernel": (
                (1, 1, 8, 4),
                (1, 1, 8, 1),
                (1, 1, 1, 4),
                (1, 1, 1, 1),
            ),
            "bias": BIAS_4,
        },
    ),
    "Embedding": (
        lambda: layers.Embedding(4, 4),
        (3,),
        {"embeddings": ((4, 4), (1, 4), (4, 1), (1, 4))},
    ),
    "LSTM": (
        lambda: layers.LSTM(4),
        (5, 4),
        {
            "kernel": RECURRENT,
            "recurrent_kernel": RECURRENT,
            "bias": ((16,), (1,), (16,), (1,)),
        },
    ),
    "GRU": (
        lambda: layers.GRU(4),
        (5, 4),
        {
            "kernel": ((4, 12), (4, 1), (1, 12), (4, 1)),
            "recurrent_kernel": ((4, 12), (4, 1), (1, 12), (4, 1)),
            "bias": ((2, 12), (1, 1), (2, 12), (1, 1)),
        },
    ),
    "SimpleRNN": (
        lambda: layers.SimpleRNN(4, name="custom"),
        (5, 4),
        {
            "kernel": ((4, 4), (4, 1), (1, 4), (4, 1)),
            "recurrent_kernel": ((4, 4), (4, 1), (1, 4), (4, 1)),
            "bias": BIAS_4,
        },
    ),
    "ConvLSTM1D": (
        lambda: layers.ConvLSTM1D(4, 3),
        (5, 6, 4),
        {
            "kernel": ((3, 4, 16), (3, 4, 1), (3, 1, 16), (3, 1, 1)),
            "recurrent_kernel": ((3, 4, 16), (3, 4, 1), (3, 1, 16), (3, 1, 1)),
            "bias": ((16,), (1,), (16,), (1,)),
        },
    ),
    "LayerNormalization": (
        lambda: layers.LayerNormalization(axis=(1, 2)),
        (5, 4),
        {
            "gamma": ((5, 4), (1, 1), (5, 4), (1, 1)),
            "beta": ((5, 4), (1, 1), (5, 4), (1, 1)),
        },
    ),
    "BatchNormalization": (
        layers.BatchNormalization,
        (5, 4),
        {"gamma": BIAS_4, "beta": BIAS_4},
    ),
    "RMSNormalization": (layers.RMSNormalization, (5, 4), {"scale": BIAS_4}),
    "PReLU": (
        layers.PReLU,
        (5, 4),
        {"alpha": ((5, 4), (1, 1), (5, 4), (1, 1))},
    ),
    "AdditiveAttention": (
        layers.AdditiveAttention,
        (5, 4),
        {"scale": ((4,), (4,), (1,), (4,))},
    ),
    "Attention": (
        lambda: layers.Attention(use_scale=True),
        (5, 4),
        {"scale": ((), (), (), ())},
    ),
    "MultiHeadAttention": (
        lambda: layers.MultiHeadAttention(2, 3, 5),
        (7, 4),
        {
            **{f"query/{name}": row for name, row in QUERY.items()},
            **{f"key/{name}": row for name, row in QUERY.items()},
            "value/kernel": ((4, 2, 5), (4, 1, 1), (1, 2, 5), (4, 1, 1)),
            "value/bias": ((2, 5), (1, 1), (2, 5), (1, 1)),
            "attention_output/kernel": (
                (2, 5, 4),
                (2, 5, 1),
                (1, 1, 4),
                (2, 5, 1),
            ),
            "attention_output/bias": BIAS_4,
        },
    ),
}
EXACT = ("output_unit", "input_unit", "filter")


@pytest.mark.parametrize("kind", LAYERS)
def test_tiles_from_names_and_shapes(kind):
    layer, shape, expected = LAYERS[kind]
    variables = variables_of(layer, *shape)
    for variable, name in zip(variables, expected):
        assert variable.path.endswith(name)
    shapes, *columns = zip(*expected.values())
    columns = dict(zip(EXACT, columns))
    columns["coordinate"] = tuple((1,) * len(shape) for shape in shapes)
    columns["variable"] = columns["layer"] = columns["model"] = shapes
    received = {
        scheme: tuple(tiles_under(scheme, variables)) for scheme in columns
    }
    assert received == columns


@pytest.mark.parametrize(
    "kwargs",
    [{"key_dim": 4}, {"key_dim": 3, "use_bias": False}],
    ids=["square", "no bias"],
)
def test_default_multi_head_attention_does_not_warn(kwargs):
    # LAYERS: Keras's own attention is known by its names. A key_dim that is
    # the width of the model is in most of Keras's examples.
    variables = variables_of(
        lambda: layers.MultiHeadAttention(2, **kwargs), 7, 4
    )
    expected = {(4, 2, 4): (4, 1, 1), (4, 2, 3): (4, 1, 1)}
    expected |= {(2, 4, 4): (2, 4, 1), (2, 3, 4): (2, 3, 1)}
    for variable, tile in zip(variables, tiles_under("output_unit", variables)):
        if variable.name == "kernel":
            assert tile == expected[tuple(variable.shape)]


# Without a default name, but with a bias that fits one axis only.
BIASED = {
    "dense": (lambda: layers.Dense(3, name="x"), (4,), (4, 1)),
    "conv": (lambda: layers.Conv2D(5, 3, name="x"), (6, 6, 4), (3, 3, 4, 1)),
    "transposed": (
        lambda: layers.Conv2DTranspose(5, 3, name="x"),
        (6, 6, 4),
        (3, 3, 1, 4),
    ),
    "depthwise": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, name="x"),
        (6, 6, 4),
        (3, 3, 1, 1),
    ),
    "einsum": (
        lambda: layers.EinsumDense(
            "abc,cde->abde", (None, 2, 3), bias_axes="de", name="x"
        ),
        (5, 4),
        (4, 1, 1),
    ),
    "reversed einsum": (
        lambda: layers.EinsumDense("ab,cb->ac", 3, bias_axes="c", name="x"),
        (4,),
        (1, 4),
    ),
}


@pytest.mark.parametrize("kind", BIASED)
def test_bias_tells_the_output_axis(kind):
    layer, shape, tile = BIASED[kind]
    kernel, bias = tiles_under("output_unit", variables_of(layer, *shape))
    assert kernel == tile
    assert set(bias) == {1}


class Custom(layers.Layer):
    def build(self, input_shape):
        self.w = self.add_weight(shape=(4, 4), name="w")

    def call(self, x):
        return keras.ops.matmul(x, self.w)


# Where names and shapes fit several layers: the tile that is taken.
AMBIGUOUS = {
    "square": (lambda: layers.Dense(4, name="x"), (4,), (4, 1)),
    "no bias": (
        lambda: layers.Dense(4, name="x", use_bias=False),
        (3,),
        (3, 1),
    ),
    "square convolution": (
        lambda: layers.Conv2D(4, 3, name="x"),
        (6, 6, 4),
        (3, 3, 4, 1),
    ),
    "square transposed": (
        lambda: layers.Conv2DTranspose(4, 3, name="x"),
        (6, 6, 4),
        (3, 3, 4, 1),
    ),
    "depthwise, no bias": (
        lambda: layers.DepthwiseConv2D(3, name="x", use_bias=False),
        (6, 6, 4),
        (3, 3, 4, 1),
    ),
    "permuted": (
        lambda: layers.EinsumDense(
            "abc,cde->abed", (None, 3, 2), bias_axes="ed", name="x"
        ),
        (5, 4),
        (4, 2, 3),
    ),
    "custom weight": (lambda: Custom(name="x"), (4,), (4, 4)),
    "norm": (lambda: layers.RMSNormalization(name="x"), (4,), (1,)),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_ambiguous_variable_warns_and_a_rule_helps(kind):
    layer, shape, tile = AMBIGUOUS[kind]
    variables = variables_of(layer, *shape)
    variable, optimizer = variables[0], kb.BlockAdam()
    with pytest.warns(UserWarning, match="more than one choice") as caught:
        optimizer.build(variables)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert (
        f"'{variable.path}' of shape {tuple(variable.shape)}: blocks of {tile}"
    ) in message
    assert "Blocking.from_model(model" in message
    assert "Blocking(scheme, rules=" in message
    assert optimizer.partitions[0].block_shape == tile
    # No warning from here on: setup.cfg makes it an error.
    rules = {variable.path: (1,) * len(tile)}
    assert tiles_under("output_unit", variables, rules)[0] == (1,) * len(tile)
    for scheme in "coordinate", "variable", "layer", "model":
        tiles_under(scheme, variables)


def test_one_warning_for_all_and_not_too_long():
    shapes = {f"{letter}/kernel": (2, 2) for letter in "abcdefghijklm"}
    with pytest.warns(UserWarning) as caught:
        tiles_under("output_unit", make_variables(shapes))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "'j/kernel'" in message
    assert "'k/kernel'" not in message
    assert "\n  and 3 more\n" in message


COLLIDING = {"p/kernel": (2, 2), "p/bias": (2,)}


def colliding():
    return make_variables(COLLIDING) + make_variables(COLLIDING)


def test_layers_of_one_path_do_not_share():
    with pytest.warns(UserWarning, match="shared in layer 'p'"):
        rows = kb.Blocking("layer").resolve(colliding())
    groups = [row.partition.group for row in rows]
    assert groups[0] == groups[1] != groups[2] == groups[3]


@pytest.mark.parametrize("scheme", ["coordinate", "variable", "model"])
def test_colliding_paths_do_not_matter_to_other_schemes(scheme):
    assert len(tiles_under(scheme, colliding())) == 4


@pytest.mark.parametrize("kind", ["colliding", "without a layer"])
def test_paths_in_the_warning_can_be_used_in_rules(kind):
    if kind == "colliding":
        variables = colliding()
    else:
        variables = make_variables({"kernel": (2, 2)})
    with pytest.warns(UserWarning) as caught:
        tiles_under("output_unit", variables)
    shown = str(caught[0].message).split("'")[1::2]
    assert set(shown) <= {variable.path for variable in variables}


SHAPES = {
    "dense/kernel": (4, 3),
    "dense/bias": (3,),
    "dense_1/kernel": (3, 2),
    "dense_1/bias": (2,),
}


def groups_of(scheme, rules=None, shapes=SHAPES):
    optimizer = kb.BAG(blocking=kb.Blocking(scheme, rules))
    optimizer.build(make_variables(shapes))
    groups = [partition.group for partition in optimizer.partitions]
    velocities = [v for v in optimizer.variables if "velocity" in v.name]
    return groups, [tuple(v.shape) for v in velocities]


@pytest.mark.parametrize(
    ("scheme", "rules", "groups", "shapes"),
    [
        ("variable", {}, [None] * 4, [(1, 1), (1,), (1, 1), (1,)]),
        ("layer", {}, ["dense"] * 2 + ["dense_1"] * 2, [(), ()]),
        ("model", {}, ["/"] * 4, [()]),
        (
            "layer",
            {"dense/bias": "coordinate"},
            ["dense", None, "dense_1", "dense_1"],
            [(), (3,), ()],
        ),
        (
            "coordinate",
            {"dense_1/.*": "layer"},
            [None, None, "dense_1", "dense_1"],
            [(4, 3), (3,), ()],
        ),
        (
            "model",
            {"dense/.*": "layer"},
            ["dense", "dense", "/", "/"],
            [(), ()],
        ),
    ],
)
def test_who_shares_an_accumulator(scheme, rules, groups, shapes):
    assert groups_of(scheme, rules) == (groups, shapes)


def test_variables_without_a_layer_share_one():
    shapes = {"kernel": (4, 3), "bias": (3,)}
    assert groups_of("layer", shapes=shapes) == (["", ""], [()])


def test_members_of_a_group_count_by_their_size():
    # (12 * 4 + 3 * 9) / 15 = 5
    optimizer = kb.BAG(
        1.0,
        initial_accumulator_value=0.0,
        epsilon=0.0,
        blocking="layer",
        jit_compile=False,
    )
    kernel, bias = make_variables({"d/kernel": (4, 3), "d/bias": (3,)})
    before = bias.numpy()
    gradients = tensors([np.full((4, 3), 2.0), np.full(3, 3.0)])
    optimizer.apply(gradients, [kernel, bias])
    moved = before - bias.numpy()
    np.testing.assert_allclose(moved, 3 / np.sqrt(5), rtol=1e-6)


RULES = {
    "exact": ({"dense/kernel": "input_unit"}, 0, (1, 3)),
    "regex": ({r"dense_\d/kernel": "variable"}, 2, (3, 2)),
    "regex to the end": ({"dense/k.*|dense": "variable"}, 2, (3, 1)),
    "regex from the start": ({"dense/k.*|kernel": "variable"}, 2, (3, 1)),
    "exact beats regex": (
        {".*kernel": "variable", "dense/kernel": "coordinate"},
        0,
        (1, 1),
    ),
    "regex beside exact": (
        {".*kernel": "variable", "dense/kernel": "coordinate"},
        2,
        (3, 2),
    ),
    "shadowed regex": (
        {"dense/k.*": "variable", "dense/kernel": "coordinate"},
        0,
        (1, 1),
    ),
    "tuple": ({"dense/kernel": (2, 1)}, 0, (2, 1)),
    "None": ({"dense/kernel": (None, 3)}, 0, (4, 3)),
    "None alone": ({"dense.*bias": (None,)}, 3, (2,)),
    "others": ({"dense/kernel": "variable"}, 2, (3, 1)),
}


@pytest.mark.parametrize("kind", RULES)
def test_rule(kind):
    rules, index, tile = RULES[kind]
    assert (
        tiles_under("output_unit", make_variables(SHAPES), rules)[index] == tile
    )


def test_tuple_as_a_scheme():
    shapes = {"a/kernel": (4, 6), "b/kernel": (2, 3)}
    expected = [(4, 3), (2, 3)]
    assert tiles_under((None, 3), make_variables(shapes)) == expected
    optimizer = kb.BlockAdam(blocking=(None, 3))
    optimizer.build(make_variables(shapes))
    assert [p.block_shape for p in optimizer.partitions] == expected
    assert [p.grid for p in optimizer.partitions] == [(1, 2), (1, 1)]


def test_none_on_an_empty_axis():
    assert tiles_under((None, 1), make_variables({"a/kernel": (0, 3)})) == [
        (1, 1)
    ]


BLOCKINGS = {
    "scheme": kb.Blocking("layer"),
    "tuple": kb.Blocking((None, 4, 1)),
    "rules": kb.Blocking("filter", {"a/b": (None, 2), ".*c": "model", "d": ()}),
}


@pytest.mark.parametrize("blocking", BLOCKINGS.values(), ids=BLOCKINGS)
def test_json_round_trip(blocking):
    config = json.loads(json.dumps(blocking.get_config()))
    assert kb.Blocking.from_config(config) == blocking


@pytest.mark.parametrize("scheme", ["output_unit", "layer", "model"])
def test_json_round_trip_of_the_table(scheme):
    optimizer = kb.BlockAdam(blocking=kb.Blocking(scheme, {".*/bias": (1,)}))
    optimizer.build(variables := make_variables(SHAPES))
    config = json.loads(json.dumps(optimizer.get_config()["blocking"]))
    blocking = kb.Blocking.from_config(config)
    assert blocking.get_config() == config
    # The table alone decides, by name and shape: paths may have changed.
    moved = {path.replace("dense", "moved"): s for path, s in SHAPES.items()}
    for others in variables, make_variables(moved):
        rows = blocking.resolve(others)
        assert tuple(r.partition for r in rows) == optimizer.partitions


def test_blocking_is_frozen_and_keeps_its_own_rules():
    rules = {"a": "model"}
    blocking = kb.Blocking(rules=rules)
    rules["b"] = "layer"
    assert blocking.rules == {"a": "model"}
    with pytest.raises(AttributeError):
        blocking.scheme = "layer"


@pytest.mark.tensorflow
def test_raw_tf_variables_are_known_by_their_names():
    kernel = tf.Variable(np.ones((3, 3)), name="dense_2/kernel")
    assert tiles_under("output_unit", [kernel], {"dense_2/kernel": (1, 3)}) == [
        (1, 3)
    ]
    assert tiles_under("input_unit", [kernel]) == [(1, 3)]
