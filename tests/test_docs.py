"""docs/: its Python runs, its pictures and tables are what a program makes."""

import re
import runpy
import textwrap
from configparser import ConfigParser

import pytest

import keras_blockwise as kb
from helpers import pages
from helpers.cases import OPTIMIZERS
from helpers.cases import SCHEMES
from helpers.processes import ROOT
from keras_blockwise.algorithm import step

PUBLIC_HOSTS = {"arxiv.org", "jmlr.org"}
WITH_README = [pages.README, *pages.PAGES]
each_page = pytest.mark.parametrize("path", WITH_README, ids=lambda p: p.name)
WITH_PYTHON = [path for path in pages.PAGES if "```python" in pages.read(path)]


def first_model():
    """The names that all pages but the first go on from."""
    text = pages.read(pages.DOCS / "index.md")
    names = {}
    for code in pages.code_blocks(text, "python"):
        exec(compile(code, "index.md", "exec"), names)
        if "model" in names:
            return names


@pytest.mark.tensorflow
@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda p: p.name)
def test_python_runs_in_order(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {} if path.name == "index.md" else first_model()
    pages.run_in_order(path, names, capsys)
    if path.name == "blocks.md":
        with pytest.warns(UserWarning) as warned:
            kb.BlockAdam().build(names["transformer"].trainable_variables)
        assert [f"UserWarning: {warned[0].message}\n"] == [
            text
            for text in pages.code_blocks(pages.read(path), "text")
            if "Warning" in text
        ]


def test_pages_with_python():
    """That of an optimizer of one's own is one, and so are most."""
    assert pages.DOCS / "adding.md" in WITH_PYTHON
    assert len(WITH_PYTHON) > 6


@each_page
def test_names_no_machine(path):
    text = pages.read(path)
    assert set(re.findall(r"\w+://([^/)\s]+)", text)) <= PUBLIC_HOSTS
    assert not re.search(r"/(home|mnt|opt|root|tmp|Users|usr|work)/", text)
    assert not re.search(r"\b\d+\.\d+\.\d+\.\d+\b|localhost", text)


@each_page
def test_links_lead_somewhere(path):
    for link in pages.links(pages.read(path)):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in pages.anchors(pages.read(target)), link


@each_page
def test_commands_exist(path):
    """Programs, modules and the options that are written after them."""
    text = re.sub(r"\\?\n", " ", pages.read(path))
    report = pages.read(ROOT / "benchmarks" / "report.py")
    for command, options in re.findall(
        r"python (-m benchmarks\.\w+|[\w/]+\.py)([^`#|]*?)(?=`| python |$)",
        text,
    ):
        file = command.removeprefix("-m ")
        if file != command:
            file = file.replace(".", "/") + ".py"
        assert (ROOT / file).is_file(), command
        source = pages.read(ROOT / file) + report
        source += pages.read(ROOT / "examples" / "distributed.py")
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in source, (command, option)


@each_page
def test_extras_exist(path):
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for names in re.findall(r"'\.\[([\w,]+)\]'", pages.read(path)):
        assert set(names.split(",")) <= set(setup["options.extras_require"])


def test_the_step_is_that_of_the_code():
    text = pages.read(pages.DOCS / "how-it-works.md")
    formulas, _ = pages.code_blocks(text, "text")
    assert textwrap.indent(formulas, "    ") in step.__doc__


def test_the_tables_of_the_transformer_are_those_that_are_printed(capsys):
    example = runpy.run_path(ROOT / "examples" / "blocks.py")
    example["main"]()
    tables = capsys.readouterr().out.strip().split("\n\n")
    text = pages.read(pages.DOCS / "blocks.md")
    assert len(tables) == 4
    for table in tables:
        assert f"```text\n{table}\n```" in text


def test_the_pictures_are_those_that_are_drawn():
    drawn = runpy.run_path(pages.DOCS / "draw_blocks.py")["draw_all"]()
    assert len(drawn) == 4
    saved = {p.name: pages.read(p) for p in pages.DOCS.glob("images/*.svg")}
    assert saved == drawn


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_every_optimizer_has_a_row(cls):
    text = pages.read(pages.DOCS / "choosing.md")
    assert f"\n| `kb.{cls.__name__}` |" in text


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_a_row(scheme):
    name = scheme.removesuffix("_short")  # That of an argument of `AdamMini`.
    for path in (pages.DOCS / "blocks.md", pages.README):
        assert re.search(rf'^\| .*`"{name}"`.* \|', pages.read(path), re.M)
    assert f'`"{name}"`' in kb.Blocking.__doc__


def test_the_reference_has_every_public_name():
    text = pages.read(pages.DOCS / "reference.md")
    shown = re.findall(r"^::: keras_blockwise\.(\w+)$", text, re.M)
    assert sorted(shown) == sorted(kb.__all__)


def test_every_page_is_in_the_navigation():
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load(pages.read(ROOT / "mkdocs.yml"))
    listed = [name for entry in config["nav"] for name in entry.values()]
    assert sorted(listed) == [path.name for path in pages.PAGES]
