"""The sampler of mutants: what it draws, that it kills, and that it leaves the tree alone."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

from tests import forks, mutate, sampled_mutants, scope

ROOT = pathlib.Path(__file__).parents[1]
SOURCE = '''"""A module."""
import os

def f(x: "list[1]", y=2, *, loud=False) -> int:
    """Say 3."""
    if not x or y < 4:
        raise ValueError(f"{x + 5}")
    os.remove(x)
    z = zip(x, y, strict=True), zip(x, y, strict=False), x(strict=True)
    return x + y

if __name__ == "__main__":
    f(6)
'''
TEST = """
import code_under_test
def test_sum():
    assert code_under_test.total(1, 2) == 3
"""


@pytest.fixture
def module(tmp_path):
    (tmp_path / "module.py").write_text(SOURCE, encoding="utf-8")
    return tmp_path


def test_what_is_changed(module):
    """Each operator where it applies; no annotation, docstring, message or script.

    Mutations: `annotation` not left out of `_walk`; `JoinedStr` walked; byte columns;
    `_is_zip` not asked.
    """
    found = mutate.find(module, "module.py")
    changes = {(m.operator, m.before.split("\n")[0], m.after) for m in found}
    assert changes == {
        ("default", "2", "3"),
        ("default", "False", "True"),
        ("and-or", "not x or y < 4", "(not x and y < 4)"),
        ("not", "not x", "(x)"),
        ("compare", "y < 4", "(y <= 4)"),
        ("negate", "y < 4", "(y >= 4)"),
        ("integer", "4", "5"),
        ("boolean", "False", "True"),  # of the zip that is not strict
        ("boolean", "True", "False"),  # of what is no zip
        ("delete", "if not x or y < 4:", "pass"),
        ("delete", "os.remove(x)", "pass"),
        ("return", "return x + y", "return None"),
        ("arithmetic", "x + y", "(x - y)"),
    }
    before = ast.dump(ast.parse(SOURCE))
    for mutant in found:
        assert ast.dump(ast.parse(mutant.apply(SOURCE))) != before, mutant


def test_characters_of_several_bytes(tmp_path):
    """Mutation: ast's columns, which count bytes, taken for characters."""
    source = 'x = "äöü" and 1 < 2  # ε\n'
    (tmp_path / "module.py").write_text(source, encoding="utf-8")
    applied = {m.apply(source) for m in mutate.find(tmp_path, "module.py")}
    assert 'x = "äöü" and (1 <= 2)  # ε\n' in applied


def test_every_module_in_scope_has_tests():
    """Mutation: a new module of ops/ that `scope` does not name; a test that is gone."""
    package = ROOT / "memoryformer"
    found = {p for f in scope.FOLDERS for p in (package / f).rglob("*.py")}
    named = {ROOT / path for path in scope.MODULES}
    empty = {p for p in found if not p.read_text(encoding="utf-8").strip()}
    assert found - empty <= named
    assert all(path.exists() for path in named), [p for p in named if not p.exists()]
    for tests in scope.MODULES.values():
        assert tests and all((ROOT / "tests" / name).exists() for name in tests)


def test_a_draw_depends_on_its_seed_alone(monkeypatch, tmp_path):
    """A larger count adds to the same draw. Mutation: `random.sample` of `count`."""
    monkeypatch.setattr(sampled_mutants, "OUTPUT", tmp_path)

    def drawn(seed, count):
        return sampled_mutants.Session(
            seed, count, ("model/losses", "training/spikes")
        ).drawn

    assert drawn(1, 5) == drawn(1, 9)[:5] and len(drawn(1, 9)) == 9
    assert drawn(1, 5) != drawn(2, 5)


FORKS = """
import collections, json, pathlib, sys
from tests import forks
tree, found = pathlib.Path(sys.argv[1]), []
for body, timeout in json.loads(sys.argv[2]):
    (tree / "code_under_test.py").write_text(body)
    tests = ["test_it.py"], {}, collections.Counter()
    found.append(forks.run_tests(tree, *tests, timeout))
print(json.dumps(found))
"""


def test_a_fork_says_what_failed(tmp_path):
    """Passed, failed at which assertion, not collected, timed out: each is told apart.

    In a process of its own: this one's threads would not live through a fork.
    Mutations: the path of this process left in the child's; the child's code not read.
    """
    (tmp_path / "test_it.py").write_text(TEST, encoding="utf-8")
    bodies = [
        ("def total(a, b):\n    return a + b\n", 60),
        ("def total(a, b):\n    return a - b\n", 60),
        ("def total(a, b):\n    return a +\n", 60),
        ("import time\ntime.sleep(60)\n", 1),
    ]
    command = [sys.executable, "-c", FORKS, tmp_path, json.dumps(bodies)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    codes = (
        forks.PASSED,
        forks.FAILED,
        forks.NOT_COLLECTED,
    )
    assert [one["code"] for one in found] == [*codes, -9]
    test, message = found[1]["failure"]
    assert test.endswith("::test_sum") and "test_it.py:4 assert -1 == 3" in message


def test_equivalent_mutants_are_there_and_say_why():
    """Each entry names one mutant. Mutation: an entry whose line has been rewritten stays."""
    for entry in json.loads(sampled_mutants.EQUIVALENT.read_text(encoding="utf-8")):
        assert entry["reason"].strip()
        assert len(sampled_mutants.ids_of(entry)) == 1, entry


def test_an_equivalent_mutant_is_known_by_its_place(monkeypatch, tmp_path):
    """Mutation: the source line not compared, so that one excuse serves the whole file."""
    text = "def f(x):\n    if x < 4:\n        return 1\n    if x < 4:  # again\n        return 2\n"
    (tmp_path / "module.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sampled_mutants, "ROOT", tmp_path)
    change = {"path": "module.py", "before": "x < 4", "after": "(x <= 4)"}
    first, second = (
        sampled_mutants.ids_of(change | {"source": line})
        for line in ("if x < 4:", "if x < 4:  # again")
    )
    assert len(first) == len(second) == 1 and first != second
    assert not sampled_mutants.ids_of(change | {"source": "if x < 5:"})


@pytest.mark.parametrize("flags", ["--modules=ops/,no_such", "--count=0", "--jobs=0"])
def test_a_draw_of_nothing_is_refused(monkeypatch, capsys, flags):
    """Mutation: no check, and a misspelt module is a success of 0 mutants."""
    monkeypatch.setattr(sys, "argv", ["sampled_mutants", flags])
    with pytest.raises(SystemExit) as error:
        sampled_mutants.main()
    assert error.value.code == 2 and flags.split("=")[0] in capsys.readouterr().err


def test_a_job_that_fails_is_told():
    """Mutation: the children's exit codes not read."""
    children = [
        subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({code})"])
        for code in (0, 3)
    ]
    with pytest.raises(SystemExit, match=r"\[0, 3\]"):
        sampled_mutants.wait_for([child.pid for child in children])
    for child in children:
        child.returncode = 0  # waited for above
