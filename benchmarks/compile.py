"""The first call, which traces and compiles, beside Keras's Adam.

    python -m benchmarks.compile
    python -m benchmarks.compile --models resnet50 --counts 10,100

The counts are of variables of 16 x 16 entries, which show whether the time
grows faster than their number. `build`, which makes the state variables, is
timed by itself, so that no work hides there.

Then come the first steps of a process, by default of applications of Keras: see
`first_steps`.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from benchmarks import first_steps
from benchmarks import goals
from benchmarks import models
from benchmarks import peers
from benchmarks import report
from benchmarks import timing
from benchmarks.first_steps import OPTIMIZERS
from benchmarks.models import Specs

COUNTS = "10,30,100,300,1000"


def counts(text: str) -> list[int]:
    return [report.positive(number) for number in text.split(",") if number]


def first_call(
    make_optimizer: Callable[[], Any], variables: Any, gradients: Any
) -> tuple[float, float]:
    """Seconds of `build` and of the first compiled step."""
    optimizer = make_optimizer()
    start = time.perf_counter()
    optimizer.build(variables)
    built = time.perf_counter()
    peers.keras_step(optimizer, variables, gradients, "compiled")()
    end = time.perf_counter()
    del optimizer
    gc.collect()
    return built - start, end - built


def measure(specs: Specs, rounds: int, progress: Any, title: str) -> Any:
    """Seconds of `build` and of the first step, by optimizer."""
    arrays = models.random_arrays(specs, 0.02, seed=0)
    variables = models.make_variables(specs, arrays)
    gradients = [tf.constant(array) for array in arrays]
    task = progress.add_task(title, total=rounds * len(OPTIMIZERS))
    results: dict[str, Any] = {
        name: {"build": [], "first call": []} for name in OPTIMIZERS
    }
    names = list(OPTIMIZERS)
    for i in range(rounds):
        for name in names[i % 3 :] + names[: i % 3]:
            build, call = first_call(OPTIMIZERS[name], variables, gradients)
            results[name]["build"].append(build)
            results[name]["first call"].append(call)
            progress.advance(task)
    return results


def judge(results: dict[str, Any], numbers: list[int]) -> list[goals.Verdict]:
    calls = {
        case: timing.medians(
            {name: r["first call"] for name, r in result.items()}
        )
        for case, result in results.items()
    }
    ratios = {
        f"{name}, {case}": calls[case][name] / calls[case][peers.ADAM]
        for case in calls
        for name in peers.OURS
    }
    verdicts = [goals.judge(goals.FIRST_CALL, ratios)]
    if len(numbers) > 1:
        *_, fewer, most = sorted(numbers)
        last, middle = calls[of_count(most)], calls[of_count(fewer)]
        growth = {
            name: last[name] / middle[name] / (most / fewer)
            for name in peers.OURS
        }
        verdicts.append(goals.judge(goals.LINEAR, growth))
    return verdicts


def of_count(count: int) -> str:
    return f"{count} variables"


def main() -> None:
    parser = report.make_parser(__doc__ or "", rounds=3)
    report.add_list(
        parser, "--models", tuple(models.MODELS), tuple(models.MODELS)[:-1]
    )
    parser.add_argument(
        "--counts", type=counts, default=COUNTS, help="default: %(default)s"
    )
    report.add_list(
        parser,
        "--networks",
        first_steps.NETWORKS,
        first_steps.NETWORKS[:-1],
    )
    args = parser.parse_args()
    cases = {name: models.MODELS[name]() for name in args.models}
    for count in args.counts:
        cases[of_count(count)] = models.repeated((16, 16), count)
    with timing.progress_bar() as progress:
        # What the first compilation of a process costs belongs to nobody.
        measure(models.MODELS["tiny"](), 1, progress, "warm-up")
        results = {
            case: measure(specs, args.rounds, progress, case)
            for case, specs in cases.items()
        }
        firsts = first_steps.cases_of(args.networks)
        numbers = first_steps.measure(firsts, progress)
    rows = []
    panels: dict[str, report.Bars] = {}
    for case, result in results.items():
        adam = timing.medians(result[peers.ADAM])
        panels[case] = {}
        for name in OPTIMIZERS:
            seconds = timing.medians(result[name])
            ratio = seconds["first call"] / adam["first call"]
            rows.append(
                (
                    case,
                    name,
                    f"{seconds['first call']:.2f}",
                    f"{ratio:.2f}",
                    f"{seconds['build']:.2f}",
                    f"{seconds['build'] / adam['build']:.2f}",
                )
            )
            panels[case][name] = (
                seconds["first call"],
                f"{ratio:.2f}×",
                name in peers.OURS,
            )
    title = "First calls"
    columns = (
        "variables of",
        "optimizer",
        "first call, s",
        "/ Adam",
        "build, s",
        "/ Adam",
    )
    report.console.print(report.make_table(title, columns, rows))
    path = args.output / "compile.json"
    verdicts = judge(results, args.counts)
    if firsts:
        report.console.print(first_steps.make_table(numbers))
        verdicts += first_steps.judge(firsts, numbers)
    report.save(path, args, {**results, "first steps": numbers}, verdicts)
    report.draw_bars(
        path.with_suffix(".png"),
        title,
        "median seconds of a first call (× Keras Adam)",
        panels,
    )


if __name__ == "__main__":
    main()
