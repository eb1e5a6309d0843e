"""README.md's commands and example run as they stand, at toy size.

A console block with a comment `# not run in tests: REASON` is left out. Training commands
get a small model and a small text, appended as overrides; nothing else is changed.
"""

import pathlib
import re
import shlex
import tomllib

import pytest
import toy

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
SKIPPED = "# not run in tests: "
TOY_MODEL = {
    "model.vocab_size": toy.VOCAB,
    "model.embed_dim": 32,
    "model.num_layers": 1,
    "model.seq_len": 32,
    "train.num_steps": 3,
    "train.log_every": 1,
    "optimizer.warmup_steps": 1,
    "eval.num_batches": 2,
    "checkpoint.every_steps": 2,
}


def test_benchmarks_are_run_as_modules():
    """Mutation: `python benchmarks/X.py`, which does not find the package."""
    texts = [
        README,
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
    wrong = [
        p.name
        for p in texts
        if re.search(r"python\S* benchmarks/", p.read_text("utf-8"))
    ]
    assert not wrong


def blocks(*languages):
    """The fenced blocks of README.md in these languages."""
    text = README.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def commands(block):
    """Its commands: lines joined at backslashes, prompts and comments dropped."""
    lines = block.replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ").strip() for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


def at_toy_size(words, folder):
    """The command with a toy corpus where it reads the default."""
    with_config = any(word.startswith("--config=") for word in words)
    training = "train.py" in words or "memoryformer.sweep" in words
    data = "memoryformer.data" in words
    overrides = {}
    if with_config and (training or data):
        overrides = {
            "data.source": "text",
            "data.path": str(folder / "corpus"),
            "data.tokenizer": "bytes",
        }
    if with_config and training:
        overrides |= TOY_MODEL
    return [*words, *(f"--config.{key}={value}" for key, value in overrides.items())]


def test_commands_in_order(tmp_path, world):
    """Every command that is not left out succeeds, one after another.

    Those of python run in forks of a process that has imported the package.

    Mutation: a misspelt flag in any of them.
    """
    run = [b for b in blocks("console", "bash") if SKIPPED not in b]
    assert run
    toy.corpus(tmp_path / "corpus")
    for name in ("train.py", "eval.py", "configs", "memoryformer"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        "PYTHONPATH": str(ROOT),
        "MEMORYFORMER_DATA": str(tmp_path / "cache"),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    for line in [line for block in run for line in commands(block)]:
        words = at_toy_size(shlex.split(line, comments=True), tmp_path)
        assert words[0] == "python", line
        done = world.runner.command(
            *words[1:], folder=tmp_path, environment=environment, timeout=600
        )
        assert done.code == 0, f"{line}\n{done.out}\n{done.err}"


def test_what_is_left_out_says_why():
    """A reason follows the mark, and its commands are targets of the Makefile.

    Mutation: `make quickstrat`.
    """
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks("console", "bash"):
        if SKIPPED in block:
            assert block.split(SKIPPED)[1].splitlines()[0].strip()
            for line in commands(block):
                words = shlex.split(line, comments=True)
                if words[0] == "make":
                    for target in [w for w in words[1:] if "=" not in w]:
                        assert re.search(rf"^{target}:", makefile, re.MULTILINE), line


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_example(index):
    """It runs in a bare interpreter, and the shapes in its comments are right.

    Mutation: a keyword of `ModelConfig` misspelt in it.
    """
    code = blocks("python")[index]
    names = {}
    exec(compile(code, f"README.md, python block {index}", "exec"), names)
    for name, shape in re.findall(r"^(\w+) = .*# \[([\d, ]+)\]$", code, re.MULTILINE):
        assert list(names[name].shape) == [int(n) for n in shape.split(",")], name


def test_the_map_is_the_tree():
    """Every folder and module of the package, every script and folder at the top, and no other.

    Mutations: `sweep/` left out of the map; `tools/` added to it.
    """
    text = README.read_text(encoding="utf-8").split("## Map")[1].split("```")[1]
    lines = [line for line in text.splitlines() if line.strip()]
    top = {
        w
        for line in lines
        if line[0] != " "
        for w in re.findall(r"[\w.]+/?", line[:22])
    }
    inside = {line.split()[0] for line in lines if re.match(r"  \S", line)}
    package = [p for p in (ROOT / "memoryformer").iterdir() if p.name[0] not in "_."]
    modules = {p.name for p in package if p.suffix == ".py"}
    folders = {f"{p.name}/" for p in package if p.is_dir()}
    assert inside == modules | folders
    scripts = {p.name for p in ROOT.glob("*.py")} - {"setup.py"}
    assert {name for name in top if name.endswith(".py")} == scripts
    assert all((ROOT / name).exists() for name in top)
    for name in (
        "configs/",
        "memoryformer/",
        "tests/",
        "benchmarks/",
        "launch/",
        "docs/",
    ):
        assert name in top


def test_extras_are_there():
    """Those that README installs.

    Mutation: `.[gpu]`.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = re.findall(r"\.\[(\w+)\]", README.read_text("utf-8"))
    assert named and set(named) <= project["optional-dependencies"].keys()


def test_links_and_paths_exist():
    """Relative links, and every configs/ and docs/ file that is named.

    Mutation: a link to docs/nowhere.md.
    """
    text = README.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    named = re.findall(r"\b(?:configs|docs|benchmarks|launch)/[\w/]+\.\w+", text)
    for path in {*links, *named}:
        if path and "://" not in path:
            assert (ROOT / path).exists(), path
