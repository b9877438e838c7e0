"""Interleaved measurement: every contestant in every round, in random order."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import NamedTuple
from typing import TypeVar

import numpy as np
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.progress import TimeRemainingColumn

Key = TypeVar("Key")

# A sample of a short step is the mean of as many calls as take this long.
SAMPLE_SECONDS = 0.01


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def seconds_per_call(step: Callable[[], object], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def sampler(step: Callable[[], object]) -> Callable[[], float]:
    """A function that takes a step and tells the seconds of a call."""
    calls = 0

    def sample() -> float:
        nonlocal calls
        if not calls:
            step()  # Traces and compiles.
            step()
            calls = math.ceil(SAMPLE_SECONDS / seconds_per_call(step))
        step()  # The threads of the contestant before come to rest.
        return seconds_per_call(step, calls)

    return sample


def interleave(
    samples: Mapping[Key, Callable[[], float]],
    rounds: int,
    progress: Progress,
    title: str,
) -> dict[Key, list[float]]:
    """What each function returns, once per round; the first call is left out.

    Args:
        samples: Functions that measure something once.
        rounds: How often.
        progress: Shows how far it is.
        title: What stands there.
    """
    values: dict[Key, list[float]] = {key: [] for key in samples}
    task = progress.add_task(
        f"{title}, first calls", total=len(samples) * (rounds + 1)
    )
    for sample in samples.values():
        sample()
        progress.advance(task)
    progress.update(task, description=f"{title}, {rounds} rounds")
    order = list(samples)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # Else a collection walks through every traced graph.
    for _ in range(rounds):
        shuffle(order)
        for key in order:
            values[key].append(samples[key]())
            progress.advance(task)
    gc.unfreeze()
    return values


def interleave_steps(
    steps: Mapping[Key, Callable[[], object]],
    rounds: int,
    progress: Progress,
    title: str,
) -> dict[Key, list[float]]:
    """Seconds per call of each step, once per round."""
    samples = {key: sampler(step) for key, step in steps.items()}
    return interleave(samples, rounds, progress, title)


def medians(times: Mapping[Key, list[float]]) -> dict[Key, float]:
    return {key: statistics.median(values) for key, values in times.items()}


def spread(values: list[float]) -> str:
    """Half the distance of the quartiles, in percent of the median."""
    if len(values) < 2:
        return ""
    first, middle, third = statistics.quantiles(values, method="inclusive")
    return f"{(third - first) / 2 / middle:.0%}"


class Estimate(NamedTuple):
    """A mean, and its standard error: `None` if there was but one value."""

    mean: float
    error: float | None

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.error:.3f}"


def estimate(values: Sequence[float]) -> Estimate:
    error = None
    if len(values) > 1:
        # `statistics.stdev` takes no NaN.
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), error)


def ratio(values: Sequence[float], divisors: Sequence[float]) -> Estimate:
    """What each value is of its divisor, in the mean."""
    return estimate([x / y for x, y in zip(values, divisors, strict=True)])
