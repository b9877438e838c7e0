"""What a step costs with ever more parameters, variables or replicas.

    python -m benchmarks.scaling --over parameters
    python -m benchmarks.scaling --over variables
    python -m benchmarks.scaling --over replicas --model gpt2

Always beside Keras's Adam. Over parameters there are 16 square variables; over
variables, each has 100 entries. Replicas are logical devices of one processor
under `MirroredStrategy`, with the variables of a model.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from benchmarks import contestants
from benchmarks import goals
from benchmarks import models
from benchmarks import peers
from benchmarks import report
from benchmarks import timing
from benchmarks.contestants import Contestant
from benchmarks.models import Specs

SIDES = (8, 25, 79, 250, 790, 2500)
COUNTS = (10, 30, 100, 200, 500, 1000)
REPLICAS = (1, 2)

Steps = dict[Contestant, Callable[[], object]]


def local_steps(specs: Specs, schemes: list[str], modes: list[str]) -> Steps:
    arrays = models.random_arrays(specs, 0.02, seed=0)
    variables = models.make_variables(specs, arrays)
    return peers.keras_steps(variables, arrays, schemes, modes)


def mirrored_step(optimizer: Any, gradients: Any, strategy: Any) -> Any:
    @tf.function(autograph=False)
    def step() -> None:
        strategy.run(lambda: optimizer.apply(gradients))

    return step


def mirrored_steps(specs: Specs, schemes: list[str], replicas: int) -> Steps:
    """A step applies one gradient to the variables of all replicas."""
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)]
    )
    arrays = models.random_arrays(specs, 0.02, seed=0)
    gradients = [tf.constant(array) for array in arrays]
    steps: Steps = {}
    with strategy.scope():
        variables = models.make_variables(specs, arrays)
        optimizers = {contestants.ADAM: keras.optimizers.Adam(1e-3)}
        optimizers.update(peers.our_optimizers(schemes))
        for name, optimizer in optimizers.items():
            optimizer.build(variables)
            step = mirrored_step(optimizer, gradients, strategy)
            steps[Contestant(name, "graph")] = step
    return steps


def make_cases(args: Any) -> dict[int, Callable[[], Steps]]:
    """What makes the contestants of each point of the curves."""
    if args.over == "replicas":
        specs = models.MODELS[args.model]()
        return {
            n: lambda n=n: mirrored_steps(specs, args.schemes, n)
            for n in REPLICAS
        }
    if args.over == "variables":
        cases = {n: models.repeated((100,), n) for n in COUNTS}
    else:
        cases = {16 * n**2: models.repeated((n, n), 16) for n in SIDES}
    cases = {n: specs for n, specs in cases.items() if n <= args.most}
    return {
        n: lambda specs=specs: local_steps(specs, args.schemes, args.modes)
        for n, specs in cases.items()
    }


def judge(
    over: str, seconds: dict[int, dict[Contestant, float]]
) -> list[goals.Verdict]:
    judged = {"variables": (200, goals.MANY), "replicas": (2, goals.REPLICAS)}
    if over not in judged or judged[over][0] not in seconds:
        return []
    number, goal = judged[over]
    at = seconds[number]
    ratios = {
        f"{c.name}, {c.mode}": at[c] / at[Contestant(contestants.ADAM, c.mode)]
        for c in at
        if c.is_ours
    }
    return [goals.judge(goal, ratios)]


def main() -> None:
    parser = report.make_parser(__doc__ or "", rounds=30)
    parser.add_argument(
        "--over",
        choices=("parameters", "variables", "replicas"),
        default="variables",
        help="default: %(default)s",
    )
    report.add_list(parser, "--schemes", peers.SCHEMES)
    report.add_list(parser, "--modes", peers.MODES)
    parser.add_argument(
        "--most",
        type=report.positive,
        default=100_000_000,
        help="parameters or variables, default: %(default)s",
    )
    parser.add_argument(
        "--model",
        choices=models.MODELS,
        default="resnet50",
        help="of the replicas, default: %(default)s",
    )
    args = parser.parse_args()
    if args.over == "replicas":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * max(REPLICAS)
        )
    times = {}
    with timing.progress_bar() as progress:
        for number, make in make_cases(args).items():
            times[number] = timing.interleave_steps(
                make(), args.rounds, progress, f"{number:,} {args.over}"
            )
    seconds = {number: timing.medians(t) for number, t in times.items()}
    rows = []
    results = []
    curves: dict[str, dict[str, dict[float, float]]] = {}
    bars: dict[str, report.Bars] = {}
    for number, values in seconds.items():
        panel = bars.setdefault(f"{number} {args.over}", {})
        for contestant, value in values.items():
            name, mode = contestant
            ratio = value / values[Contestant(contestants.ADAM, mode)]
            samples = times[number][contestant]
            rows.append(
                (
                    f"{number:,}",
                    name,
                    mode,
                    f"{1000 * value:.3f}",
                    timing.spread(samples),
                    f"{ratio:.2f}",
                )
            )
            results.append(
                {
                    args.over: number,
                    "name": name,
                    "mode": mode,
                    "median seconds": value,
                    "seconds": samples,
                }
            )
            curve = curves.setdefault(mode, {}).setdefault(name, {})
            curve[number] = 1000 * value
            panel[name] = (1000 * value, f"{ratio:.2f}×", contestant.is_ours)
    stem = f"scaling_{args.over}"
    title = f"One step over the number of {args.over}"
    if args.over == "replicas":
        stem += f"_{args.model}"
        title += f", {args.model}"
    columns = (args.over, "optimizer", "mode", "ms", "±", "/ Adam")
    report.console.print(report.make_table(title, columns, rows))
    path = args.output / f"{stem}.json"
    report.save(path, args, results, judge(args.over, seconds))
    image = path.with_suffix(".png")
    label = "median milliseconds per step"
    if args.over == "replicas":
        report.draw_bars(image, title, f"{label} (× Keras Adam)", bars)
    else:
        report.draw_curves(image, title, (args.over, label), curves)


if __name__ == "__main__":
    main()
