"""Tables as text that is the same everywhere, and sizes that people read."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 100
PREFIXES = {1024: ["", "Ki", "Mi", "Gi", "Ti"], 1000: ["", "k", "M", "G", "T"]}


def table_of(title: str, first: str, numbers: Sequence[str]) -> Table:
    """A table without rows.

    Args:
        title: The line above it.
        first: Title of the first column, whose long cells are broken.
        numbers: Titles of the columns of numbers after it.
    """
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def lines_of(table: Table) -> list[str]:
    """The lines of a table: no colours, and no cell of a notebook."""
    console = Console(width=WIDTH, color_system=None, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    lines = (line.rstrip() for line in capture.get().splitlines())
    return [line for line in lines if line]


def to_text(num_bytes: float, base: int = 1024) -> str:
    """Bytes in a unit that people read.

    Args:
        num_bytes: How many.
        base: How many of a unit are the next one: 1024 or 1000.
    """
    *prefixes, last = PREFIXES[base]
    for prefix in prefixes:
        if num_bytes < 999.5:  # So that three digits will do.
            return f"{num_bytes:.3g} {prefix}B"
        num_bytes /= base
    return f"{num_bytes:.3g} {last}B"
