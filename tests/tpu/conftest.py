"""Prints what the TPU compiler says of the memory of each program."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import programs
import pytest


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    if programs.TABLE:
        terminalreporter.section("memory on one core of a TPU v5e, in bytes")
        for line in programs.table_lines():
            terminalreporter.write_line(line)
