"""Tests that need another process."""

import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


def run_python(*arguments):
    """What a new Python prints, which finds `helpers` and `workers`."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        check=False,
        cwd=TESTS,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_script(script, *arguments):
    """What it prints: a line of JSON, with a list, for each result."""
    lines = run_python("-c", script, *arguments).splitlines()
    return [json.loads(line) for line in lines if line.startswith("[")]
