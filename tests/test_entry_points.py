"""Commands with bad input: one clear line, the documented exit code, nothing written."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import toy

from memoryformer.runs import directory, outcome

ROOT = pathlib.Path(__file__).parent.parent
CONFIG, DATA, STORAGE = 2, 46, 45


@pytest.fixture(scope="module")
def folder(toy_run):
    """The toy run's folder, with its config as a file."""
    toy.config_file(toy_run.parent)
    return toy_run.parent


def command(runner, *arguments):
    """Run python with these arguments on one device: (exit code, stdout, stderr)."""
    if arguments[0] == "-c":
        return interpreter(*arguments)
    done = runner.command(*arguments, timeout=300)
    return done.code, done.out, done.err


def interpreter(*arguments):
    """As `command`, in a process that has imported nothing."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ
        | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "JAX_NUM_CPU_DEVICES": "1",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


TRAIN = ("train.py", "--config={folder}/toy_config.py", "--workdir={folder}/new")
SAME = ("train.py", "--config={folder}/toy_config.py", "--workdir={folder}/run")
EVAL = ("eval.py", "--workdir={folder}/run")
SAMPLE = ("-m", "memoryformer.generation", "--workdir={folder}/run")

WRITE = (
    "from memoryformer import cli\n"
    "cli.run_main(lambda argv: open('{folder}/none/x', 'w'))\n"
)

MISTAKES = {
    "unknown_key": (
        (*TRAIN, "--config.model.embed_dmi=32"),
        CONFIG,
        "--config.model.embed_dmi: the config has no such field; did you mean "
        "'model.embed_dim'?",
    ),
    "wrong_type": (
        (*TRAIN, "--config.train.num_steps=many"),
        CONFIG,
        "num_steps",
    ),
    "width_and_bits": (
        (*TRAIN, "--config.model.embed_dim=18"),
        CONFIG,
        "model.embed_dim=18 is not a multiple of model.code_bits=4: chunks of 4 values "
        "cannot cover it; try embed_dim=16 or 20.",
    ),
    "missing_data": (
        (*TRAIN, "--config.data.path={folder}/nowhere"),
        DATA,
        "nowhere",
    ),
    "vocabulary": (
        (*TRAIN, "--config.model.vocab_size=100"),
        CONFIG,
        "model.vocab_size=100: the tokenizer 'bytes' has 257 tokens",
    ),
    "bad_mesh": ((*TRAIN, "--config.mesh=fsd"), CONFIG, "did you mean 'fsdp'?"),
    "another_config": (
        (*SAME, "--config.model.score=l1"),
        CONFIG,
        "model.score: 'softmax' -> 'l1'",
    ),
    "file_as_workdir": (
        (*TRAIN[:2], "--workdir={folder}/toy_config.py"),
        STORAGE,
        "toy_config.py: cannot be used: [Errno 17] File exists",
    ),
    "unwritable_output": (("-c", WRITE), STORAGE, "none/x: No such file or directory."),
    "no_workdir": (TRAIN[:2], CONFIG, "--workdir"),
    "no_config": ((TRAIN[0], TRAIN[2]), CONFIG, "--config is missing"),
    "missing_config": (
        (TRAIN[0], "--config={folder}/none.py", TRAIN[2]),
        CONFIG,
        "none.py",
    ),
    "stray_word": ((*TRAIN, "quickly"), CONFIG, "'quickly': not a flag"),
    "unknown_flag": ((*TRAIN, "--wrokdir=x"), CONFIG, "wrokdir"),
    "eval_nothing": (
        ("eval.py", "--workdir={folder}/new"),
        STORAGE,
        "there is no directory",
    ),
    "eval_no_step": ((*EVAL, "--step=7"), STORAGE, "no step 7; there are 15, 20"),
    "eval_over_its_run": (
        (*EVAL, "--output={folder}/run/metrics.jsonl"),
        CONFIG,
        "metrics.jsonl, which would be written over",
    ),
    "eval_another_config": (
        (*EVAL, "--config={folder}/toy_config.py:dense"),
        CONFIG,
        "the checkpoint is of another config: model.projection",
    ),
    "no_tokens": (
        (*SAMPLE, "--prompt=x", "--max_tokens=0"),
        CONFIG,
        "max_tokens=0: must be >= 1",
    ),
    "no_rows": (
        (*SAMPLE, "--prompts=x", "--batch_size=0"),
        CONFIG,
        "--batch_size=0: 0 is not an integer in the range",
    ),
    "output_of_nothing": (
        (*SAMPLE, "--output={folder}/texts"),
        CONFIG,
        "--output: is of --prompts=FILE",
    ),
    "two_prompts": (
        (*SAMPLE, "--prompt=x", "--prompts=y"),
        CONFIG,
        "--prompt: --prompts names a file of prompts",
    ),
}
# The rest repeats a path through the code that one of these takes.
QUICK = ("unknown_key", "width_and_bits", "missing_data", "vocabulary")
QUICK += ("another_config", "missing_config", "no_workdir", "eval_another_config")
QUICK += ("file_as_workdir", "unwritable_output", "two_prompts", "eval_over_its_run")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in MISTAKES
    ],
)
def test_mistake(runner, folder, name):
    """Mutations: `run_main` without either except; `_check_fit` after the checkpointer;
    `data.load` before the model's config is checked.
    """
    arguments, code, message = MISTAKES[name]
    before = files(folder)
    arguments = [a.replace("{folder}", str(folder)) for a in arguments]
    returned, out, err = command(runner, *arguments)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert message in lines[0]
    assert returned == code
    assert "Traceback" not in out + err
    assert not out or out.startswith("model: ")  # what the run would have been
    # What a run was refused for is written down in its own directory, and nothing else.
    own = {"new", f"new/{directory.LOCK}", f"new/{outcome.FILE}"}
    changed = set(files(folder)) ^ set(before)
    assert all("__pycache__" in name for name in changed - own), changed


def test_debug_shows_where(runner, folder):
    """`--debug` adds the traceback, and the exit code stays.

    Mutation: `debug` not passed on to `report`.
    """
    returned, _, err = command(
        runner,
        "train.py",
        f"--config={folder}/toy_config.py",
        f"--workdir={folder}/new",
        "--config.model.embed_dim=18",
        "--debug",
    )
    assert returned == CONFIG and "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("error: model.embed_dim=18")


def test_evaluate_and_sample(runner, folder):
    """eval.py prints JSON, and the same to --output; generation prints the prompt first.

    Mutation: a progress line on standard output of eval.py.
    """
    output = folder / "out" / "eval.json"
    returned, out, err = command(
        runner, "eval.py", f"--workdir={folder}/run", f"--output={output}"
    )
    assert returned == 0, err
    result = json.loads(out)
    assert result == json.loads(output.read_text(encoding="utf-8"))
    assert result["step"] == 20 and result["val/bits_per_byte"] > 0
    assert "weights" not in result  # nothing was rounded
    returned, out, err = command(
        runner,
        "-m",
        "memoryformer.generation",
        f"--workdir={folder}/run",
        "--prompt=def ",
        "--max_tokens=5",
        "--temperature=0",
    )
    assert returned == 0, err
    assert out.startswith("def ")


TASKS = ("--workdir=w", "--tasks=piqa")
EXPORT = ("--export=e", "--tasks=piqa")
OF_TASKS = "says how to evaluate --tasks"
# Flags that would be ignored, and numbers and names that nothing can be made of.
FLAGS = (
    (("--workdir=w", "--limit=3"), f"--limit: {OF_TASKS}"),
    (("--workdir=w", "--num_fewshot=0"), f"--num_fewshot: {OF_TASKS}"),
    (("--workdir=w", "--tasks_path=."), f"--tasks_path: {OF_TASKS}"),
    (("--workdir=w", "--task_batch_size=9"), f"--task_batch_size: {OF_TASKS}"),
    (("--workdir=w", "--noadd_bos"), f"--add_bos: {OF_TASKS}"),
    ((*TASKS, "--config={folder}/toy_config.py"), "--config: tasks are scored with"),
    ((*EXPORT, "--step=3"), "--step: an export holds one step"),
    (("--export=e",), "--export: holds no validation text"),
    (("--export=e", *TASKS), "name one of --workdir=DIR and --export=DIR"),
    (("--tasks=piqa",), "name one of --workdir=DIR and --export=DIR"),
    (("--workdir=w", "--tasks="), "--tasks: name some of"),
    ((*TASKS, "--limit=-1"), "--limit=-1: -1 is not a non-negative integer"),
    (
        (*TASKS, "--task_batch_size=0"),
        "--task_batch_size=0: 0 is not a positive integer",
    ),
    (
        (*EXPORT, "--num_fewshot=-1"),
        "--num_fewshot=-1: -1 is not a non-negative integer",
    ),
    ((*TASKS, "--tasks_path=nowhere"), "--tasks_path=nowhere: there is no such folder"),
    ((*TASKS, "--output={folder}"), "--output={folder}: no file can be written there"),
    ((*TASKS, "--tables=int3"), "--tables='int3'"),
    (("--workdir=w", "--head=int3"), "--head='int3'"),
)
# Every command line in one process: its flags as after a start.
MANY = """
import contextlib, io, json, sys
from absl.testing import flagsaver
from memoryformer import cli, errors
from memoryformer.harness import __main__ as command
from memoryformer.model import narrow

def main(argv):
    try:
        command._run(argv)
    except errors.StorageError:  # what was to be evaluated is not there
        print(repr(cli.chosen(narrow.WeightKinds)), file=sys.stderr)

for line in json.loads(sys.argv[1]):
    said = io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stderr(said):
        with contextlib.suppress(SystemExit):
            cli.run_main(main, command.define_flags, ["eval.py", *line])
    print(json.dumps(said.getvalue().strip()))
"""


def test_flags_of_eval_are_served_or_refused(folder):
    """Each in one line, before anything is loaded; weights are rounded if so asked only.

    Mutations: `_refuse_unused_flags` not called; `cli.chosen` without its last line.
    """
    lines = [[a.replace("{folder}", str(folder)) for a in given] for given, _ in FLAGS]
    lines += [["--workdir=none"], ["--workdir=none", "--head=int4", "--tasks=piqa"]]
    returned, out, err = interpreter("-c", MANY, json.dumps(lines))
    assert returned == 0, err
    said = [json.loads(line) for line in out.splitlines()]
    for line, message, (_, expected) in zip(lines, said, FLAGS, strict=False):
        assert expected.replace("{folder}", str(folder)) in message, line
        assert "\n" not in message
    kinds = "WeightKinds(tables='float32', head='int4', dense='float32')"
    assert said[len(FLAGS) :] == ["None", kinds]
