"""Training that is killed again and again ends as if it had not been."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from helpers.processes import ROOT
from helpers.processes import run_python
from workers import killed as worker

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]
EXAMPLE = ROOT / "examples" / "resume.py"


def test_killed_many_times(tmp_path):
    run_python("-m", "workers.killed", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    steps = worker.STEPS
    assert report["whole"] == {"first": 0, "last": steps, "status": 0}
    killed = report["killed"]
    assert len(killed) == worker.KILLS
    assert {run["status"] for run in killed} == {-signal.SIGKILL}
    # It goes on from the last backup or, if that is torn, the one before. That
    # may be of one step more than it told of: the backup of a step comes first.
    runs = [*killed, report["end"]]
    for before, after in zip(runs, runs[1:]):
        assert before["last"] <= steps
        assert after["first"] <= before["last"] + 1
        assert after["first"] >= before["first"] - 4
    assert report["end"]["first"] > worker.STEPS_PER_EPOCH
    assert report["end"]["last"] == steps
    assert report["end"]["status"] == 0
    ends = [
        np.load(tmp_path / kind / "end.npz") for kind in ("whole", "killed")
    ]
    assert ends[0].files == ends[1].files
    for name in ends[0].files:
        np.testing.assert_array_equal(ends[0][name], ends[1][name])


def test_example(tmp_path):
    command = [sys.executable, "-u", str(EXAMPLE), "--epochs", "3"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as first:
        printed = iter(first.stdout.readline, "")
        assert "From step 0 of 120\n" in printed
        assert any("Epoch 3/3" in line for line in printed)
        first.kill()
    assert (tmp_path / "resume.keras").exists()
    # A file that was being written at the kill.
    (tmp_path / "unfinished.keras").write_bytes(b"PK")
    second = subprocess.run(
        command, cwd=tmp_path, capture_output=True, check=True, text=True
    )
    assert "From step 80 of 120\n" in second.stdout
    assert "Epoch 3/3" in second.stdout
    assert "Epoch 2/3" not in second.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["resume.keras"]
