"""Every attribute of our modules that a file reads is there; tests that need torch included.

A test that is skipped here never runs its lines, so a name that moved is not missed by it.
"""

import ast
import importlib
import importlib.util
import os
import types

import pytest
from test_layering import ROOT, tree

FILES = sorted(
    path
    for pattern in (
        "*.py",
        "memoryformer/**/*.py",
        "tests/**/*.py",
        "benchmarks/**/*.py",
    )
    for path in ROOT.glob(pattern)
)
OURS = {"memoryformer", "benchmarks", "tests"} | {
    path.stem for path in (ROOT / "tests").rglob("*.py")
}


def module(name):
    """The module of ours with this name, or None: it is something else's, or not there.

    Where it imports what only `make test-peers` has, the file that asks is left to that.
    """
    if name.split(".")[0] not in OURS or importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] in OURS:
            raise
        pytest.skip(f"{name} needs {error.name}")


def modules_of(syntax):
    """({name in the file: module of ours}, names that it imports in vain)."""
    found, vain = {}, []
    for node in ast.walk(syntax):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            parent = module(node.module)
            for alias in node.names:
                value = getattr(parent, alias.name, None)
                if value is None and hasattr(parent, "__path__"):
                    value = module(f"{node.module}.{alias.name}")
                if value is None and not hasattr(parent, alias.name):
                    vain.append(f"{node.lineno}: {node.module}.{alias.name}")
                if isinstance(value, types.ModuleType):
                    found[alias.asname or alias.name] = value
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.split(".")[0]
                if (value := module(name)) is not None:
                    found[alias.asname or name] = value
    ours = {key: value for key, value in found.items() if is_ours(value)}
    return ours, vain


def is_ours(value):
    return value.__name__.split(".")[0] in OURS


def missing(syntax):
    """'line: name.attribute' of everything read of our modules that is not there."""
    ours, vain = modules_of(syntax)
    nodes = list(ast.walk(syntax))
    hidden = {node.arg for node in nodes if isinstance(node, ast.arg)} | {
        node.id
        for node in nodes
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    reads = [
        (node.value.id, node)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    return vain + [
        f"{node.lineno}: {name}.{node.attr}"
        for name, node in reads
        if name in ours.keys() - hidden and not hasattr(ours[name], node.attr)
    ]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Benchmarks set some variables when they are imported: for this test alone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_read_of_our_modules_is_there(path):
    """Red if a name moves and a reader, run here or not, still asks the old place."""
    assert not missing(tree(path))


def test_a_name_that_is_not_there_is_found():
    """The sweep itself: of a module, of an import, and not of a local that hides one."""
    text = (
        "from memoryformer import errors\nfrom memoryformer.data import tokenizer as t\n"
        "from memoryformer.data import nothing\nerrors.DataError\nt.EOT\n"
    )
    found = missing(ast.parse(text))
    assert found == ["3: memoryformer.data.nothing", "5: t.EOT"]
    assert not missing(ast.parse("import errors as e\ndef f(errors): errors.x\n"))
