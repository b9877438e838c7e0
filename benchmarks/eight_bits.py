"""How well models learn with a momentum in 8 bits, beside one in float32.

    python -m benchmarks.eight_bits

Two tasks of `benchmarks.quality`, with the learning rates that it found best,
and with more momentum than the default. Both kinds of momentum begin with the
same weights and see the same data, so their differences are those of pairs.
Every run that has ended is in the JSON file, and is not done again.
"""

import argparse
from dataclasses import replace
from typing import Any
from typing import NamedTuple

from benchmarks import goals
from benchmarks import quality
from benchmarks import report
from benchmarks import timing
from benchmarks.settings import OPTIMIZERS
from benchmarks.settings import Setting
from benchmarks.tasks import TASKS

# By optimizer: the name of its decay rate, and the learning rate of each task.
RATES = {
    "BlockAdam": ("beta_1", {"text": 1e-2, "digits": 3e-3}),
    "BAGM": ("momentum", {"text": 1e-3, "digits": 1e-3}),
    "AdamMini": ("beta_1", {"text": 1e-2, "digits": 1e-2}),
}
DECAYS = (0.9, 0.95, 0.99)
GOALS = {"text": goals.TEXT_IN_8_BITS, "digits": goals.DIGITS_IN_8_BITS}


class Pair(NamedTuple):
    """Two runs that differ in the dtype of the momentum alone."""

    task: str
    optimizer: str
    decay: float

    @property
    def name(self) -> str:
        return f"{self.optimizer} {RATES[self.optimizer][0]}={self.decay}"

    @property
    def rate(self) -> float:
        rate = RATES[self.optimizer][1][self.task]
        # The momentum of BAGM is a sum, of 1 / (1 - decay) terms.
        is_sum = self.optimizer == "BAGM"
        return rate * (1 - self.decay) / (1 - DECAYS[0]) if is_sum else rate

    def setting(self, dtype: str) -> Setting:
        argument, _ = RATES[self.optimizer]
        arguments = {argument: self.decay, "momentum_dtype": dtype}
        return replace(OPTIMIZERS[self.optimizer], arguments=arguments)

    def run(self, dtype: str, seed: int) -> quality.Run:
        name = f"{self.name} {dtype}"
        return quality.Run(self.task, name, self.rate, seed)


def compare(
    args: argparse.Namespace, log: quality.Log
) -> dict[Pair, dict[str, list[float]]]:
    """The figures of each pair, seed by seed, by the dtype of the momentum."""
    pairs = [
        Pair(task, optimizer, decay)
        for task in args.tasks
        for optimizer in args.optimizers
        for decay in DECAYS
    ]
    seeds = quality.SEEDS[1:2] if args.quick else quality.SEEDS[1:]
    figures: dict[Pair, dict[str, list[float]]] = {}
    with timing.progress_bar() as progress:
        for pair in progress.track(pairs):
            figures[pair] = {"float32": [], "int8": []}
            for dtype, found in figures[pair].items():
                for seed in seeds:
                    run = pair.run(dtype, seed)
                    if run not in log.scores:
                        setting = pair.setting(dtype)
                        log.add(run, quality.train(run, args.quick, setting))
                    found.append(log.scores[run].test)
    return figures


def estimates(figures: dict[str, list[float]]) -> list[timing.Estimate]:
    """Of float32, of int8, and of how much worse the latter is."""
    pairs = list(zip(figures["float32"], figures["int8"], strict=True))
    return [
        timing.estimate([x for x, _ in pairs]),
        timing.estimate([y for _, y in pairs]),
        timing.estimate([y - x for x, y in pairs]),
    ]


def main() -> None:
    parser = report.make_parser(__doc__ or "")
    report.add_list(parser, "--tasks", tuple(GOALS))
    report.add_list(parser, "--optimizers", tuple(RATES))
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{quality.QUICK_STEPS} steps, and one seed",
    )
    args = parser.parse_args()
    name = "eight_bits_quick" if args.quick else "eight_bits"
    path = args.output / f"{name}.json"
    log = quality.Log(path, args)
    found = {pair: estimates(f) for pair, f in compare(args, log).items()}
    verdicts = []
    for task in args.tasks:
        own = {p.name: e for p, e in found.items() if p.task == task}
        columns = ("optimizer", "float32", "int8", "difference")
        rows: list[tuple[Any, ...]] = [
            (name, *map(str, three)) for name, three in own.items()
        ]
        title = f"{TASKS[task].title}, {TASKS[task].figure}"
        report.console.print(report.make_table(title, columns, rows))
        sign = -1 if TASKS[task].accuracy else 1
        worse = {name: sign * three[2].mean for name, three in own.items()}
        verdicts.append(goals.judge(GOALS[task], worse))
    report.save(path, args, log.rows, verdicts)


if __name__ == "__main__":
    main()
