"""The house rules that a machine can check, from the syntax trees: who imports what."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "memoryformer"
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
FILES = [
    *MODULES,
    ROOT / "train.py",
    ROOT / "eval.py",
    *(ROOT / "configs").glob("*.py"),
    *(ROOT / "launch").rglob("*.py"),
    *(ROOT / "tests").glob("*.py"),
]

BOTTOM = {"errors", "config", "console", "notation", "paths"}
# notation <- ops <- layers <- mixers <- recurrence <- model <- the rest; each may import those before.
CHAIN = ("ops", "layers", "mixers", "recurrence", "model")
APART = ("losses", "optimizer", "data", "metrics", "checkpoint", "accounting")
# What these are made of, and may therefore import.
PARTS = {
    "checkpoint": {"drift", "integrity", "leaves", "processes"},
    "accounting": {"mixer_costs", "recurrence_costs"},
}

# Honest exceptions, with their lines. Aim at 400; what grows past 440 wants to be two.
LONG_FILES: dict[str, int] = {}
MAX_FILE, MAX_FUNCTION = 440, 60


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Dotted names of everything that a file imports, at any depth."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_of_ours(path):
    """First names below the package: memoryformer.data.shards -> data."""
    for name in imports(path):
        if name.startswith(f"{PACKAGE}."):
            yield name.split(".")[1]


def part(path):
    """Which part of the package a file belongs to."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("name", [*CHAIN, *APART, *sorted(BOTTOM)])
def test_import_order(name):
    """Each part imports only what stands below it.

    Mutations: `from memoryformer import model` in losses.py; `from memoryformer import
    config` in ops/hashing.py; `from memoryformer import layers` inside a function of ops.
    """
    if name in CHAIN:
        allowed = {"notation", *CHAIN[: CHAIN.index(name)]}
        allowed |= BOTTOM if name != "ops" else set()
    elif name in APART:
        allowed = BOTTOM | {"ops"} | PARTS.get(name, set())
    else:
        allowed = BOTTOM  # `errors` asks `config` for a suggestion, inside a function
    files = [path for path in MODULES if part(path) == name]
    assert files
    for path in files:
        wrong = set(parts_of_ours(path)) - allowed - {name}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("name", sorted(set().union(*PARTS.values())))
def test_parts_of_a_part_stay_apart(name):
    """Mutation: `from memoryformer import trainer` in leaves.py."""
    path = ROOT / PACKAGE / f"{name}.py"
    assert set(parts_of_ours(path)) <= BOTTOM | {"ops"} | set().union(*PARTS.values())


def test_ops_know_jax_only():
    """No flax and no config in ops.

    Mutation: `from flax import nnx` in ops/rotary.py.
    """
    for path in MODULES:
        if part(path) == "ops":
            for name in imports(path):
                top = name.split(".")[0]
                assert top not in ("flax", "ml_collections"), (path, name)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_neither_tensorflow_nor_torch(path):
    """Mutation: `import torch` inside a function of convert/torch_file.py."""
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"tensorflow", "torch", "keras", "torchvision"}


def test_flags_only_at_the_door():
    """Flags are defined in train.py, eval.py, and by the `define_flags` of a command.

    `errors.define_debug_flag` is part of every entry point. Mutation: a `DEFINE_string`
    at the top of trainer.py.
    """

    def defines(node):
        return [
            n.lineno
            for n in ast.walk(node)
            if isinstance(n, ast.Attribute) and n.attr.startswith("DEFINE")
        ]

    for path in MODULES:
        if path.name == "__main__.py":
            continue
        at_the_door = set()
        for node in ast.walk(tree(path)):
            block = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            main = isinstance(node, ast.FunctionDef) and node.name in (
                "define_flags",  # of a command
                "define_flag",  # of one kind, for those
                "define_debug_flag",
            )
            if block or main:
                at_the_door |= set(defines(node))
        assert set(defines(tree(path))) <= at_the_door, path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_short_enough_to_read(path):
    """Files of about 400 lines, functions of 60, but for the exceptions listed above.

    Mutation: 350 empty lines at the end of model.py.
    """
    limit = LONG_FILES.get(str(path.relative_to(ROOT)), MAX_FILE)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            length = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert length <= MAX_FUNCTION, f"{path}:{node.lineno} {node.name}: {length}"


def test_the_entry_points_are_thin():
    """Flags, then one call into the package.

    Mutation: a training loop in train.py.
    """
    for name in ("train.py", "eval.py"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 80
