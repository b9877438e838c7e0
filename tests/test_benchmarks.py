"""The arithmetic of the benchmark suite; what it measures is not tested."""

import argparse
import math
import sys
import warnings
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from rich.progress import Progress

import keras_blockwise as kb
from benchmarks import contestants
from benchmarks import first_steps
from benchmarks import goals
from benchmarks import memory
from benchmarks import models
from benchmarks import peers
from benchmarks import quality
from benchmarks import report
from benchmarks import settings
from benchmarks import shapes
from benchmarks import tasks
from benchmarks import timing
from benchmarks.contestants import Contestant
from helpers.cases import CASES

pytestmark = pytest.mark.tensorflow


@pytest.mark.parametrize(
    "model, variables, millions",
    [("gpt2", 148, 124.4), ("resnet50", 161, 25.6), ("vit", 152, 86.6)],
)
def test_models_have_the_sizes_that_are_known(model, variables, millions):
    specs = models.MODELS[model]()
    assert len({path for path, _ in specs}) == len(specs) == variables
    assert round(models.size(specs) / 1e6, 1) == millions


class Named:
    """A variable without values."""

    def __init__(self, path, shape):
        self.path = path
        self.shape = shape


@pytest.mark.parametrize("scheme", peers.SCHEMES)
@pytest.mark.parametrize("model", models.MODELS)
def test_names_leave_no_choice_of_blocks(model, scheme):
    specs = models.MODELS[model]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = kb.Blocking(scheme).resolve([Named(*spec) for spec in specs])
    assert "unknown" not in {row.kind for row in rows}
    if scheme == "layer":
        groups = {row.partition.group for row in rows}
        assert groups == {path.rpartition("/")[0] for path, _ in specs}


def test_variables_have_the_paths_of_the_model():
    specs = models.tiny()
    arrays = models.random_arrays(specs, 1.0, seed=0)
    variables = models.make_variables(specs, arrays)
    assert [(v.path, v.shape) for v in variables] == specs


def test_every_round_has_every_contestant():
    calls = []
    samples = {
        name: lambda name=name: calls.append(name) or len(calls)
        for name in "abc"
    }
    values = timing.interleave(samples, 20, Progress(disable=True), "")
    rounds = [calls[i : i + 3] for i in range(0, 63, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 3
    for name in "abc":  # The first call is left out.
        positions = [i + 1 for i, call in enumerate(calls) if call == name]
        assert values[name] == positions[1:]


def test_short_steps_are_called_often():
    calls = []
    sample = timing.sampler(lambda: calls.append(None))
    sample()
    assert len(calls) > 100


def test_spread():
    assert timing.spread([4.0, 5.0, 6.0, 3.0, 7.0]) == "20%"
    assert timing.spread([1.0]) == ""


def test_a_ratio_is_the_mean_of_pairs():
    ratio = timing.ratio([1.0, 6.0, 2.0, 4.0], [2.0, 4.0, 2.0, 4.0])
    assert ratio.mean == 1.0
    assert ratio.error == pytest.approx((0.5 / 3) ** 0.5 / 2)
    assert str(ratio) == "1.000 ± 0.204"
    assert str(timing.ratio([3.0], [2.0])) == "1.500"
    assert str(timing.estimate([math.nan, 1.0])) == "nan ± nan"


@pytest.mark.parametrize(
    "worst, word", [(0.5, "aim"), (0.51, "must"), (0.8, "must"), (0.81, "fail")]
)
def test_the_worst_ratio_is_judged(worst, word):
    verdict = goals.judge(goals.Goal("", 0.8, 0.5), {"a": 0.1, "b": worst})
    assert (verdict.best, verdict.worst_name) == (0.1, "b")
    assert verdict.word == word


def test_goals_divide_within_a_mode():
    seconds = {
        Contestant(contestants.ADAM, "compiled"): 2.0,
        Contestant(contestants.FLOOR, "compiled"): 1.0,
        Contestant("BlockAdam layer", "compiled"): 1.0,
        Contestant("BlockAdam layer", "eager"): 9.0,
        Contestant("BAGM layer", "compiled"): 1.5,
    }
    verdicts = goals.judge_steps("resnet50", seconds)
    assert [(v.goal.must, v.worst) for v in verdicts] == [
        (0.78, 0.75),
        (2.4, 1.5),
    ]


def test_int8_is_judged_by_float32_alone():
    modes = ("compiled", "graph")
    seconds = {
        Contestant(contestants.ADAM, "compiled"): 2.0,
        **{Contestant("BAGM layer", mode): 1.0 for mode in modes},
        **{Contestant("BAGM layer int8", mode): 2.5 for mode in modes},
        Contestant("BAGM layer bfloat16", "compiled"): 3.0,
        Contestant("BlockAdam layer int8", "compiled"): 4.0,
    }
    verdicts = goals.judge_steps("gpt2", seconds)
    assert [(v.goal.must, v.worst, v.worst_name) for v in verdicts] == [
        (0.78, 0.5, "BAGM layer"),
        (1.3, 2.5, "BAGM layer int8"),
    ]


def test_ours_are_named_by_momentum():
    names = contestants.our_names(["layer"], contestants.MOMENTA)
    narrow = ("", " bfloat16", " int8")
    ours = contestants.OURS
    assert names == [f"{cls} layer{x}" for cls in ours for x in narrow]
    assert list(map(peers.bytes_per_parameter, names)) == 2 * [20, 16, 14]
    optimizer = peers.make_ours("BAGM layer bfloat16", jit_compile=True)
    assert type(optimizer) is kb.BAGM
    assert optimizer.momentum_dtype == "bfloat16"


def test_memory_is_judged_by_momentum():
    states = {"BAGM layer": 0.5, "BAGM layer bfloat16": 0.3}
    states["BAGM layer int8"] = 0.2
    steps = {
        "by XLA": {name: x / 2 for name, x in states.items()},
        "resident": {"BAGM layer int8": 0.3},
    }
    verdicts = memory.judge(list(states), states, steps)
    assert {v.goal: (v.best, v.worst, v.worst_name) for v in verdicts} == {
        goals.STATE: (0.5, 0.5, "BAGM layer"),
        goals.STATE_BFLOAT16: (0.3, 0.3, "BAGM layer bfloat16"),
        goals.STATE_INT8: (0.2, 0.2, "BAGM layer int8"),
        goals.PEAK: (0.15, 0.25, "BAGM layer, by XLA"),
        goals.PEAK_INT8: (0.1, 0.3, "BAGM layer int8, resident"),
    }


def test_first_steps_are_judged():
    """Seconds and bytes by those of Adam, programs by their number."""
    cases = first_steps.cases_of(["tiny", "MobileNetV2"])
    assert [case.network for case in cases] == [
        *("tiny", "", "", "tiny"),
        *("MobileNetV2", "tiny"),
    ]
    numbers = {
        contestants.ADAM: (2.0, 4e6, 5),
        "BlockAdam": (3.0, 8e6, 0),
        "BAGM": (1.0, 4e6, 7),
    }
    names = ("seconds", "bytes", "programs")
    results = {
        case.title: {
            optimizer: {**dict(zip(names, values)), "growth": 1.0}
            for optimizer, values in numbers.items()
        }
        for case in cases
    }
    verdicts = first_steps.judge(cases, results)
    assert {v.goal: (v.best, v.worst) for v in verdicts} == {
        goals.FIRST_STEP: (0.5, 1.5),
        goals.OTHER_LAYERS: (0.5, 1.5),
        goals.FIRST_FIT: (0.5, 1.5),
        goals.FIRST_FIT_BYTES: (1.0, 2.0),
        goals.EQUAL_MODELS: (1.0, 2.0),
        goals.NO_PROGRAM: (0.0, 7.0),
    }
    assert first_steps.make_table(results).row_count == 3 * len(cases)
    assert first_steps.cases_of([]) == []


def test_buffers_that_are_no_arguments():
    assignment = """BufferAssignment:
allocation 0: size 2097152, parameter 6, shape |f32[512,1024]|, maybe-live-out:
 value: <2 bitcast_add_fusion @0> (size=2097152,offset=0): f32[512,1024]{1,0}
allocation 1: size 80, output shape is |(s64[], f32[1,1024])|, maybe-live-out:
allocation 2: size 4096, preallocated-temp:
"""
    assert memory.buffer_bytes(assignment) == 4176


def test_tensors_of_several_states_are_counted_once():
    """As the tables of bitsandbytes; what is no tensor does not count."""

    def tensor(pointer, size):
        return SimpleNamespace(data_ptr=lambda: pointer, nbytes=size)

    state = {i: {"m": tensor(i, 10), "map": tensor(9, 1)} for i in range(3)}
    state[0]["step"] = 5
    assert memory.torch_state_bytes(SimpleNamespace(state=state)) == 31


def test_growth_is_that_of_every_step():
    kept = []

    def step():
        np.ones(16 << 20, np.uint8)
        if not kept:
            kept.append(np.ones(64 << 20, np.uint8))

    grown = memory.growth(step)
    assert grown is None or 12 << 20 < grown < 48 << 20


def test_options():
    parse = report.some_of(("a", "b"))
    assert parse("b,a") == ["b", "a"]
    assert parse("") == []
    with pytest.raises(argparse.ArgumentTypeError, match="'c' is not one of"):
        parse("a,c")
    assert shapes.shapes("3x5,7") == {"3x5": (3, 5), "7": (7,)}
    for text in ("3x", "0x2", "1x1x1x1x1x1"):
        with pytest.raises(argparse.ArgumentTypeError):
            shapes.shapes(text)


def test_a_peer_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "optax", "no_such_module")
    installed, sentences = peers.without_missing(["keras", "optax"])
    assert installed == ["keras"]
    assert sentences == ["optax is not installed and is left out."]


def test_every_optimizer_takes_part():
    ours = {s.cls for s in settings.OPTIMIZERS.values() if s.is_ours}
    assert ours == {case.cls for case in CASES}


@pytest.mark.parametrize("name", settings.OPTIMIZERS)
def test_rates_warm_up_and_fall_to_zero(name):
    setting = settings.OPTIMIZERS[name]
    assert setting.rate in setting.rates
    assert list(setting.rates) == sorted(setting.rates)
    model = keras.Sequential([keras.Input((3,))])
    model.add(keras.layers.Dense(4))
    model.add(keras.layers.Dense(2, name=tasks.LOGITS))
    optimizer = setting.make(model, 0.5, 100)
    for step, rate in ((0, 0.0), (20, 0.5), (60, 0.25), (100, 0.0)):
        optimizer.iterations.assign(step)
        assert float(optimizer.learning_rate) == pytest.approx(rate)


def test_characters_are_learned_from_those_before():
    data = tasks.load_text()
    x, y = data.draw(np.random.default_rng(0), 5)
    assert x.shape == y.shape == (5, tasks.CONTEXT)
    assert (x[:, 1:] == y[:, :-1]).all()
    for x, y in (data.validation, data.test):
        assert (x[:, 1:] == y[:, :-1]).all()
        assert (x[1:, 0] == y[:-1, -1]).all()  # All of the part, once.
        assert max(x.max(), y.max()) < data.classes


def test_epochs_have_every_example_once():
    x = np.arange(7)
    data = tasks.classifier_data((x, -x), (x, x), (x, x))
    drawn, labels = data.draw(np.random.default_rng(0), 17)
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == list(range(7))
    assert list(drawn[:7]) != list(drawn[7:14])
    assert len(drawn) == 17 and (labels == -drawn).all()


def tiny_task():
    """Signs of a number."""
    x = np.linspace(-1, 1, 64, dtype="float32")[:, None]
    part = (x, (x[:, 0] > 0).astype("int32"))

    def make_model(classes):
        dense = keras.layers.Dense(classes, name=tasks.LOGITS)
        return keras.Sequential([keras.Input((1,)), dense])

    def load():
        return tasks.classifier_data(part, part, part)

    return tasks.Task("signs", load, make_model, steps=6, batch=32)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "tiny", tiny_task())


@pytest.mark.slow
def test_a_seed_repeats_a_run(tiny):
    runs = [quality.Run("tiny", "BAGM", 1e-2, seed) for seed in (1, 1, 2)]
    first, again, other = (quality.train(run)[:-1] for run in runs)
    assert first == again
    assert first != other


def test_the_validation_part_chooses(tiny):
    """Then the test part counts, of fresh seeds."""
    setting = settings.OPTIMIZERS["BAGM"]
    start = setting.rates.index(setting.rate)
    low, middle, high, higher = setting.rates[start - 1 : start + 3]
    asked = []

    def score(run):
        asked.append((run.rate, run.seed))
        validation = {low: 90.0, middle: 90.0, high: 90.0, higher: math.nan}
        loss = {low: 0.4, middle: 0.3, high: 0.2, higher: math.nan}
        figures = validation[run.rate], loss[run.rate]
        return quality.Score(*figures, 50 + run.seed, 1.0)

    result = quality.contest("tiny", "BAGM", score, quick=False)
    assert result == quality.Result(high, [51.0, 52.0, 53.0])
    assert asked == [
        *((rate, 0) for rate in (low, middle, high)),
        *((rate, 0) for rate in (middle, high, higher)),
        *((high, seed) for seed in (1, 2, 3)),
    ]


def test_the_last_of_all_rates_may_be_the_best(tiny):
    def score(run):
        return quality.Score(run.rate, -run.rate, 0.0, 1.0)

    result = quality.contest("tiny", "BAGM", score, quick=False)
    assert result.rate == max(settings.HALF_DECADES)


def test_differences_are_those_of_pairs():
    result = quality.Result(0.1, [3.0, 5.0, 7.0])
    other = quality.Result(0.2, [2.0, 4.0, 6.0])
    assert result.minus(other) == (1.0, 0.0)
    assert result.test.error == pytest.approx(2 / 3**0.5)


@pytest.mark.parametrize("task, best", [("text", "c"), ("digits", "b")])
def test_the_best_comes_first(task, best):
    figures = {"a": math.nan, "b": 2.0, "c": 1.0}
    results = {o: quality.Result(0.1, [x]) for o, x in figures.items()}
    ranked = list(quality.ranked(task, results))
    assert (ranked[0], ranked[-1]) == (best, "a")


def test_a_second_call_goes_on(tiny, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    trained = []

    def train(run, quick):
        trained.append(run)
        if run == stop:
            raise KeyboardInterrupt
        return quality.Score(0.1, 0.2, run.rate, 1.0)

    monkeypatch.setattr(quality, "train", train)
    options = "--tasks tiny --optimizers BAGM,BAG --quick --output"
    monkeypatch.setattr(sys, "argv", ["", *options.split(), str(tmp_path)])
    rate = settings.OPTIMIZERS["BAG"].rate
    stop = quality.Run("tiny", "BAG", rate, 1)
    with pytest.raises(KeyboardInterrupt):
        quality.main()
    assert len(trained) == 4
    trained.clear()
    last, stop = stop, None
    quality.main()
    assert trained == [last]
    assert (tmp_path / "quality_quick.png").stat().st_size > 0
