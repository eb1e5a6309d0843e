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
dryrun generation tasks
harness sweep
identifiability report
cim
"""
FLOOR = {
    name: number
    for number, names in enumerate(FLOORS.strip().splitlines())
    for name in names.split()
}
# What may be read alone, and so knows nothing of a model.
APART = {
    "ops": {"notation"},
    "data": {"errors", "files", "config", "runs", "cli"},
    "cluster": {"errors"},
    "runs": {"notation", "errors", "files", "config", "cluster"},
}

MAX_FILE, MAX_FUNCTION = 300, 60  # lines; a longer file wants to be two


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
    """First names below the package: memoryformer.data.preparation -> data."""
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


def test_files_are_moved_into_place_in_one_module():
    """`files.atomic`; beside it, whole folders are moved, and ops import nothing of ours.

    Mutation: `os.replace(fresh, path)` or `fresh.replace(path)` in runs/manifest.py.
    """
    moves = set()
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if not (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            ):
                continue
            owner, name = ast.unparse(node.func.value), node.func.attr
            of_os = owner in ("os", "shutil") and name in ("replace", "rename", "move")
            # `str.replace` takes two arguments, `dataclasses.replace` keywords.
            of_path = name in ("replace", "rename") and len(node.args) == 1
            if of_os or (of_path and not node.keywords):
                moves.add(str(path.relative_to(ROOT / PACKAGE)))
    folders = {
        "data/preparation.py",
        "data/part_runner.py",
        "convert/folders.py",
        "runs/folder.py",
    }
    assert moves == {"files/atomic.py", "ops/lookup/native.py"} | folders


def test_axis_names_have_one_home():
    """`ops.collectives` names the axes of a mesh.

    Mutation: `collectives.psum(x, "model")` in model/losses.py.
    """
    talk = {"axis_size", "axis_index", "psum", "pmax", "mean", "all_gather", "P"}
    talk |= {"reduce_scatter", "rotate", "scan_before", "PartitionSpec", "wire_bytes"}
    wrong = []
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            literals = {
                leaf.value
                for argument in node.args
                for leaf in ast.walk(argument)
                if isinstance(leaf, ast.Constant)
            }
            if name in talk and literals & {"data", "sequence", "model"}:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_neither_tensorflow_nor_torch():
    """Mutation: `import torch` inside a function of convert/torch_file.py."""
    for path in FILES:
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"tensorflow", "torch", "keras", "torchvision"}, path


def test_flags_only_at_the_door():
    """Only `cli` and the `__main__` modules know absl.

    Mutations: `from absl import flags` in model/narrow.py; `import absl.logging` in runs/.
    """
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        if path.name not in ("__main__.py", "cli.py")
        for name in imports(path)
        if name.split(".")[0] == "absl"
    ]
    assert not wrong


def test_short_enough_to_read():
    """Files of 300 lines, functions of 60 beside their docstrings.

    Mutation: 100 empty lines at the end of model/transformer.py.
    """
    for path in MODULES:
        name = str(path.relative_to(ROOT))
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_FILE, f"{name}: {lines} lines"
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
