"""The documents: links and paths that are there, a reference that is whole, a site that builds."""

import dataclasses
import importlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
from absl import flags
from test_layering import FLOORS

import memoryformer
from memoryformer import cli
from memoryformer import config as config_lib
from memoryformer.files import stores
from memoryformer.training import __main__ as training
from memoryformer.training import experiment, rates

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("howto/*.md"), *ROOT.glob("*.md")])
PATH = r"\b(?:memoryformer|configs|docs|tests|benchmarks|launch)/[\w./]*\w\.(?:py|sh|h|cc|json|md)\b"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    """Relative links and their headings, and files that it names by their path.

    Mutations: a link to nowhere.md; to reliability.md#exit-code; `memoryformer/dryrun.py`.
    """
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, heading = link.partition("#")
        if "://" in link or name.startswith("_generated/"):
            continue
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles
            }
            assert heading in anchors, link
    for path in re.findall(PATH, text):
        assert (ROOT / path).exists(), path


def documented_runs():
    """[(page, flags)] of every `python train.py` that names its config and all of its flags."""
    found = []
    for page in [*PAGES, *sorted((ROOT / "configs").glob("*.py"))]:
        text = re.sub(r"\\+\n\s*", " ", page.read_text("utf-8"))
        for line in re.findall(r"^ *python train\.py (--.*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            left_open = {"FLAGS", "--config=CONFIG", "--config=FILE"} & set(words)
            if not left_open and "$" not in line:
                found.append((page.relative_to(ROOT).as_posix(), words))
    return found


def checked_run(argv):
    """Check a config as a run does before it compiles anything."""
    run = experiment.resolve(flags.FLAGS.config)
    rates.relative(run.optimizer, run.train.num_steps)


def test_documented_runs_fit(capsys, monkeypatch):
    """Every setting is there and goes with the others; nothing is trained.

    Mutations tried: 20 steps with the quickstart's warm-up of 100, as a page had it; a field that
    has moved.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(stores.SCHEMES, "s3", "")  # no package is needed to read a flag
    runs, wrong = documented_runs(), []
    assert len(runs) > 15
    for page, words in runs:
        with pytest.raises(SystemExit) as ended:
            cli.run_main(checked_run, training.define_flags, ["train.py", *words])
        said = capsys.readouterr().err
        wrong += [(page, words, said)] if ended.value.code else []
    assert not wrong


def test_floors_are_those_of_the_tree():
    """The architecture page draws the floors that `test_layering` holds.

    Mutation: two lines of the page's list swapped.
    """
    text = (DOCS / "architecture.md").read_text("utf-8").split("## The floors")[1]
    drawn = [
        re.split(r" {2,}", line)[0] for line in text.split("```")[1].strip().split("\n")
    ]
    assert drawn[::-1] == FLOORS.strip().splitlines()


def test_lists_of_requirements_are_there():
    """What code, scripts and pages say to install from: a file that is there, or an extra.

    Mutation: `pip install -r requirements-eval.txt` in memoryformer/harness/task_loading.py.
    """
    places = [*PAGES, ROOT / "Makefile"]
    for folder in ("memoryformer", "benchmarks", "launch", "configs"):
        places += [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.sh")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for place in places:
        text = place.read_text("utf-8")
        for name in re.findall(r"requirements[\w-]*\.txt", text):
            assert (ROOT / name).exists(), (place, name)
        for extra in re.findall(r"'\.\[(\w+)\]'", text):
            assert extra in project["optional-dependencies"], (place, extra)


def test_the_citation_is_of_this_version():
    """Mutation: another version in memoryformer/__init__.py."""
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {memoryformer.__version__}\n" in text


def test_every_page_is_in_the_site():
    """Mutation: `howto/slurm` left out of index.md."""
    index = (DOCS / "index.md").read_text("utf-8")
    pages = {
        str(p.relative_to(DOCS).with_suffix("")) for p in PAGES if DOCS in p.parents
    }
    assert pages - {"index"} == set(re.findall(r"^([\w/]+)$", index, re.MULTILINE))


def test_reference_has_every_field(monkeypatch):
    """One row for each field, with its type, its default, a meaning and what it changes.

    Mutation: `_rows` of `fields[1:]`.
    """
    monkeypatch.syspath_prepend(str(DOCS))
    reference = importlib.import_module("reference")
    rows = re.findall(
        r"^\| `([\w.]+)` \|(.*)\|$", reference.configuration(), re.MULTILINE
    )
    names = [name for name, _ in rows if "_options." not in name]
    assert len(names) == len(set(names))  # mixers have options of one name
    cells = dict(rows)
    for section in dataclasses.fields(experiment.Experiment):
        if not dataclasses.is_dataclass(section.type):
            assert section.name in names
            continue
        for field in dataclasses.fields(section.type):
            if not dataclasses.is_dataclass(field.type):
                row = cells[f"{section.name}.{field.name}"].split(" | ")
                assert all(cell.strip() for cell in row), (field.name, row)
            for choice in (field.metadata.get("options") or {}).values():
                for option in dataclasses.fields(config_lib.options_class(choice)):
                    assert f"{section.name}.{field.name}.{option.name}" in cells
    assert cells["model.lookup"].endswith("| rounding ")
    assert cells["eval.batch_size"].split(" | ")[0].strip() == "int"
    assert cells["eval.batch_size"].endswith("| nothing ")


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """`make docs`: every page, the executed tour, no warning.

    Mutations: `_prose` without its `re.sub`; a cell of tour.md that raises.
    """
    pytest.importorskip("myst_nb")
    for name in ("docs", "memoryformer", "configs"):  # what `make docs` reads
        ignored = shutil.ignore_patterns("_build", "_generated", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    command = (ROOT / "Makefile").read_text("utf-8").split("\ndocs:")[1].splitlines()[1]
    words = command.strip().split()
    assert words[:3] == ["$(RUN)", "-m", "sphinx"]
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=tmp_path,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},  # as a reader has
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "docs" / "_build" / "html"
    tour = (site / "tour.html").read_text("utf-8")
    assert "bits per byte after 200 steps" in tour and "<img" in tour
    assert "model.embed_dim" in (site / "configuration.html").read_text("utf-8")
    assert "hash_codes" in (site / "_generated" / "api" / "ops.html").read_text("utf-8")
