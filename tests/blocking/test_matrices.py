"""Which variables are hidden matrices, and which way round."""

import keras
import pytest

import keras_blockwise as kb
from helpers.cases import make_variables
from helpers.models import mlp
from helpers.models import needs_reversible_embedding
from helpers.models import subclassed

L = keras.layers


def rows_of(model, blocking=None, **kwargs):
    """What `BlockMuon` takes each variable of a model for, by its path."""
    if blocking is None:
        blocking = kb.Blocking.from_model(model, "output_unit")
    optimizer = kb.BlockMuon(blocking=blocking, **kwargs)
    variables = model.trainable_variables
    optimizer.build(variables)
    rows = optimizer.block_state.rows
    return {v.path: row for v, row in zip(variables, rows, strict=True)}


def hidden(model, *args, **kwargs):
    """The shapes of the hidden matrices, by the path of their variable."""
    return {
        path: row.matrices.matrix_shape
        for path, row in rows_of(model, *args, **kwargs).items()
        if row.matrices
    }


def one_of_each():
    x = keras.Input((8, 8, 4))
    y = L.Conv2D(6, 3, name="conv2d")(x)
    y = L.Conv2D(4, 3, groups=2, name="conv2d_1")(y)
    y = L.DepthwiseConv2D(2, name="depthwise_conv2d")(y)
    y = L.SeparableConv2D(5, 2, padding="same", name="separable_conv2d")(y)
    y = L.Conv2DTranspose(3, 2, name="conv2d_transpose")(y)
    y = L.Reshape((-1, 12))(y)
    y = L.MultiHeadAttention(2, 5, name="multi_head_attention")(y, y)
    y = L.LayerNormalization(name="layer_normalization")(y)
    y = L.LSTM(4, return_sequences=True, name="lstm")(y)
    y = L.GRU(3, name="gru")(y)
    y = L.Dense(1, name="dense")(y)
    y = L.Dense(7, name="dense_1")(y)
    return keras.Model(x, L.Dense(5, name="dense_2")(y))


# How many matrices, and their rows and columns: the first axis is among the
# rows.
ONE_OF_EACH = {
    "conv2d/kernel": (1, 36, 6),
    "separable_conv2d/pointwise_kernel": (1, 4, 5),
    "conv2d_transpose/kernel": (1, 20, 3),
    "multi_head_attention/query/kernel": (1, 12, 10),
    "multi_head_attention/key/kernel": (1, 12, 10),
    "multi_head_attention/value/kernel": (1, 12, 10),
    "multi_head_attention/attention_output/kernel": (1, 10, 12),
    "lstm/lstm_cell/kernel": (4, 12, 4),
    "lstm/lstm_cell/recurrent_kernel": (4, 4, 4),
    "gru/gru_cell/kernel": (3, 4, 3),
    "gru/gru_cell/recurrent_kernel": (3, 3, 3),
}


def test_layers():
    """Neither depthwise nor grouped kernels, nor one with a single unit."""
    assert hidden(one_of_each()) == ONE_OF_EACH


@pytest.mark.filterwarnings("ignore:Names and shapes")
def test_names():
    """What names do not tell is a grouped convolution."""
    found = hidden(one_of_each(), "output_unit", output_layer="dense_2")
    assert found == {**ONE_OF_EACH, "conv2d_1/kernel": (1, 27, 4)}


def test_heads():
    model = one_of_each()
    found = hidden(model, kb.Blocking.from_model(model, "head"))
    for name in ("query", "key", "value"):
        assert found[f"multi_head_attention/{name}/kernel"] == (2, 12, 5)
    assert found["conv2d/kernel"] == (1, 36, 6)


def test_a_matrix_shares_no_accumulator():
    model = keras.Sequential([keras.Input((3,)), L.Dense(4), L.Dense(2)])
    rows = list(rows_of(model, kb.Blocking.from_model(model, "layer")).values())
    first, second = [row.layer for row in rows[::2]]
    groups = [row.partition.group for row in rows]
    assert groups == [None, first, second, second]


def sequential():
    layers = [L.Dense(4, name="a"), L.Dense(3, name="b"), L.Softmax()]
    return keras.Sequential([keras.Input((5,)), *layers])


def two_outputs():
    x = keras.Input((5,))
    y = L.Dense(4, name="a")(x)
    first = L.Dropout(0.5)(L.Dense(3, name="c")(y))
    z = L.Dense(6, name="b")(y)
    return keras.Model(x, {"first": first, "second": L.Dense(2, name="d")(z)})


def with_an_operation():
    x = keras.Input((5,))
    y = L.Dense(4, name="a")(x)
    return keras.Model(x, keras.ops.softmax(2.0 * L.Dense(3, name="b")(y)))


def model_in_a_model():
    head = keras.Sequential([keras.Input((4,)), L.Dense(3, name="b")])
    x = keras.Input((5,))
    return keras.Model(x, head(L.Dense(4, name="a")(x)))


def shared_layer():
    """A tied embedding makes the output."""
    embedding = L.ReversibleEmbedding(7, 4, name="tied")
    x = keras.Input((5,))
    y = L.Dense(4, name="a")(embedding(x))
    y = L.LayerNormalization(name="n")(y)
    return keras.Model(x, embedding(y, reverse=True))


def wrapped():
    layers = [L.Dense(4, name="a"), L.TimeDistributed(L.Dense(3, name="b"))]
    return keras.Sequential([keras.Input((2, 5)), *layers])


def recurrent():
    layers = [L.Dense(4, name="a"), L.LSTM(3, name="c")]
    return keras.Sequential([keras.Input((2, 5)), *layers])


@pytest.mark.parametrize(
    "make, layers",
    [
        (sequential, "a"),
        (two_outputs, "ab"),
        (with_an_operation, "a"),
        (model_in_a_model, "a"),
        pytest.param(shared_layer, "a", marks=needs_reversible_embedding),
        (wrapped, "a"),
        (recurrent, "a"),
    ],
)
def test_output_layers(make, layers):
    paths = hidden(make())
    assert [path.split("/")[-2] for path in paths] == list(layers)


UNKNOWN = "The output layer is not known. Taken for it, since it is the last: "


@pytest.mark.parametrize("named", [False, True])
def test_an_unknown_output_layer(named):
    model = subclassed()
    blocking = "output_unit" if named else kb.Blocking.from_model(model)
    with pytest.warns(UserWarning, match=UNKNOWN + r"\['.*b/kernel'\]"):
        found = hidden(model, blocking)
    assert [path.split("/")[-2] for path in found] == ["a"]


def test_an_output_layer_of_one_unit():
    """It is the last, though no matrix."""
    model = mlp(5, 4, 1, names=("a", "b"))
    with pytest.warns(UserWarning, match=UNKNOWN + r"\['.*b/kernel'\]"):
        found = hidden(model, "output_unit")
    assert [path.split("/")[-2] for path in found] == ["a"]


@pytest.mark.parametrize(
    "name", ["dense", "dense/kernel", "dense/.*", "dense|other"]
)
def test_a_given_output_layer(name):
    variables = make_variables(
        {"dense/kernel": (5, 4), "dense_1/kernel": (4, 3)}
    )
    optimizer = kb.BlockMuon(output_layer=name)
    optimizer.build(variables)
    first, second = optimizer.block_state.rows
    assert first.matrices is None and second.matrices is not None


def test_other_optimizers_do_not_ask():
    model = subclassed()
    for blocking in ("output_unit", kb.Blocking.from_model(model)):
        kb.BlockAdam(blocking=blocking).build(model.trainable_variables)


def test_saved(tmp_path):
    """Paths change; what they were matched with is in the saved blocks."""
    model = sequential()
    model.compile(kb.BlockMuon(output_layer=f"{model.name}/a"), "mse")
    model.optimizer.build(model.trainable_variables)
    rows = model.optimizer.block_state.rows
    assert [row.matrices is None for row in rows] == [True, True, False, True]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.block_state.rows == rows
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
