"""What every command writes: a table, the goals, a JSON file and a PNG."""

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.goals import Verdict
from benchmarks.goals import as_data

PACKAGES = (
    "keras",
    "tensorflow",
    "numpy",
    "jax",
    "optax",
    "torch",
    "adam-mini",
    "bitsandbytes",
    "mnist1d",
    "scikit-learn",
    "keras-blockwise",
)
# Ours, and all others.
OUR_COLOR, OTHER_COLOR = "tab:blue", "tab:gray"

# Value, text and whether it is ours, by name.
Bars = dict[str, tuple[float, str, bool]]
# Value, standard error and whether it is ours, by name.
Dots = dict[str, tuple[float, float | None, bool]]

console = Console(width=100)


def make_parser(doc: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """The options that all commands have, or all that have rounds."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds:
        parser.add_argument(
            "--rounds",
            type=positive,
            default=rounds,
            help="default: %(default)s",
        )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder for the JSON and the PNG, default: %(default)s",
    )
    return parser


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def some_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """A type for `argparse`: names separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",") if text else []
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is not one of {','.join(choices)}"
                )
        return names

    return parse


def add_list(
    parser: argparse.ArgumentParser,
    option: str,
    choices: Sequence[str],
    default: Sequence[str] | None = None,
) -> None:
    """An option that takes some of the choices, separated by commas."""
    default = choices if default is None else default
    parser.add_argument(
        option,
        type=some_of(choices),
        default=list(default),
        help=f"some of {','.join(choices)}; default: {','.join(default)}",
    )


def environment() -> dict[str, Any]:
    """The processor, and the versions of what takes part."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "versions": versions,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [
        line.partition(":")[2].strip()
        for line in lines
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def make_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def goals_table(verdicts: Sequence[Verdict]) -> Table:
    table = make_table(
        "Goals",
        ("ratio", "must", "aim", "best", "worst", "worst of", "reached"),
        [
            (
                verdict.goal.name,
                f"{verdict.goal.must:g}",
                "" if verdict.goal.aim is None else f"{verdict.goal.aim:g}",
                f"{verdict.best:.3f}",
                f"{verdict.worst:.3f}",
                verdict.worst_name,
                verdict.word,
            )
            for verdict in verdicts
        ],
    )
    for column in table.columns[5:]:
        column.justify = "left"
    return table


def save(
    path: Path,
    args: argparse.Namespace,
    results: Any,
    verdicts: Sequence[Verdict],
) -> None:
    """Shows the goals, and writes all that was measured to a JSON file."""
    if verdicts:
        console.print(goals_table(verdicts))
    write(path, args, results, verdicts)
    console.print(f"All results: {path}, chart: {path.with_suffix('.png')}")


def write(
    path: Path,
    args: argparse.Namespace,
    results: Any,
    verdicts: Sequence[Verdict] = (),
) -> None:
    """Writes a JSON file, which is the one before until all is written."""
    arguments = {
        name: value for name, value in vars(args).items() if name != "output"
    }
    data = {
        "arguments": arguments,
        "environment": environment(),
        "results": results,
        "goals": as_data(verdicts),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data, indent=1) + "\n")
    new.replace(path)


def draw_bars(
    path: Path,
    title: str,
    label: str,
    panels: Mapping[str, Bars],
) -> None:
    """Writes a bar chart.

    Args:
        path: The image file.
        title: What stands above it.
        label: What a bar measures.
        panels: Charts by title.
    """
    from matplotlib.figure import Figure

    heights = [len(bars) + 2 for bars in panels.values()]
    figure = Figure((9, 0.8 + 0.28 * sum(heights)), layout="constrained")
    subplots = figure.subplots(
        len(panels), 1, squeeze=False, height_ratios=heights
    )
    for axes, (name, bars) in zip(subplots[:, 0], panels.items()):
        values = [value for value, _, _ in bars.values()]
        colors = [
            OUR_COLOR if ours else OTHER_COLOR for *_, ours in bars.values()
        ]
        drawn = axes.barh(list(bars), values, color=colors)
        axes.bar_label(drawn, [text for _, text, _ in bars.values()], padding=3)
        axes.set_xlim(0, 1.2 * max(values))
        axes.set_title(name, loc="left")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    subplots[-1, 0].set_xlabel(label)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def draw_dots(
    path: Path, title: str, panels: Mapping[tuple[str, str], Dots]
) -> None:
    """Writes dots with error bars, in panels side by side.

    Args:
        path: The image file.
        title: What stands above it.
        panels: Dots by what stands above them and what they measure.
    """
    from matplotlib.figure import Figure

    most = max(len(dots) for dots in panels.values())
    figure = Figure(
        (0.5 + 4.5 * len(panels), 1.5 + 0.28 * most), layout="constrained"
    )
    subplots = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ((name, label), dots) in zip(subplots, panels.items()):
        for optimizer, (value, error, ours) in dots.items():
            color = OUR_COLOR if ours else OTHER_COLOR
            axes.errorbar(
                value, optimizer, xerr=error, fmt="o", color=color, capsize=3
            )
        axes.set_title(name, loc="left")
        axes.set_xlabel(label)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def draw_curves(
    path: Path,
    title: str,
    labels: tuple[str, str],
    panels: Mapping[str, Mapping[str, Mapping[float, float]]],
) -> None:
    """Writes curves with logarithmic axes, in panels side by side.

    Args:
        path: The image file.
        title: What stands above it.
        labels: What the axes measure.
        panels: Curves by title and name: y by x.
    """
    from matplotlib.figure import Figure

    figure = Figure((1.5 + 4.5 * len(panels), 5), layout="constrained")
    subplots = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, curves) in zip(subplots, panels.items()):
        for i, (curve, points) in enumerate(curves.items()):
            axes.plot(
                list(points),
                list(points.values()),
                marker=".",
                label=curve,
                color=f"C{i}",
            )
        axes.set(title=name, xlabel=labels[0], xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    subplots[0].set_ylabel(labels[1])
    figure.legend(
        *subplots[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2 if len(panels) == 1 else 4,
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
