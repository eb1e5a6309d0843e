"""Command lines of the benchmarks: what is wrong is one line, and nothing is measured."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MODULES = sorted(
    "benchmarks."
    + ".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if "\nFLAGS = arguments.Parser(" in path.read_text("utf-8")
)
COMMANDS = [module.removesuffix(".__main__") for module in MODULES]
NEEDED = {"benchmarks.compiled": ["gpu"], "benchmarks.converted": ["runs/none"]}
NEEDED["benchmarks.gpu_day"] = ["checks"]
# Every line is tried in one process: a command ends where it would import what it measures.
MANY = """
import contextlib, io, json, runpy, sys

class Measures(BaseException):
    pass

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name in ("jax", "torch", "memoryformer.data"):
            raise Measures(name)

sys.meta_path.insert(0, Stop())
for module, words in json.load(sys.stdin):
    before = set(sys.modules)
    out, err, code = io.StringIO(), io.StringIO(), "measures"
    sys.argv = [module, *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code
        except Measures:
            pass
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
# The same with what it measures, in a fork of a process that has imported it.
LOOKED_UP = """
import contextlib, importlib, io, json, pathlib, sys

for module, words in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    err, code = io.StringIO(), "measures"
    with contextlib.redirect_stderr(err):
        try:
            importlib.import_module(module).main(words)
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([module, words, code, err.getvalue()]))
"""
WRONG = {
    "number": (
        "x",
        "",
        "-1",
        "1.5",
        "nan",
        "1e30",
        "9" * 30,
        "9" * 5000,
        "1_0",
        "\u0663",
    ),
    "numbers": ("x", "", "0", "-1", "1,x", "1,,2", "1,1", ",", "9" * 30, "1.5"),
    "real": ("x", "", "-1", "nan", "inf", "-inf"),
    "output": ("", "none/x.json", "benchmarks"),
}


def flags_of(module, kind):
    """Names of the flags of a kind that a benchmark defines."""
    path = ROOT / (module.replace(".", "/") + ".py")
    start = f"FLAGS.{kind}("
    lines = path.read_text("utf-8").splitlines()
    return [line.split('"')[1] for line in lines if line.startswith(start)]


@pytest.fixture(scope="module")
def ended():
    """{(command, word, ..): (exit code, output, error)} of all wrong lines, and of --help."""
    asked = [(command, ["--help"]) for command in COMMANDS]
    for module, command in zip(MODULES, COMMANDS, strict=True):
        needed = NEEDED.get(command, [])
        asked.append((command, [*needed, "--wrong=1"]))
        for kind, values in WRONG.items():
            for name in flags_of(module, kind):
                asked += [(command, [*needed, f"--{name}={v}"]) for v in values]
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(asked),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers = map(json.loads, done.stdout.splitlines())
    return {
        (command, *words): answer
        for (command, words), answer in zip(asked, answers, strict=True)
    }


def check_one_line(code, err):
    assert code == 2, (code, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert len(err) < 600


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_numbers_end_in_one_line_before_jax_is_imported(ended, command):
    """And `--help` says how a benchmark is used, with nothing of what it measures.

    Mutations tried: `import jax` above `FLAGS`; `int(text)` alone in `_whole`; `_once` left out;
    `error` of argparse; `_writable` without its check.
    """
    asked = {line[1:]: answer for line, answer in ended.items() if line[0] == command}
    code, out, err = asked.pop(("--help",))
    assert code == 0 and out.startswith(f"usage: python -m {command}") and not err
    for words, (code, _, err) in asked.items():
        flag, _, value = words[-1].partition("=")
        if (flag, value) in (("--plot", ""), ("--json", ""), ("--png", "")):
            assert code == "measures", (words, err)  # no file
            continue
        check_one_line(code, err)
        assert flag in err, words


def test_wrong_names_end_in_one_line(runner, tmp_path):
    """Flag, value, and what there is; an empty list and one with a name twice too.

    Mutations tried: `chosen` without its loop; without `_once`; a list without what all are
    compared with.
    """
    asked = []
    for module, command in zip(MODULES, COMMANDS, strict=True):
        for name in flags_of(module, "names"):
            for value in ("nonsense", "", ","):
                words = [*NEEDED.get(command, []), f"--{name}={value}"]
                asked.append((module, words))
    assert len(asked) >= 3 * 12
    asked.append(("benchmarks.train_step", ["--arms=xla,dense,xla"]))
    asked.append(("benchmarks.head", ["--kinds=w8a8"]))
    asked.append(("benchmarks.communication", ["--programs=memory"]))
    asked.append(("benchmarks.decode_length", ["a.json"]))
    asked.append(("benchmarks.decode.__main__", ["a.json"]))
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / "many.py").write_text(LOOKED_UP)
    done = runner.command(tmp_path / "many.py", tmp_path / "asked.json", timeout=240)
    assert done.code == 0, done.err
    for line in done.out.splitlines():
        _, words, code, err = json.loads(line)
        check_one_line(code, err)
        flag, equals, value = words[-1].partition("=")
        assert (flag in err and value.split(",")[0] in err) or not equals, err
        said = ("is none of", "named twice", "--plot", "with which all are compared")
        assert any(reason in err for reason in said), err
    assert len(done.out.splitlines()) == len(asked)


def test_results_that_are_no_results_are_refused_in_one_line(tmp_path, monkeypatch):
    """A file that is not there, or holds no JSON; the house's exit codes.

    Mutation tried: `json.loads` alone in `read_json`.
    """
    from benchmarks import arguments

    (tmp_path / "broken.json").write_text("{")
    for name, code in (("none.json", 45), ("broken.json", 46)):
        with pytest.raises(SystemExit) as ended:
            arguments.run(lambda name=name: arguments.read_json(tmp_path / name))
        assert ended.value.code == code
