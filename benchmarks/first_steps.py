"""The first steps of a process, and many models in one, beside Keras's Adam.

`python -m benchmarks.compile` prints them. Every optimizer is used as it is by
default, in a process of its own for each case. Seconds are those of the
processor, which other processes change least.
"""

import time
import warnings
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from rich.progress import Progress
from rich.table import Table

import keras_blockwise as kb
from benchmarks import fit
from benchmarks import goals
from benchmarks import models
from benchmarks import peers
from benchmarks import processes
from benchmarks import report
from benchmarks.goals import Goal

# The blocks that are chosen by default do not matter here.
warnings.filterwarnings("ignore", "Names and shapes allow more than one")
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    peers.ADAM: keras.optimizers.Adam,
    "BlockAdam": kb.BlockAdam,
    "BAGM": kb.BAGM,
}
NETWORKS = ("MobileNetV2", "EfficientNetB0", "tiny")
# By title and optimizer.
Results = dict[str, dict[str, dict[str, float]]]
EQUAL_MODELS = 10
LAYERS, STEPS = 12, 10
SHAPES = 300


def make_model(network: str) -> keras.Model:
    if network == "tiny":
        return fit.tiny()
    return getattr(keras.applications, network)(
        weights=None, input_shape=(32, 32, 3), classes=10
    )


def variables_of(specs: models.Specs) -> list[Any]:
    arrays = models.random_arrays(specs, 0.02, seed=0)
    return models.make_variables(specs, arrays)


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of the processor, on all cores together."""
    start = time.process_time()
    function()
    return time.process_time() - start


def step(optimizer: Any, variables: Any) -> None:
    optimizer.apply([tf.ones_like(v) for v in variables], variables)


def first_step(optimizer: str, network: str) -> dict[str, float]:
    """The first step of a network that `apply` takes by itself."""
    variables = make_model(network).trainable_variables
    own = OPTIMIZERS[optimizer]()
    own.build(variables)
    return {"seconds": seconds_of(lambda: step(own, variables))}


def many_shapes(optimizer: str, _: str) -> dict[str, float]:
    """The first step of variables of which no two have one shape."""
    specs = [(f"dense_{n}/kernel", (16, n)) for n in range(1, SHAPES + 1)]
    variables = variables_of(specs)
    own = OPTIMIZERS[optimizer]()
    own.build(variables)
    return {"seconds": seconds_of(lambda: step(own, variables))}


def other_layers(optimizer: str, _: str) -> dict[str, float]:
    """Steps of which each has gradients for other layers."""
    layers = [
        variables_of(models.dense(f"dense_{i}", 8, 8)) for i in range(LAYERS)
    ]
    own = OPTIMIZERS[optimizer]()
    own.build([v for layer in layers for v in layer])
    rng = np.random.default_rng(0)

    def steps() -> None:
        for _ in range(STEPS):
            some = rng.permutation(LAYERS)[: LAYERS * 3 // 4]
            step(own, [v for i in some for v in layers[i]])

    return {"seconds": seconds_of(steps)}


def first_fit(optimizer: str, network: str) -> dict[str, float]:
    """All of a process that trains for a few batches."""
    model = make_model(network)
    model.compile(
        optimizer=OPTIMIZERS[optimizer](),
        loss=keras.losses.SparseCategoricalCrossentropy(),
    )
    model.fit(*fit.data_for(model, batches=4), fit.BATCH, verbose=0)
    return {
        "seconds": time.process_time(),
        "bytes": processes.resident_bytes("VmHWM"),
    }


def equal_models(optimizer: str, network: str, dump: str) -> dict[str, float]:
    """The memory of a process that takes a step of each of ten equal models.

    And how many programs XLA compiles there, which it writes to `dump`.
    """
    peaks = []
    for _ in range(EQUAL_MODELS):
        first_step(optimizer, network)
        keras.backend.clear_session()
        peaks.append(processes.resident_bytes("VmHWM"))
    programs = Path(dump).glob("*after_optimizations.txt")
    return {
        "bytes": peaks[-1],
        "growth": peaks[-1] - peaks[1],
        "programs": len(list(programs)),
    }


class Case(NamedTuple):
    """What is measured.

    Args:
        title: What the table calls it.
        function: `(optimizer, network) -> numbers` by name.
        network: The argument of that name.
        goals: By the name of the number that is divided by that of Adam.
    """

    title: str
    function: Callable[..., dict[str, float]]
    network: str
    goals: dict[str, Goal]


def cases_of(networks: Sequence[str]) -> list[Case]:
    """A `fit` of every network; what else there is, of the first of them."""
    first_goals = {"seconds": goals.FIRST_STEP}
    fit_goals = {"seconds": goals.FIRST_FIT, "bytes": goals.FIRST_FIT_BYTES}
    equal_goals = {"bytes": goals.EQUAL_MODELS, "programs": goals.NO_PROGRAM}
    fits = [
        Case(f"first fit, {name}", first_fit, name, fit_goals)
        for name in networks
    ]
    return [
        case
        for name in networks[:1]
        for case in (
            Case(f"first step, {name}", first_step, name, first_goals),
            Case(f"first step, {SHAPES} shapes", many_shapes, "", first_goals),
            Case(
                "steps of other layers",
                other_layers,
                "",
                {"seconds": goals.OTHER_LAYERS},
            ),
            *fits,
            Case(
                f"{EQUAL_MODELS} equal models, {name}",
                equal_models,
                name,
                equal_goals,
            ),
        )
    ]


def measure(cases: Sequence[Case], progress: Progress) -> Results:
    """The numbers of each case, by title and optimizer."""
    pairs = [(case, name) for case in cases for name in OPTIMIZERS]
    results: Results = {case.title: {} for case in cases}
    for case, name in progress.track(pairs, description="first steps"):
        run = processes.alone
        if "programs" in case.goals:  # To write them takes time.
            run = processes.dumping
        results[case.title][name] = run(case.function, name, case.network)
    return results


def judge(cases: Sequence[Case], results: Results) -> list[goals.Verdict]:
    ratios: dict[Goal, dict[str, float]] = {}
    for case in cases:
        found = results[case.title]
        for number, goal in case.goals.items():
            for name in peers.OURS:
                value = found[name][number]
                if goal is not goals.NO_PROGRAM:
                    value /= found[peers.ADAM][number]
                ratios.setdefault(goal, {})[f"{name}, {case.title}"] = value
    return [goals.judge(goal, values) for goal, values in ratios.items()]


def make_table(results: Results) -> Table:
    rows = []
    for title, found in results.items():
        adam = found[peers.ADAM]
        for name, numbers in found.items():
            cells = []
            for number, text in (("seconds", "{:.1f}"), ("bytes", "{:.0f}")):
                if number in numbers:
                    unit = 1e6 if number == "bytes" else 1
                    cells.append(text.format(numbers[number] / unit))
                    cells.append(f"{numbers[number] / adam[number]:.2f}")
                else:
                    cells += ["", ""]
            if "programs" in numbers:
                cells.append(f"{numbers['growth'] / 1e6:.0f}")
                cells.append(str(numbers["programs"]))
            rows.append((title, name, *cells))
    columns = (
        "first steps",
        "optimizer",
        "s",
        "/ Adam",
        "MB",
        "/ Adam",
        "grown",
        "compiled",
    )
    table = report.make_table("First steps", columns, rows)
    table.caption = (
        "s: of the processor; MB: of the process; grown: from the second model "
        "to the last, MB; compiled: programs, by XLA"
    )
    return table
