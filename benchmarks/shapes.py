"""The worst case: compiled steps on shapes of rank 1 to 5, beside Keras's Adam.

    python -m benchmarks.shapes
    python -m benchmarks.shapes --shapes 3x5,1009x1013 --rounds 50

Each shape is repeated until there are four million parameters, or 64 variables.
"""

import argparse
import math

from benchmarks import contestants
from benchmarks import goals
from benchmarks import models
from benchmarks import peers
from benchmarks import report
from benchmarks import timing
from benchmarks.models import Specs

# Square, tiny, odd and prime, narrow and those of real layers.
SHAPES = (
    "1,7,64,1009,65536,1048573,"
    "1x1,3x5,31x37,64x64,127x131,512x512,1009x1013,2048x2048,"
    "1x4096,4096x1,7x50021,50021x7,768x3072,3072x768,"
    "3x5x7,31x37x41,64x64x64,768x12x64,12x64x768,13x1009x17,"
    "1x1x1x1,5x7x11x13,1x1x256x64,3x3x64x64,7x7x3x64,3x3x512x512,"
    "2x3x5x7x11,1x1x1x64x64,3x3x3x16x32,3x3x3x64x64"
)
PARAMETERS, VARIABLES = 4_000_000, 64
SCHEMES = ("variable", "output_unit")


def shapes(text: str) -> dict[str, tuple[int, ...]]:
    try:
        found = {
            name: tuple(int(n) for n in name.split("x"))
            for name in text.split(",")
        }
    except ValueError:
        raise argparse.ArgumentTypeError(f"no shapes: {text}") from None
    for name, shape in found.items():
        if min(shape) < 1 or len(shape) > 5:
            raise argparse.ArgumentTypeError(f"not of rank 1 to 5: {name}")
    return found


def repeat(shape: tuple[int, ...], variables: int) -> Specs:
    count = min(variables, math.ceil(PARAMETERS / math.prod(shape)))
    return models.repeated(shape, count)


def main() -> None:
    parser = report.make_parser(__doc__ or "", rounds=20)
    parser.add_argument(
        "--shapes", type=shapes, default=SHAPES, help="default: %(default)s"
    )
    parser.add_argument(
        "--variables",
        type=report.positive,
        default=VARIABLES,
        help="of one shape at most, default: %(default)s",
    )
    args = parser.parse_args()
    times = {}
    counts = {}
    with timing.progress_bar() as progress:
        for name, shape in args.shapes.items():
            specs = repeat(shape, args.variables)
            counts[name] = len(specs)
            arrays = models.random_arrays(specs, 0.02, seed=0)
            steps = peers.keras_steps(
                models.make_variables(specs, arrays),
                models.random_arrays(specs, 1e-3, seed=1),
                SCHEMES,
                ["compiled"],
            )
            times[name] = timing.interleave_steps(
                {contestant.name: step for contestant, step in steps.items()},
                args.rounds,
                progress,
                name,
            )
    rows = []
    ratios = {}
    bars: report.Bars = {}
    for name, values in times.items():
        seconds = timing.medians(values)
        adam = seconds.pop(contestants.ADAM)
        of_shape = {key: value / adam for key, value in seconds.items()}
        ratios.update({f"{key} {name}": r for key, r in of_shape.items()})
        rows.append(
            (
                name,
                str(counts[name]),
                f"{1000 * adam:.2f}",
                *(f"{ratio:.2f}" for ratio in of_shape.values()),
            )
        )
        worst = max(of_shape.values())
        bars[name] = (worst, f"{worst:.2f}×", True)
    columns = ("shape", "variables", "Adam, ms", *of_shape)
    title = "Compiled steps on variables of one shape, time / Keras Adam"
    report.console.print(report.make_table(title, columns, rows))
    path = args.output / "shapes.json"
    results = {"variables": counts, "seconds": times}
    report.save(path, args, results, [goals.judge(goals.SHAPES, ratios)])
    report.draw_bars(
        path.with_suffix(".png"),
        title,
        "our slowest optimizer (× Keras Adam)",
        {f"{len(bars)} shapes": bars},
    )


if __name__ == "__main__":
    main()
