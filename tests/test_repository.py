"""CONTRIBUTING.md, CITATION.cff and the workflows say what is so."""

import re
from configparser import ConfigParser

import pytest

import keras_blockwise as kb
from helpers.cases import OPTIMIZERS
from helpers.processes import ROOT

yaml = pytest.importorskip("yaml")

GUIDE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
TEXT = " ".join(re.sub(r"^```.*?^```$", "", GUIDE, flags=re.M | re.S).split())
QUOTED = set(re.findall(r"`([^`]+)`", TEXT))
WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text("utf-8"))
    for path in (ROOT / ".github" / "workflows").iterdir()
}
each_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def setup():
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lower_bounds():
    """The oldest version of each package, for each backend and for all."""
    extras = setup()["options.extras_require"]
    parts = [extras[name] for name in ("tensorflow", "jax", "torch")]
    parts.append(setup()["options"]["install_requires"])
    return dict(re.findall(r"^(\S+)>=(\S+)$", "\n".join(parts), re.M))


def steps_of(workflow):
    for job in workflow["jobs"].values():
        yield from job["steps"]


# CONTRIBUTING.md.


def test_every_path_exists():
    path = r"[\w/.-]+/|[\w/.-]+\.(py|yml)|\.ci/\w+"
    paths = {name for name in QUOTED if re.fullmatch(path, name)}
    assert {"benchmarks/", "step.py", "tests/helpers/cases.py"} < paths
    for path in paths:
        inside = any((ROOT / "keras_blockwise" / "algorithm").glob(path))
        inside |= any((ROOT / "keras_blockwise" / "execution").glob(path))
        assert inside or (ROOT / path).exists(), path


def test_every_room_of_the_package_is_explained():
    package = ROOT / "keras_blockwise"
    rooms = [path.parent for path in package.rglob("*/__init__.py")]
    modules = [p for p in package.glob("*.py") if p.name != "__init__.py"]
    assert rooms and modules
    for path in rooms:
        assert f"{path.relative_to(ROOT).as_posix()}/" in QUOTED
    for path in modules:
        assert path.relative_to(ROOT).as_posix() in QUOTED


def test_every_table_exists():
    found = [
        (path, name)
        for path, first, second in re.findall(
            r"`([\w/]+\.py)`, `([A-Z_]+)`(?: and `([A-Z_]+)`)?", TEXT
        )
        for name in (first, second)
        if name
    ]
    found += [
        (path, name)
        for name, path in re.findall(r"`([A-Z_]+)` of `([\w/]+\.py)`", TEXT)
    ]
    assert len(found) > 15
    for path, name in found:
        source = (ROOT / path).read_text("utf-8")
        assert re.search(rf"^{name}\b.* = ", source, re.M), (path, name)


def test_no_table_of_optimizers_is_left_out():
    """A table is a file of tests that names most of the optimizers."""
    tables = set()
    for path in (ROOT / "tests").rglob("*.py"):
        words = set(re.findall(r"\w+", path.read_text("utf-8")))
        named = [cls for cls in OPTIMIZERS if cls.__name__ in words]
        if 3 * len(named) > 2 * len(OPTIMIZERS):
            tables.add(path.relative_to(ROOT).as_posix())
    assert "tests/helpers/oracle.py" in tables
    assert tables <= QUOTED, tables - QUOTED


# Versions.


def test_the_formatter_is_the_same_everywhere():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (revision,) = [
        repo["rev"] for repo in config["repos"] if "ruff" in repo["repo"]
    ]
    required = setup()["options.extras_require"]["dev"].split()
    assert f"ruff=={revision.removeprefix('v')}" in required


def test_the_citation_is_of_this_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    metadata = setup()["metadata"]
    assert citation["version"] == kb.__version__
    assert citation["license"] == metadata["license"]
    assert citation["repository-code"] == metadata["url"]


def test_the_oldest_and_the_newest_versions_of_each_backend_are_tested():
    bounds = lower_bounds()
    oldest = (ROOT / ".ci" / "oldest.txt").read_text("utf-8")
    rows = WORKFLOWS["ci.yml"]["jobs"]["versions"]["strategy"]["matrix"]
    newest = set()
    pythons = set()
    for row in rows["include"]:
        versions = row.get("versions", "")
        if not versions:
            newest.add(row["backend"])
            continue
        pythons.add(row["python"])
        versions = versions.replace("-c .ci/oldest.txt", oldest)
        tested = dict(re.findall(r"(\S+)==(\S+)", versions))
        bound = bounds[row["backend"]]
        assert f"{tested[row['backend']]}.".startswith(f"{bound}."), row
    backends = ["jax", "tensorflow", "torch"]
    assert sorted(newest) == backends
    assert sorted(row["backend"] for row in rows["include"]) == sorted(
        2 * backends
    )
    least = setup()["options"]["python_requires"].removeprefix(">=")
    assert least in pythons


# Workflows.


@each_workflow
def test_workflows_may_only_read(name):
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        if "permissions" in job:
            assert job["permissions"] == {"id-token": "write"}
            assert job["environment"] == "pypi"


@each_workflow
def test_actions_have_a_major_version(name):
    actions = [s["uses"] for s in steps_of(WORKFLOWS[name]) if "uses" in s]
    assert actions
    for action in actions:
        assert re.fullmatch(r"[\w/-]+@(release/)?v\d+", action)


def test_the_workflows_run_the_scripts_of_this_repository():
    for name, script in [("ci.yml", ".ci/run"), ("release.yml", ".ci/wheel")]:
        commands = [s.get("run", "") for s in steps_of(WORKFLOWS[name])]
        assert any(c.startswith(f"bash {script}") for c in commands)
        assert (ROOT / script).is_file()


def test_forms_of_issues():
    forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text("utf-8"))
        assert {"name", "description", "body"} <= form.keys()


# Examples.


def test_every_example_is_listed():
    listed = (ROOT / "examples" / "README.md").read_text("utf-8")
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert set(re.findall(r"\]\((\w+\.py)\)", listed)) == names
