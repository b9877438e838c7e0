"""README.md: its Python runs, what it prints is there, nothing is left out."""

import re
import runpy

import pytest

import keras_blockwise as kb
from helpers.processes import ROOT

README = (ROOT / "README.md").read_text("utf-8")
PUBLIC_HOSTS = {"arxiv.org", "jmlr.org"}


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@pytest.mark.tensorflow
def test_python_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    assert code_blocks("python")
    for code in code_blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
        printed = re.sub(r" +$", "", capsys.readouterr().out, flags=re.M)
        assert not printed or printed in code_blocks("text"), printed
    with pytest.warns(UserWarning) as warned:
        kb.BlockAdam().build(names["transformer"].trainable_variables)
    assert [f"UserWarning: {warned[0].message}\n"] == [
        text for text in code_blocks("text") if "Warning" in text
    ]


@pytest.mark.parametrize("name", kb.__all__)
def test_mentions_every_public_name(name):
    assert re.search(rf"\bkb\.{name}\b", README)


def test_names_no_machine():
    assert set(re.findall(r"\w+://([^/)\s]+)", README)) <= PUBLIC_HOSTS
    assert not re.search(r"/(home|mnt|opt|root|tmp|Users|usr|work)/", README)
    assert not re.search(r"\b\d+\.\d+\.\d+\.\d+\b|localhost", README)


def test_the_tables_of_the_transformer_are_those_that_are_printed(capsys):
    example = runpy.run_path(ROOT / "examples" / "blocks.py")
    example["main"]()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 4
    for table in tables:
        assert f"```text\n{table}\n```" in README
