"""`kb.summary`: what got which blocks, in rows that add up, and in a table."""

import builtins
import json
import math
import re
import sys
import types

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.models import mlp
from helpers.models import optimizer_for
from helpers.tensorflow import tf
from helpers.training import built
from helpers.transformer import transformer

L = keras.layers
IDS = np.arange(15).reshape(3, 5) % 11
LOGITS = np.zeros((3, 5, 11))


def bytes_of(optimizer, *without):
    """Bytes of an optimizer's state, but for its counters and the like."""
    scalars = {"iteration", "learning_rate", *without}
    return sum(
        math.prod(variable.shape) * np.dtype(variable.dtype).itemsize
        for variable in optimizer.variables
        if variable.name not in scalars
    )


def small():
    return mlp(4, 3, 2, name="mlp")


def summary_of(model, scheme="output_unit", **kwargs):
    """Of an optimizer that is built on a model."""
    optimizer = optimizer_for(model, scheme, **kwargs)
    return kb.summary(built(optimizer, model.trainable_variables))


def test_rows():
    model = small()
    rules = {"mlp/out/kernel": (None, 1)}
    report = summary_of(model, "layer", rules=rules)
    # Momentum, 4 bytes per weight; and second moments, 4 bytes per block, which
    # the first variable of a group has for all.
    assert [vars(row) for row in report.rows] == [
        {
            "path": "mlp/hidden/kernel",
            "layer": "mlp/hidden",
            "shape": (4, 3),
            "source": "layer",
            "block_shape": (4, 3),
            "num_blocks": 1,
            "group": "mlp/hidden",
            "state_bytes": 4 * 12 + 4,
            "adam_bytes": 8 * 12,
            "multiplier": None,
            "momentum_dtype": "float32",
        },
        {
            "path": "mlp/hidden/bias",
            "layer": "mlp/hidden",
            "shape": (3,),
            "source": "layer",
            "block_shape": (3,),
            "num_blocks": 0,
            "group": "mlp/hidden",
            "state_bytes": 4 * 3,
            "adam_bytes": 8 * 3,
            "multiplier": None,
            "momentum_dtype": "float32",
        },
        {
            "path": "mlp/out/kernel",
            "layer": "mlp/out",
            "shape": (3, 2),
            "source": "rule 'mlp/out/kernel'",
            "block_shape": (3, 1),
            "num_blocks": 2,
            "group": None,
            "state_bytes": 4 * 6 + 4 * 2,
            "adam_bytes": 8 * 6,
            "multiplier": None,
            "momentum_dtype": "float32",
        },
        {
            "path": "mlp/out/bias",
            "layer": "mlp/out",
            "shape": (2,),
            "source": "layer",
            "block_shape": (2,),
            "num_blocks": 1,
            "group": "mlp/out",
            "state_bytes": 4 * 2 + 4,
            "adam_bytes": 8 * 2,
            "multiplier": None,
            "momentum_dtype": "float32",
        },
    ]
    assert report.optimizer == "BlockAdam"
    assert report.num_blocks == 4
    assert report.state_bytes == 52 + 12 + 32 + 12
    assert report.adam_bytes == 8 * 23


# Every optimizer, with and without momentum, and with more statistics.
OPTIMIZERS = {
    "BlockAdam": (kb.BlockAdam, {}),
    "amsgrad": (kb.BlockAdam, {"amsgrad": True}),
    "bfloat16": (kb.BlockAdam, {"momentum_dtype": "bfloat16"}),
    "AdamMini": (kb.AdamMini, {}),
    "Adalayer": (kb.Adalayer, {}),
    "BlockNadam": (kb.BlockNadam, {}),
    "BAGM": (kb.BAGM, {}),
    "BAGM without": (kb.BAGM, {"momentum": 0.0}),
    "BlockMuon": (kb.BlockMuon, {}),
    "BAG": (kb.BAG, {}),
    "BlockRMSprop": (kb.BlockRMSprop, {}),
    "SPAM": (kb.SPAM, {}),
    "BCOS": (kb.BCOS, {}),
    "AdaBlock": (kb.AdaBlock, {}),
    "centered": (kb.BlockRMSprop, {"centered": True, "momentum": 0.5}),
}
SCHEMES = ["coordinate", "output_unit", "head", "layer", "model", "adam_mini"]


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [*((scheme, "float32") for scheme in SCHEMES), ("output_unit", "float64")],
)
def test_totals_are_the_bytes_that_there_are(scheme, dtype):
    model = transformer(dtype=dtype)
    adam = built(keras.optimizers.Adam(), model.trainable_variables)
    for cls, kwargs in OPTIMIZERS.values():
        # Its blocks have to be small.
        blocks = "adablock" if cls is kb.AdaBlock else scheme
        optimizer = built(
            optimizer_for(model, blocks, cls=cls, **kwargs),
            model.trainable_variables,
        )
        report = kb.summary(optimizer)
        assert report.state_bytes == bytes_of(optimizer)
        assert report.adam_bytes == bytes_of(adam)
        assert len(report.rows) == len(model.trainable_variables)
        # Those that share an accumulator share one block.
        expected = {
            p.group or id(p): p.num_blocks for p in optimizer.partitions
        }
        assert report.num_blocks == sum(expected.values())


def test_coordinate_blocks_cost_what_adam_costs():
    model = small()
    report = summary_of(model, "coordinate")
    assert report.state_bytes == report.adam_bytes


def test_state_that_keras_adds_is_not_counted():
    model = small()
    kwargs = {"use_ema": True, "gradient_accumulation_steps": 2}
    plain = summary_of(model)
    more = summary_of(model, **kwargs)
    assert more.rows == plain.rows


def test_the_state_of_lora():
    model = transformer()
    for layer in model.layers:
        if isinstance(layer, L.Dense):
            layer.enable_lora(2)
    optimizer = built(optimizer_for(model), model.trainable_variables)
    report = kb.summary(optimizer)
    assert report.state_bytes == bytes_of(optimizer)
    paths = [variable.path for variable in model.trainable_variables]
    assert [row.path for row in report.rows] == paths


def test_variables_without_an_update_have_no_row():
    model = small()
    model.layers[0].quantize("float8")
    optimizer = built(optimizer_for(model), model.trainable_variables)
    report = kb.summary(optimizer)
    assert [row.path for row in report.rows] == [
        "mlp/hidden/kernel",
        "mlp/hidden/bias",
        "mlp/out/kernel",
        "mlp/out/bias",
    ]
    assert report.state_bytes == bytes_of(optimizer)


# Where the optimizer comes from.


def test_compiled_model_before_training():
    model = small()
    optimizer = optimizer_for(model)
    model.compile(optimizer, "mse")
    report = kb.summary(model)
    assert not optimizer.built
    assert len(optimizer.variables) == 2
    model.fit(np.ones((2, 4)), np.ones((2, 2)), verbose=0)
    assert kb.summary(model) == report == kb.summary(optimizer)


def test_loaded_model(tmp_path):
    model = transformer()
    model.compile(optimizer_for(model, "head"), "mse")
    model.train_on_batch(IDS, LOGITS)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert kb.summary(loaded) == kb.summary(model)


def test_loss_scale_optimizer():
    model = small()
    optimizer = optimizer_for(model)
    outer = keras.optimizers.LossScaleOptimizer(optimizer)
    outer.build(model.trainable_variables)
    report = kb.summary(outer)
    assert report == kb.summary(optimizer)
    assert report.state_bytes == bytes_of(optimizer)
    other = small()
    optimizer = optimizer_for(other)
    other.compile(keras.optimizers.LossScaleOptimizer(optimizer), "mse")
    assert kb.summary(other).rows == report.rows
    assert not optimizer.built


@pytest.mark.tensorflow
def test_native_variables():
    variable = tf.Variable(np.ones((3, 2), "float32"), name="dense/kernel")
    optimizer = kb.BlockAdam()
    optimizer.build([variable])
    (row,) = kb.summary(optimizer).rows
    assert (row.path, row.shape) == ("dense/kernel", (3, 2))
    assert row.state_bytes == 4 * 6 + 4 * 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (kb.BlockAdam, ValueError, "BlockAdam must be built"),
        (lambda: compiled(keras.Sequential([L.Dense(2)])), ValueError, "model"),
        (keras.optimizers.Adam, TypeError, "Adam object"),
        (lambda: compiled(small(), keras.optimizers.Adam()), TypeError, "Adam"),
        (small, TypeError, "Received: None"),
        (lambda: 3, TypeError, "Received: 3"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        kb.summary(make())


def compiled(model, optimizer=None):
    model.compile(optimizer or kb.BlockAdam(), "mse")
    return model


# The table.


def lines_of(report):
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    return [line.rstrip() for line in lines]


def test_table_of_a_small_model():
    model = small()
    rules = {"mlp/out/kernel": (None, 1)}
    lines = lines_of(summary_of(model, "layer", rules=rules))
    table = [re.sub(r" +", " ", line.strip()) for line in lines]
    assert "BlockAdam, blocks by" in table[0]
    text = "\n".join(table)
    assert "hidden/kernel (4, 3) (4, 3) 1 52 B layer" in text
    assert "hidden/bias (3,) (3,) shared 12 B layer" in text
    assert "out/kernel (3, 2) (3, 1) 2 32 B rule 'mlp/out/kernel'" in text
    assert "4 variables in 4 blocks; state 108 B, 58.7% of the 184 B" in text


def resnet(depth):
    """Many layers that differ by their numbers."""
    x = inputs = keras.Input((4, 4, 3))
    x = L.Conv2D(4, 3, padding="same", name="stem_conv")(x)
    for i in range(depth):
        y = L.Conv2D(4, 3, padding="same", use_bias=False, name=f"b{i}_conv")(x)
        y = L.BatchNormalization(name=f"b{i}_bn")(y)
        x = L.Add()([x, y])
    return keras.Model(inputs, L.Dense(2, name="top")(L.Flatten()(x)))


@pytest.mark.parametrize(
    ("make", "variables", "scheme"),
    [
        (lambda: resnet(65), 199, "output_unit"),
        (lambda: transformer(num_layers=12), 197, "layer"),
        (lambda: keras.Sequential(
            [keras.Input((3,)), *(L.Dense(3) for _ in range(100))]
        ), 200, "output_unit"),
    ],
    ids=["convolutions", "transformer", "dense"],
)  # fmt: skip
def test_long_models_are_folded(make, variables, scheme):
    model = make()
    assert len(model.trainable_variables) == variables
    report = summary_of(model, scheme)
    assert len(report.rows) == variables
    assert len(lines_of(report)) < 60


def test_folded_lines_add_up():
    model = resnet(65)
    report = summary_of(model)
    text = re.sub(r" +", " ", "\n".join(lines_of(report)))
    # 65 kernels of 4 blocks; 65 * (4 * 144 + 4 * 4) bytes.
    assert re.search(r"\(3, 3, 4, 4\) \(3, 3, 4, 1\) 260 37.6 KiB", text), text
    assert "(x65)" in text
    assert f"{report.num_blocks:,} blocks" in text


def test_long_names_fit():
    name = "a_layer_with_a_name_that_nobody_would_ever_type_" * 3
    model = keras.Sequential(
        [keras.Input((4,)), L.Dense(3, name=name), L.Dense(2, name="b")]
    )
    rules = {rf".*/{name}/kernel": (2, 1)}
    report = summary_of(model, rules=rules)
    text = "".join("".join(lines_of(report)).split())
    assert "(2,1)" in text


def test_table_says_what_shares():
    model = small()
    report = summary_of(model, "model")
    assert [row.num_blocks for row in report.rows] == [1, 0, 0, 0]
    assert "in 1 blocks" in "\n".join(lines_of(report))
    assert {row.group for row in report.rows} == {"/"}


def test_text_is_the_same_in_terminals_and_notebooks(monkeypatch):
    expected = str(summary_of(small()))
    assert "\x1b" not in expected
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert str(summary_of(small())) == expected

    class ZMQInteractiveShell:
        """How `rich` knows a notebook."""

    def display(*args):
        pytest.fail("An output of its own in the cell.")

    shown = types.SimpleNamespace(display=display)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.setattr(
        builtins, "get_ipython", ZMQInteractiveShell, raising=False
    )
    assert str(summary_of(small())) == expected


def test_rows_are_plain_data():
    model = transformer()
    report = summary_of(model)
    json.dumps([vars(row) for row in report.rows])


def test_empty_optimizer():
    optimizer = kb.BlockAdam()
    optimizer.build([])
    report = kb.summary(optimizer)
    assert report.rows == ()
    assert "0 variables" in str(report)
