"""Every command that the documents name starts, and none ends in a traceback.

The table of commands and their flags is read from the package, so that a new flag is tried
without a word here; a new command wants one line in `BASES`.
"""

import importlib
import pathlib
import pkgutil
import re
import sys

import pytest
import toy
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memoryformer
from memoryformer import cli

ROOT = pathlib.Path(__file__).parent.parent
ENDS = (0, 2, 44, 45, 46)  # exit codes of a command that was given nonsense
SECONDS = 240.0

# What makes each command work, in each of its ways; what is tried comes behind it.
CONFIG = "--config={folder}/toy_config.py"
SWEEP = ("--config={folder}/toy_sweep.py", "--sweep=seed", "--root={folder}/sweeps")
BASES = {
    "memoryformer.training": [
        (CONFIG, "--workdir={folder}/new", "--config.train.num_steps=1"),
        (CONFIG, "--workdir={folder}/new", "--num_processes=2", "--init_timeout=0.1"),
    ],
    "memoryformer.harness": [
        ("--workdir={folder}/run",),
        ("--export={folder}/corpus", "--tasks=x"),
    ],
    "memoryformer.accounting": [(CONFIG,)],
    "memoryformer.cim": [
        ("energy", CONFIG, "--technology=isaac"),
        ("constants",),
        ("--workdir={folder}/none", "--technology=gaussian"),
    ],
    "memoryformer.convert": [
        ("export", "{folder}/run", "{folder}/out"),
        ("import", "{folder}/run", "{folder}/out"),
        ("recency", "--workdir={folder}/run"),
        ("gpt_neox", "{folder}/corpus", "{folder}/out"),
        ("released", "{folder}/run", "{folder}/out"),
        ("memorise", "{folder}/run", "{folder}/out"),
    ],
    "memoryformer.data": [
        ("inspect", CONFIG),
        ("yardsticks", CONFIG),
        ("prepare", CONFIG),
        ("export", CONFIG, "--output={folder}/out"),
        ("x", CONFIG),
    ],
    "memoryformer.dryrun": [(CONFIG, "--compile=none")],
    "memoryformer.generation": [
        ("--workdir={folder}/run", "--max_tokens=2"),
        ("--export={folder}/run",),
    ],
    "memoryformer.report": [
        ("{folder}/run", "--output={folder}/page.html"),
        ("curves", "{folder}/run", "--output={folder}/plots"),
        ("utilisation", "--workdir={folder}/run", "--output={folder}/plots"),
        ("flops", "{folder}/none"),
        ("slots", "{folder}/run", "--output={folder}/plots"),
        ("quickstart", "--workdir={folder}/run"),
    ],
    "memoryformer.sweep": [(word, *SWEEP) for word in ("list", "print", "collect")],
    "memoryformer.identifiability": [
        ("--workdir={folder}/run", "--max_tokens=200"),
        ("--study=teachers",),
    ],
    "memoryformer.tasks.memorised": [("--workdir={folder}/run",)],
    "memoryformer.tasks": [
        ("--config=configs/listops.py:nope", "--workdir={folder}/listops"),
        ("mqar", "--config=listops", "--workdir={folder}/listops"),
    ],
}
# Of the environment, each more nonsense than the last.
SURROUNDINGS = (
    {"SLURM_STEP_NODELIST": "n1,n2", "SLURM_NTASKS": "2"},
    {"SLURM_STEP_NODELIST": "[", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
    {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "many"},
    {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_PROCID": "9"},
    {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "x"},
    {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "²"},
    {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0", "JAX_COORDINATOR_PORT": "99999"},
    {"MEMORYFORMER_DATA": "gs://bucket", "MEMORYFORMER_CACHE": "~nobody-of-that-name"},
    {"MEMORYFORMER_DATA": "/dev/null/x"},
)  # fmt: skip


THEIRS = ("venv", "pip", "sphinx", "apache_beam")  # packages, not all of them installed


def documented():
    """Modules and scripts that a document, docstring or script starts with python."""
    places = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    places += (ROOT / "docs" / "howto").glob("*.md")
    for folder in ("launch", "configs", "benchmarks", "memoryformer"):
        places += (ROOT / folder).rglob("*.py")
        places += (ROOT / folder).rglob("*.sh")
    start = re.compile(r"(?:python3?|\(RUN\)) (?:-m ([\w.]+)|((?:train|eval)\.py))")
    found = {
        module or script
        for place in places
        for module, script in start.findall(place.read_text("utf-8"))
    }
    ours = {name for name in found if name.split(".")[0] not in THEIRS}
    return sorted(name.rstrip(".") for name in ours if "tests" not in name)


def commands():
    """Modules of the package that define flags: {how they are started: module}."""
    found = {}
    for info in pkgutil.walk_packages(memoryformer.__path__, "memoryformer."):
        text = pathlib.Path(info.module_finder.path, info.name.split(".")[-1] + ".py")
        if text.is_file() and "\ndef define_flags(" in text.read_text("utf-8"):
            module = importlib.import_module(info.name)
            found[info.name.removesuffix(".__main__")] = module
    return found


def flags_of(define):
    """{name: flag} of what a function defines; nothing stays defined."""
    before = set(flags.FLAGS)
    define()
    found = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - before}
    for name in found:
        delattr(flags.FLAGS, name)
    return found


def kinds(command):
    """{flag: its kind} of a command, from what it defines."""
    return {
        n: f.flag_type() for n, f in flags_of(commands()[command].define_flags).items()
    }


PATHS = st.sampled_from(
    ["", "gs://b/x", "s3://b", "file:///tmp/x", "~nobody/x", "{folder}/none/x",
     "{folder}/[x]", "{folder}/a b*?", "/dev/null", "{folder}/corpus", "a\x01b", "x" * 300]
)  # fmt: skip
TEXTS = st.sampled_from(["", "x", "-1", "é\u2028", '"', "a,b", "int4", "%s{}", "nan"])
VALUES = {
    "int": st.sampled_from(["", "x", "-1", "0", "-7", "1.5", "9" * 30, "-" + "9" * 30]),
    "float": st.sampled_from(["", "x", "nan", "inf", "-inf", "-1", "0", "1e39", "1e-50"]),
    "bool": st.sampled_from(["", "x", "2", "true"]),
    "path": PATHS,
    "config file": st.sampled_from(
        ["", "{folder}", "{folder}/none.py", "a:b/c.py", "{folder}/toy_config.py:nope",
         "{folder}/broken.py", "{folder}/raises.py", "{folder}/empty.py",
         "{folder}/leaves.py", "{folder}/run/config.json", "{folder}/none.py:,train.seed=1"]
    ),
}  # fmt: skip
OVERRIDES = (
    "config.train.seed=x", "config.train.sed=1", "config.train=1", "config.=1",
    "config.model.embed_dim=0", "config.train.num_steps=-1", "config.train.batch_size=",
    "config.optimizer.learning_rate=1e39", "config.optimizer.eps=1e-60", "noconfig",
    "config.data.path=", "config.data.path=gs://b/x", "config.data.path={folder}/none",
    "config.data.tokenizer=bpe:x", "config.data.tokenizer=s3://x/t.json", "config.mesh=x",
    "config.train.compilation_cache=/dev/null/x", "config.data.data_dir=/dev/null/x",
    "config.data.tokenizer={folder}/corpus", "wrong=1", "allow=x,y", "flagfile=/none",
    "v=x", "verbosity=x", "undefok=", "config.metrics.trackers=\x01",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(toy_run):
    folder = toy_run.parent
    toy.config_file(folder)
    toy.sweep_file(folder)
    (folder / "broken.py").write_text("def get_config(:\n")
    (folder / "raises.py").write_text("def get_config():\n    return 1 // 0\n")
    (folder / "empty.py").write_text("x = 1\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    return folder


def start(runner, folder, command, words, **options):
    """Run a command; `{folder}` in its words is the folder of the toy run."""
    words = [word.replace("{folder}", str(folder)) for word in words]
    return runner.command("-m", command, *words, timeout=SECONDS, **options)


def check_end(result, words):
    assert result.code in ENDS, (words, result)
    assert "Traceback" not in result.out + result.err, (words, result)
    told = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(told) == (result.code != 0), (words, result)


def test_the_table_is_whole():
    """A command without a line in BASES; a document that names what is not there.

    Mutation: a `define_flags` in memoryformer/training/spikes.py.
    """
    assert sorted(BASES) == sorted(commands())
    assert all(kinds(command) for command in BASES)
    assert (
        kinds("memoryformer.training")["workdir"]
        == kinds("memoryformer.sweep")["root"]
        == "path"
    )


@pytest.mark.parametrize("name", documented())
def test_what_is_documented_starts(runner, name):
    """`--help` of each, from the root: it imports what it needs, and says how it is used.

    Mutation: `import lookup_cpu` in a benchmark, which only its own folder makes work.
    """
    first = [name] if name.endswith(".py") else ["-m", name]
    result = runner.command(*first, "--help", timeout=SECONDS)
    assert result.code == 0, result
    assert "Traceback" not in result.err
    assert len(result.out.splitlines()) > 3


def test_console_script(monkeypatch, capsys):
    """Each subcommand is one of the commands, and none but a part of another is left out.

    Mutations: "data" left out of `COMMANDS`; `del sys.argv[1]` left out.
    """
    modules = {f"memoryformer.{module}" for module, _ in cli.COMMANDS.values()}
    assert modules == commands().keys() - {"memoryformer.report.quickstart"}
    for words, code, said in (
        (["accounting", "--config=quickstart:dense"], 0, "589,824"),
        (
            ["accounting", "--config=quickstrat"],
            2,
            "memoryformer_tiny, memoryformer_token_addressed, mqar",
        ),
        (["trian"], 2, "'trian': no such command; did you mean 'train'?"),
        (["--version"], 0, memoryformer.__version__),
    ):
        monkeypatch.setattr(sys, "argv", ["memoryformer", *words])
        ended = 0
        try:
            cli.script()
        except SystemExit as error:
            ended = error.code
        printed = capsys.readouterr()
        assert ended == code and said in printed.out + printed.err, words
        assert printed.err.count("\n") == (code != 0)


def test_mains_are_functions(capsys):
    """Imported and called, one after another and again: flags are defined, and go.

    Mutation: flags defined below `if __name__ == "__main__"`.
    """
    before = set(flags.FLAGS)
    for name, module in [*commands().items(), *commands().items()]:
        with pytest.raises(SystemExit) as ended:
            module.main([name, "--no_such_flag"])
        assert ended.value.code == 2
        assert "no_such_flag" in capsys.readouterr().err
        left = set(flags.FLAGS) - before
        assert not left & set(kinds(name)), left


def words_of(data, command):
    """A command's words, then flags with values that are mostly nonsense."""
    table = kinds(command)
    words = list(data.draw(st.sampled_from(BASES[command])))
    for name in data.draw(
        st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=2)
    ):
        value = data.draw(VALUES.get(table[name], TEXTS))
        words.append(f"--{name}={value}")
    if data.draw(st.integers(0, 2)) == 0:
        words.append("--" + data.draw(st.sampled_from(OVERRIDES)))
    return words


def tried(examples, **options):
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **options,
    )


@pytest.mark.parametrize("command", sorted(BASES))
def test_no_flag_ends_in_a_traceback(runner, folder, command):
    """Done, or one line and the code of a user's error, whatever a flag is given.

    Mutation: `_parse_flags` that catches `ValueError` alone; `lower_bound` left out.
    """

    @tried(10, derandomize=True)
    @given(st.data())
    def check(data):
        words = words_of(data, command)
        check_end(start(runner, folder, command, words), words)

    check()


@pytest.mark.parametrize(
    "words",
    [
        ("report", "utilisation", "--max_tokens=0"),
        ("convert", "recency", "--window=3", "--batches=" + "9" * 30),
    ],
)
def test_the_ends_of_a_range(runner, folder, words):
    """What the longer search below has found: 0 for all, and more than there is, are done.

    Mutations tried: `value or ""` of a flag in report; `range(batches)` in recency.
    """
    command, *words = words
    words += ["--workdir={folder}/run"]
    result = start(runner, folder, f"memoryformer.{command}", words)
    check_end(result, words)
    assert result.code == 0, result.err


@pytest.mark.parametrize("word", OVERRIDES)
def test_no_override_ends_in_a_traceback(runner, folder, word):
    """Mutation: `except flags.Error` around `define_flags` left out of `run_main`."""
    words = [CONFIG, f"--{word}"]
    check_end(start(runner, folder, "memoryformer.accounting", words), words)


@pytest.mark.parametrize("environment", SURROUNDINGS, ids=lambda e: next(reversed(e)))
def test_no_variable_ends_in_a_traceback(runner, folder, environment):
    """Half a launcher's variables, folders that are none: one line that names them.

    Mutation: `int(environment[name])`.
    """
    words = [CONFIG, "--workdir={folder}/new", "--init_timeout=0.1"]
    words += ["--config.train.num_steps=1", "--config.data.data_dir="]
    result = start(
        runner, folder, "memoryformer.training", words, environment=environment
    )
    check_end(result, environment)
    assert result.code in (2, 45)
    told = result.err.splitlines()[-1]
    assert any(
        name in told for name in (*environment, "data.data_dir", "--coordinator")
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(BASES))
def test_no_flag_ends_in_a_traceback_in_many_tries(runner, folder, command):
    """The same, longer, and otherwise each time."""

    @tried(100)
    @given(st.data())
    def check(data):
        words = words_of(data, command)
        check_end(start(runner, folder, command, words), words)

    check()
