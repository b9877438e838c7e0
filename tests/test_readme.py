"""README.md: its Python runs, what it prints is there, nothing is left out."""

import re

import pytest

import keras_blockwise as kb
from helpers import pages
from helpers.cases import OPTIMIZERS

TEXT = pages.read(pages.README)


@pytest.mark.tensorflow
def test_python_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pages.code_blocks(TEXT, "python")
    pages.run_in_order(pages.README, {}, capsys)


@pytest.mark.parametrize("name", kb.__all__)
def test_mentions_every_public_name(name):
    assert re.search(rf"\bkb\.{name}\b", TEXT)


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_every_optimizer_has_a_row(cls):
    assert f"\n| `kb.{cls.__name__}` |" in TEXT


def test_can_be_read_at_once():
    assert len(TEXT.splitlines()) < 200
