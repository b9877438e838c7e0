"""Rows of variables that are smaller than those that gain from it."""

import pytest

# Not imported: without TensorFlow, nobody can.
ROWS = "keras_blockwise.execution.xla_cpu.rows"


@pytest.fixture
def cut_from(monkeypatch):
    """Sets from how many entries on a variable is cut into rows."""
    return lambda entries: monkeypatch.setattr(f"{ROWS}.LARGE", entries)


@pytest.fixture
def short_rows(monkeypatch, cut_from):
    """Cuts whatever gains from it, but for the smallest, however small."""
    monkeypatch.setattr(f"{ROWS}.SHORTEST", 1)
    monkeypatch.setattr(f"{ROWS}.LONGEST", 16)
    monkeypatch.setattr(f"{ROWS}.PER_CORE", 0)
    cut_from(1)
