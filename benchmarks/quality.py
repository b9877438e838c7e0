"""How well small models learn real data with each optimizer, on a CPU.

    python -m benchmarks.quality
    python -m benchmarks.quality --tasks text --optimizers "Keras Adam,BAGM"

Three tasks: the characters of Python's own documentation (a transformer),
MNIST-1D (a convolutional network) and scikit-learn's digits (a multilayer
perceptron). Every optimizer trains with three learning rates, and with others
until the one that does best on the validation part has a worse one on either
side; that one trains with fresh seeds, and what it reaches on the test part
counts. A seed sets the first weights and the order of the data, which
are the same for all optimizers, so the differences to Keras's Adam are those of
pairs. All have the same schedule: 20 steps of warm-up, then a cosine.

Every run that has ended is in the JSON file, and is not done again by the next
call. `--quick` tries the command, with a file of its own.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from typing import NamedTuple

import keras
import numpy as np

from benchmarks import contestants
from benchmarks import report
from benchmarks import timing
from benchmarks.settings import OPTIMIZERS
from benchmarks.settings import Setting
from benchmarks.tasks import TASKS
from benchmarks.tasks import Data
from benchmarks.tasks import Part
from benchmarks.tasks import Task

# The first chooses the learning rate, the others judge.
SEEDS = (0, 1, 2, 3)
QUICK_STEPS = 4


class Run(NamedTuple):
    """What a model is trained with."""

    task: str
    optimizer: str
    rate: float
    seed: int


class Score(NamedTuple):
    """The figures of a trained model, and what tells equal ones apart."""

    validation: float
    validation_loss: float
    test: float
    seconds: float


class Result(NamedTuple):
    """What an optimizer reaches on the test part, seed by seed."""

    rate: float
    figures: list[float]

    @property
    def test(self) -> timing.Estimate:
        return timing.estimate(self.figures)

    def minus(self, other: "Result") -> timing.Estimate:
        pairs = zip(self.figures, other.figures, strict=True)
        return timing.estimate([x - y for x, y in pairs])


# By optimizer.
Results = dict[str, Result]


@functools.cache
def load(task: str) -> Data:
    return TASKS[task].load()


def train(
    run: Run, quick: bool = False, setting: Setting | None = None
) -> Score:
    """Trains a new model with a new optimizer, that of its name by default."""
    task, data = TASKS[run.task], load(run.task)
    setting = setting or OPTIMIZERS[run.optimizer]
    if quick:
        task = replace(task, steps=QUICK_STEPS)
    start = time.perf_counter()
    keras.utils.clear_session()
    keras.utils.set_random_seed(run.seed)
    model = task.make_model(data.classes)
    model.compile(
        optimizer=setting.make(model, run.rate, task.steps),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"] if task.accuracy else [],
    )
    rng = np.random.default_rng(run.seed)
    x, y = data.draw(rng, task.steps * task.batch)
    # `fit` of TensorFlow may wait a minute for its pipeline to end.
    for batch in np.split(np.arange(len(x)), task.steps):
        model.train_on_batch(x[batch], y[batch])

    def measure(part: Part) -> tuple[float, float]:
        found = model.evaluate(*part, 100, verbose=0, return_dict=True)
        loss = found["loss"]
        return (100 * found["accuracy"] if task.accuracy else loss), loss

    return Score(
        *measure(data.validation),
        test=measure(data.test)[0],
        seconds=time.perf_counter() - start,
    )


class Log:
    """The runs that have ended, in a JSON file that is written after each.

    Args:
        path: The file. What it has already is not done again.
        args: The options of the command.
    """

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.path = path
        self.args = args
        self.scores: dict[Run, Score] = {}
        if path.exists():
            for row in json.loads(path.read_text())["results"]:
                run = Run(*(row[name] for name in Run._fields))
                self.scores[run] = Score(*(row[name] for name in Score._fields))

    def add(self, run: Run, score: Score) -> None:
        self.scores[run] = score
        report.write(self.path, self.args, self.rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [
            {**run._asdict(), **score._asdict()}
            for run, score in self.scores.items()
        ]


def goodness(task: Task, figure: float) -> float:
    """More is better; what has diverged is the worst."""
    if math.isnan(figure):
        return -math.inf
    return figure if task.accuracy else -figure


def best_rate(task: Task, scores: Mapping[float, Score]) -> float:
    """The learning rate that does best on the validation part."""

    def key(rate: float) -> tuple[float, float]:
        score = scores[rate]
        return goodness(task, score.validation), -score.validation_loss

    return max(scores, key=key)


def choose(task: str, optimizer: str, score: Callable[[Run], Score]) -> float:
    """A learning rate that has a worse one on either side."""
    setting = OPTIMIZERS[optimizer]
    rates, best = setting.rates, setting.rates.index(setting.rate)
    while 0 < best < len(rates) - 1:
        middle = best
        tried = {
            rate: score(Run(task, optimizer, rate, SEEDS[0]))
            for rate in rates[middle - 1 : middle + 2]
        }
        best = rates.index(best_rate(TASKS[task], tried))
        if best == middle:
            break
    return rates[best]


def contest(
    task: str, optimizer: str, score: Callable[[Run], Score], quick: bool
) -> Result:
    """Chooses a learning rate, and trains with it from fresh seeds."""
    rate, seeds = OPTIMIZERS[optimizer].rate, SEEDS[1:]
    if quick:
        score(Run(task, optimizer, rate, SEEDS[0]))
        seeds = seeds[:1]
    else:
        rate = choose(task, optimizer, score)
    runs = [Run(task, optimizer, rate, seed) for seed in seeds]
    return Result(rate, [score(run).test for run in runs])


def contest_all(args: argparse.Namespace, log: Log) -> dict[str, Results]:
    """The results by task, the best optimizer first."""
    results: dict[str, Results] = {}
    with timing.progress_bar() as progress:
        bar = progress.add_task(
            "", total=len(args.tasks) * len(args.optimizers)
        )

        def score(run: Run) -> Score:
            text = f"{run.task}, {run.optimizer}, {run.rate:g}, seed {run.seed}"
            progress.update(bar, description=text)
            if run not in log.scores:
                log.add(run, train(run, args.quick))
            return log.scores[run]

        for task in args.tasks:
            results[task] = {}
            for optimizer in args.optimizers:
                result = contest(task, optimizer, score, args.quick)
                results[task][optimizer] = result
                progress.advance(bar)
    return {task: ranked(task, found) for task, found in results.items()}


def ranked(task: str, results: Results) -> Results:
    def key(optimizer: str) -> float:
        return goodness(TASKS[task], results[optimizer].test.mean)

    return {name: results[name] for name in sorted(results, key=key)[::-1]}


def rows_of(results: Results) -> list[tuple[str, ...]]:
    adam = results.get(contestants.ADAM)
    return [
        (
            optimizer,
            f"{result.rate:g}",
            str(result.test),
            str(result.minus(adam)) if adam and result is not adam else "",
        )
        for optimizer, result in results.items()
    ]


def main() -> None:
    parser = report.make_parser(__doc__ or "")
    report.add_list(parser, "--tasks", tuple(TASKS))
    report.add_list(parser, "--optimizers", tuple(OPTIMIZERS))
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_STEPS} steps, one learning rate and one seed",
    )
    args = parser.parse_args()
    name = "quality_quick" if args.quick else "quality"
    path = args.output / f"{name}.json"
    log = Log(path, args)
    results = contest_all(args, log)
    panels: dict[tuple[str, str], report.Dots] = {}
    for task, found in results.items():
        title, figure = TASKS[task].title, TASKS[task].figure
        columns = ("optimizer", "learning rate", "test", "- Keras Adam")
        report.console.print(
            report.make_table(f"{title}, {figure}", columns, rows_of(found))
        )
        panels[title, figure] = {
            optimizer: (*result.test, OPTIMIZERS[optimizer].is_ours)
            for optimizer, result in found.items()
        }
    report.save(path, args, log.rows, [])
    report.draw_dots(
        path.with_suffix(".png"),
        "Mean of fresh seeds with its standard error",
        panels,
    )


if __name__ == "__main__":
    main()
