"""The house rules that a machine can check, from the syntax trees: who imports what."""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "memoryformer"
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
FILES = [
    *MODULES,
    ROOT / "train.py",
    ROOT / "eval.py",
    *(ROOT / "configs").glob("*.py"),
    *(ROOT / "launch").rglob("*.py"),
    *(ROOT / "tests").rglob("*.py"),
]

# Every part of the package, from the bottom up: each imports only what stands on a floor
# below its own. `ops` know jax alone, and so nothing of ours but names of shapes.
FLOORS = """
notation
errors
files
config
cluster ops
runs sharding
cli
data
model
accounting evaluation
training
convert presets
dryrun generation
harness sweep tasks
report
"""
FLOOR = {
    name: number
    for number, names in enumerate(FLOORS.strip().splitlines())
    for name in names.split()
}
# What may be read alone, and so knows nothing of a model.
APART = {
    "ops": {"notation"},
    "data": {"errors", "files", "config", "cli"},
    "cluster": {"errors"},
    "runs": {"notation", "errors", "files", "config", "cluster"},
}

# A file of more than 400 lines wants to be two.
MAX_FILE, MAX_FUNCTION = 400, 60
LONG_FILES: dict[str, int] = {}


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


def test_every_part_stands_on_its_floor():
    """Mutations tried: `from memoryformer import model` in model/losses.py; `from memoryformer import
    trainer` inside a function of runs/state_spec.py; a new module that is on no floor.
    """
    assert {part(path) for path in MODULES} - {"__init__"} == FLOOR.keys()
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        for name in set(parts_of_ours(path)) - {part(path)}
        if FLOOR[name] >= FLOOR[part(path)]
    ]
    assert not wrong


def test_what_stands_apart():
    """Mutations tried: `from memoryformer import sharding` in runs/metrics.py; `from memoryformer
    import config` in ops/hashing.py.
    """
    for path in MODULES:
        if part(path) in APART:
            wrong = set(parts_of_ours(path)) - APART[part(path)] - {part(path)}
            assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_ops_know_jax_only():
    """No flax and no config in ops.

    Mutation: `from flax import nnx` in ops/rotary.py.
    """
    for path in MODULES:
        if part(path) == "ops":
            for name in imports(path):
                top = name.split(".")[0]
                assert top not in ("flax", "ml_collections"), (path, name)


def test_neither_tensorflow_nor_torch():
    """Mutation: `import torch` inside a function of convert/torch_file.py."""
    for path in FILES:
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"tensorflow", "torch", "keras", "torchvision"}, path


def test_flags_only_at_the_door():
    """Flags are defined by the `define_flags` of a command.

    `cli.define_debug_flag` is part of every entry point. Mutation: a `DEFINE_string`
    at the top of training/loop.py.
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
            # `define_flags` is a command's; `cli` has one for each kind of flag.
            main = isinstance(node, ast.FunctionDef) and node.name.startswith("define_")
            if block or main:
                at_the_door |= set(defines(node))
        assert set(defines(tree(path))) <= at_the_door, path


def test_short_enough_to_read():
    """Files of 400 lines, functions of 60, but for what is listed, and is really longer.

    Mutation: 100 empty lines at the end of model/transformer.py.
    """
    for path in MODULES:
        name = str(path.relative_to(ROOT))
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONG_FILES.get(name, MAX_FILE), f"{name}: {lines} lines"
        assert name not in LONG_FILES or lines > MAX_FILE, f"{name} is short now"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                length = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
                assert length <= MAX_FUNCTION, (
                    f"{path}:{node.lineno} {node.name}: {length}"
                )


def test_the_entry_points_are_thin():
    """One call into the package.

    Mutation: a training loop in train.py.
    """
    for name in ("train.py", "eval.py"):
        _docstring, _import, call = tree(ROOT / name).body
        assert ast.unparse(call) == "if __name__ == '__main__':\n    main()"
