"""Measurements in processes of their own."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """What a function that can be imported returns in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def dumping(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args, dump)` in a new process, where XLA writes to `dump`."""
    flags = os.environ.get("XLA_FLAGS", "")
    with tempfile.TemporaryDirectory() as dump:
        os.environ["XLA_FLAGS"] = (
            f"{flags} --xla_dump_to={dump} --xla_dump_hlo_as_text"
        )
        try:
            return alone(function, *args, dump)
        finally:
            os.environ["XLA_FLAGS"] = flags


def resident_bytes(field: str) -> int:
    """`VmRSS`, or `VmHWM`, the most since it was reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])
