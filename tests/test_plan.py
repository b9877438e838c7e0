"""`kb.plan`: the bytes that there will be, and what of them fits."""

import json
import math
import re

import keras
import numpy as np
import pytest

import keras_blockwise as kb
from helpers.cases import HIDDEN
from helpers.cases import LAST_OF_CLASS
from helpers.cases import OPTIMIZERS
from helpers.models import mlp
from helpers.models import normal
from helpers.models import subclassed
from helpers.training import built
from helpers.transformer import transformer
from keras_blockwise.plan import DEFAULTS
from keras_blockwise.plan import KERAS
from keras_blockwise.plan import label_of
from keras_blockwise.plan import parsed
from keras_blockwise.tables import to_text

L = keras.layers
K = keras.optimizers


def bytes_of(variables):
    return sum(
        math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in variables
    )


def mixed():
    """Two dtypes, LoRA, a frozen layer, float8, statistics and seeds."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            L.Dense(6, name="first"),
            L.BatchNormalization(),
            L.Dropout(0.5),
            L.Dense(5, name="second", dtype="bfloat16"),
            L.Dense(5, name="third", dtype="bfloat16"),
            L.Dense(3, name="fourth"),
            L.Dense(2, name="out"),
        ]
    )
    model.get_layer("first").enable_lora(2)
    model.get_layer("second").trainable = False
    model.get_layer("fourth").quantize("float8")
    return model


MODELS = {
    "transformer": transformer,
    "mixed": mixed,
}
OF_EVERY = {"use_ema": True, "gradient_accumulation_steps": 2}


def check(model, makers):
    """The plan of optimizers is what they have once they are built."""
    rows = kb.plan(model, [make() for make in makers]).rows
    for row, make in zip(rows, makers, strict=True):
        optimizer = built(make(), model.trainable_variables)
        assert row.state_bytes == bytes_of(optimizer.variables), row.optimizer
        assert row.weight_bytes == bytes_of(model.variables)
        assert row.gradient_bytes == bytes_of(model.trainable_variables)
        assert row.total_bytes == (
            row.weight_bytes + row.gradient_bytes + row.state_bytes
        )


by_model = pytest.mark.parametrize("name", MODELS)
quiet = pytest.mark.filterwarnings(
    "ignore:Names and shapes", "ignore:The output"
)


@quiet
@by_model
def test_what_ours_will_have(name):
    check(MODELS[name](), [case.make for case in LAST_OF_CLASS])


@by_model
def test_what_those_of_keras_will_have(name):
    check(MODELS[name](), KERAS)


@quiet
def test_what_is_compared_by_default():
    model = mlp()
    assert {cls for cls, _ in DEFAULTS} >= set(OPTIMIZERS)
    rows = kb.plan(model).rows
    for row, (cls, arguments) in zip(rows, DEFAULTS, strict=True):
        optimizer = built(cls(**arguments), model.trainable_variables)
        assert row.optimizer.startswith(cls.__name__)
        assert row.state_bytes == bytes_of(optimizer.variables)


@quiet
def test_what_options_add():
    model = mixed()
    rate = K.schedules.CosineDecay(0.1, 10)
    check(
        model,
        [
            *(lambda cls=cls: cls(**OF_EVERY) for cls in KERAS),
            lambda: kb.BlockAdam(**OF_EVERY),
            lambda: kb.BlockAdam(amsgrad=True, momentum_dtype="bfloat16"),
            lambda: kb.BlockAdam(blocking="layer", skip_nonfinite=True),
            lambda: kb.BlockAdam(rate, learning_rate_multipliers={}),
            lambda: kb.BAGM(learning_rate_multipliers={".*": 0.0}),
            lambda: kb.BAGM(momentum=0, use_ema=True),
            lambda: kb.BlockRMSprop(lambda: 0.1, centered=True, momentum=0.5),
            lambda: kb.BlockMuon(
                blocking=kb.Blocking.from_model(model), **OF_EVERY
            ),
            lambda: kb.Adalayer(sgd_learning_rate=0.1, **HIDDEN),
            lambda: K.SGD(rate, momentum=0.9, nesterov=True),
            lambda: K.Adam(lambda: 0.1, amsgrad=True),
            lambda: K.RMSprop(centered=True, momentum=0.5),
            lambda: K.Muon(exclude_layers=["first"]),
        ],
    )


def test_without_weights_to_train():
    model = mlp()
    model.trainable = False
    check(model, [kb.BlockAdam, K.Nadam, lambda: K.Adam(**OF_EVERY)])
    assert kb.plan(model).rows[0].gradient_bytes == 0


def test_adam_is_what_others_are_compared_with():
    model = mlp()
    adam = built(K.Adam(), model.trainable_variables)
    plan = kb.plan(model, [kb.BlockAdam()])
    assert plan.model == model.name
    assert plan.adam_bytes == bytes_of(adam.variables)


# What a plan leaves alone.


def test_nothing_is_allocated(monkeypatch):
    model = mlp()
    make, sizes = keras.Variable.__init__, []

    def spy(self, *args, **kwargs):
        make(self, *args, **kwargs)
        sizes.append(math.prod(self.shape))

    monkeypatch.setattr(keras.Variable, "__init__", spy)
    kb.plan(model, [cls(**OF_EVERY) for cls in (*KERAS, kb.BlockAdam)])
    kb.plan(model)
    assert set(sizes) == {1}  # Learning rates and counters.


def number_of_names():
    """How many names Keras has given; 0 where it does not count them."""
    return int("0" + re.sub(r"\D", "", K.SGD().name))


def test_nothing_is_changed():
    model = mlp(name="net")
    given = [kb.BlockAdam(), K.Adam()]
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    number = number_of_names()
    kb.plan(model)
    kb.plan(model, given)
    assert number_of_names() <= number + 1
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(variable), value
        )
    for optimizer in given:
        assert not optimizer.built
        assert len(optimizer.variables) == 2
        optimizer.build(model.trainable_variables)
    x, y = normal((4, 3), (4, 1))
    model.compile(given[1], "mse")
    model.train_on_batch(x, y)


def test_no_random_number_is_drawn(monkeypatch):
    model = mlp()

    def draw(*args, **kwargs):
        pytest.fail("A random number.")

    monkeypatch.setattr(keras.random.SeedGenerator, "next", draw)
    with pytest.raises(pytest.fail.Exception):
        keras.random.normal((2,))
    kb.plan(model)


@pytest.mark.filterwarnings("error")
def test_no_warning_of_what_nobody_chose():
    kb.plan(transformer())
    blocking = kb.Blocking.from_model(model := transformer())
    kb.plan(model, [kb.BlockAdam(blocking=blocking)])


# What fits.


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        ("24GB", 24e9),
        ("16 GiB", 16 * 2**30),
        ("512MB", 512e6),
        ("512 MiB", 512 * 2**20),
        ("1.5kB", 1500),
        (" 2 KiB ", 2048),
        ("2gib", 2 * 2**30),
        ("3TB", 3e12),
        ("1TiB", 2**40),
        ("100 B", 100),
        (1e9, 1e9),
        (7, 7),
        (np.int64(8), 8),
    ],
)
def test_sizes(budget, size):
    assert parsed(budget)[0] == size


@pytest.mark.parametrize(
    "budget",
    [
        *("", "24", "24G", "GB", "-1GB", "0GB", "1,5GB", "24 GBs", "1e3MB"),
        *(0, -1, math.nan, math.inf, True, [24], b"24GB"),
    ],
)
def test_what_is_no_size(budget):
    with pytest.raises(ValueError, match="`budget` must be .* '16 GiB'"):
        kb.plan(mlp(), budget=budget)


def test_what_fits():
    model = mlp(30, 20)
    given = [K.Adam, kb.BlockAdam, K.SGD]
    adam, block_adam, sgd = kb.plan(model, [cls() for cls in given]).rows
    assert adam.fits is block_adam.fits is sgd.fits is None
    assert sgd.total_bytes < block_adam.total_bytes < adam.total_bytes

    def fits(budget):
        plan = kb.plan(model, [cls() for cls in given], budget)
        assert plan.budget == budget
        return [row.fits for row in plan.rows]

    assert fits(adam.total_bytes) == [True, True, True]
    assert fits(adam.total_bytes - 1) == [False, True, True]
    assert fits(f"{block_adam.total_bytes} B") == [False, True, True]
    assert fits(sgd.total_bytes - 1) == [False, False, False]


# The table.


def lines_of(plan):
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 100
    return lines


def some(budget=None):
    model = mlp(512, 1024, 10, name="net")
    given = [
        K.Adam(),
        kb.BlockAdam(),
        kb.BlockAdam(momentum_dtype="bfloat16"),
        K.SGD(),
    ]
    return str(kb.plan(model, given, budget))


def test_table():
    title, header, _, *rows, note = some().splitlines()
    assert title == "To train 'net'"
    numbers = ["weights", "gradients", "state", "of Adam's", "total"]
    # Counters are half as large elsewhere.
    least = "12 B" if keras.backend.backend() == "tensorflow" else "8 B"
    size = "2.04 MiB"
    narrow = "BlockAdam(momentum_dtype='bfloat16')"
    cells = [re.split(r" {2,}", line.strip()) for line in (header, *rows)]
    assert cells == [
        ["optimizer", *numbers],
        ["SGD", size, size, least, "0.0%", "4.09 MiB"],
        [narrow, size, size, "1.03 MiB", "25.2%", "5.12 MiB"],
        ["BlockAdam", size, size, "2.05 MiB", "50.2%", "6.14 MiB"],
        ["Adam", size, size, "4.09 MiB", "100.0%", "8.17 MiB"],
    ]
    assert {len(row) for row in rows} == {len(header)}
    assert note.startswith("Activations and the temporaries of the backend")


def test_table_with_a_budget():
    *table, note, verdict = some("6MB").splitlines()
    cells = [line.split() for line in table[3:]]
    assert [c[0] for c in cells] == [
        "SGD",
        "BlockAdam(momentum_dtype='bfloat16')",
        "BlockAdam",
        "Adam",
    ]
    assert [c[-1] for c in cells] == ["yes", "yes", "no", "no"]
    assert cells[0][1:3] == ["2.14", "MB"]
    assert note.startswith("Activations and the temporaries")
    assert verdict == ("Fit in 6MB: SGD, BlockAdam(momentum_dtype='bfloat16').")


@pytest.mark.parametrize(
    ("budget", "verdict"),
    [
        ("1 MiB", "None fits in 1 MiB: the least, SGD, needs 4.09 MiB."),
        (2**20, "None fits in 1 MiB: the least, SGD, needs 4.09 MiB."),
        ("1 MB", "None fits in 1 MB: the least, SGD, needs 4.28 MB."),
        # The plainest of a class that fits stands for it.
        ("7 MiB", "Fit in 7 MiB: SGD, BlockAdam."),
        ("9 MiB", "All of these fit in 9 MiB."),
    ],
)
def test_verdicts(budget, verdict):
    assert some(budget).splitlines()[-1] == verdict


def test_the_table_of_all():
    lines = lines_of(kb.plan(mlp(512, 1024, 10), budget="6 MiB"))
    assert len(lines) < len(DEFAULTS) + 10
    assert lines[-2].startswith("Fit in 6 MiB: SGD, ")
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("optimizer", "label"),
    [
        (K.SGD(0.5, name="mine"), "SGD"),
        (K.SGD(momentum=0.9), "SGD(momentum=0.9)"),
        (K.Muon(), "Muon"),
        (K.AdamW(), "AdamW"),
        (K.Adam(amsgrad=True), "Adam(amsgrad=True)"),
        (kb.BAG(use_ema=True, epsilon=0), "BAG(epsilon=0.0, use_ema=True)"),
        (kb.BlockAdam(3e-3, blocking="layer"), "BlockAdam(blocking='layer')"),
        (kb.AdamMini(blocking=kb.Blocking("adam_mini")), "AdamMini"),
        (
            kb.BlockAdam(blocking=kb.Blocking(rules={"a": "variable"})),
            "BlockAdam(blocking=...)",
        ),
        (kb.BAGM(momentum=0.0), "BAGM(momentum=0.0)"),
    ],
)  # fmt: skip
def test_names_of_optimizers(optimizer, label):
    assert label_of(optimizer) == label


def test_long_names_fit():
    blocking = kb.Blocking(rules={r".*kernel": "variable"})
    many = kb.BlockAdam(
        blocking=blocking,
        amsgrad=True,
        momentum_dtype="float16",
        weight_decay=0.1,
        global_clipnorm=1.0,
        **OF_EVERY,
    )
    lines = lines_of(kb.plan(mlp(), [many], "1 B"))
    assert "blocking=..." in "".join(lines)


def test_rows_are_plain_data():
    json.dumps([vars(row) for row in kb.plan(mlp(), budget=1).rows])


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1023 * 2**10, "0.999 MiB"),
        (2**30, "1 GiB"),
        (1100 * 2**30, "1.07 TiB"),
    ],
)
def test_three_digits(size, text):
    assert to_text(size) == text


def test_decimal_units():
    assert to_text(24e9, 1000) == "24 GB"
    assert to_text(1500, 1000) == "1.5 kB"


# Bad input.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: [3], TypeError, "`model` must be .* Received: model=3"),
        (lambda: [keras.Sequential([L.Dense(2)])], ValueError, "be built"),
        (lambda: [mlp(), K.Adam()], TypeError, "must be a list"),
        (lambda: [mlp(), "adam"], TypeError, "Received: optimizers='adam'"),
        (lambda: [mlp(), []], TypeError, "one or more"),
        (lambda: [mlp(), [K.Adam]], TypeError, "Received: <class .*Adam"),
        (lambda: [mlp(), ["adam"]], TypeError, "Received: 'adam'"),
        (
            lambda: [mlp(), [K.LossScaleOptimizer(K.Adam())]],
            TypeError,
            "classes of Keras: .*Nadam, .* Received: .*LossScale",
        ),
        (
            lambda: [mlp(), [built(kb.BAG(), mlp().trainable_variables)]],
            ValueError,
            "Received: BAG, which is",
        ),
        (
            lambda: [mlp(), [kb.BAG(blocking=kb.Blocking(rules={"a": (1,)}))]],
            ValueError,
            "must match the path of a variable",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        kb.plan(*make())


def test_models_that_are_code():
    rows = kb.plan(subclassed(), [kb.BlockAdam()]).rows
    assert rows[0].weight_bytes == 4 * (5 * 4 + 4 + 4 * 3 + 3)
