"""How runs end: what is told, what is saved, and that files and exit code say the same."""

import contextlib
import importlib
import json
import os
import re
import sys
import types

import jax.numpy as jnp
import pytest
import toy

from memoryformer import cli
from memoryformer.cluster import launchers, roll_call
from memoryformer.errors import ConfigError, NumericError, StorageError
from memoryformer.runs import console, metrics, outcome, trackers
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment, loop, spikes

FOREIGN = {
    "broken pipe": (BrokenPipeError(32, "Broken pipe"), 45),
    "full disk": (OSError(28, "No space left on device", "/x"), 45),
    "no memory": (MemoryError(), 2),
    "no device memory": (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes\nmore"), 2),
    "a user's": (NumericError("step 3"), 44),
    "bug": (KeyError("x"), 1),
}


def leave(error):
    raise error


@pytest.mark.parametrize("name", FOREIGN)
def test_outcome_and_exit_code_agree(tmp_path, capsys, name):
    """outcome.json has the code that the process ends with, whatever was raised.

    Mutation: `error.exit_code if isinstance(error, MemoryFormerError) else 1`.
    """
    error, code = FOREIGN[name]
    with pytest.raises(type(error)), outcome.recorded(tmp_path):
        leave(error)
    assert outcome.read(tmp_path)["exit_code"] == code
    ended = pytest.raises(type(error) if code == 1 else SystemExit)
    with ended as caught:
        cli.run_main(lambda argv: leave(error), argv=["x"])
    if code != 1:
        assert caught.value.code == code
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"state": "failed"}',
        '{"state": "odd"}',
        '{"state": ["done"]}',
        '{"state": "failed", "exit_code": "x", "error": ""}',
        "[" * 100_000,
    ],
)
def test_an_outcome_that_makes_no_sense_is_none(tmp_path, text):
    """Mutation: `facts if "state" in facts`; RecursionError let out of `read_json`."""
    (tmp_path / outcome.FILE).write_text(text)
    assert outcome.read(tmp_path) is None


@contextlib.contextmanager
def nobody_reads(monkeypatch):
    """Standard output and error whose reader is gone, as behind `| head`.

    No fixture: pytest sets the streams anew when a test is called.
    """
    streams = []
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        streams.append(os.fdopen(writer, "w"))
        monkeypatch.setattr(sys, name, streams[-1])
    yield streams
    monkeypatch.undo()
    for stream in streams:
        stream.close()  # what is left in it goes nowhere, or this would fail


def test_training_goes_on_where_nobody_reads(tmp_path, monkeypatch):
    """To its end, with every row; the streams come back.

    Mutation: `unbroken` without `silence`, or around nothing.
    """
    toy.corpus(tmp_path / "corpus")
    config = toy.run_config(tmp_path, **{"train.num_steps": 4, "train.log_every": 1})
    with nobody_reads(monkeypatch) as streams:
        with pytest.raises(BrokenPipeError):
            print("to standard error", file=sys.stderr, flush=True)
        with console.unbroken():
            loop.train(config, tmp_path / "run")
            print("to standard error too", file=sys.stderr, flush=True)
        assert sys.stdout is streams[0]
    assert outcome.read(tmp_path / "run") == {"state": "done"}
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]


def test_no_streams_at_all(monkeypatch):
    """A process that was started without them. Mutation: `self._stream.write` of None."""
    monkeypatch.setattr(sys, "stdout", None)
    with console.unbroken():
        print("x", flush=True)
        assert not sys.stdout.isatty()
        console.ProgressPrinter().note("x")


def test_fewer_steps_than_there_are(toy_run, tmp_path):
    """Refused, in a line, and the run stays what it was.

    Mutation: the check in `_restore` left out, which says "done".
    """
    config = toy.run_config(
        toy_run.parent,
        **{"train.num_steps": 10, "optimizer.schedule_options.decay_steps": 20},
    )
    allow = ["train.num_steps", "optimizer.schedule_options.decay_steps"]
    with pytest.raises(ConfigError, match=r"num_steps=10: .* is at step 20"):
        loop.train(config, toy_run, allow=allow)
    assert outcome.read(toy_run) == {"state": "done"}


@pytest.mark.parametrize("value", [1e39, float("inf"), float("nan"), 1e-50])
def test_numbers_that_float32_has_not(tmp_path, value):
    """Mutation: `_is_float32` asks for a number alone."""
    for field in ("optimizer.learning_rate", "optimizer.eps", "train.timeout_scale"):
        with pytest.raises(ConfigError, match=rf"^{field}=.*float32"):
            experiment.resolve(toy.run_config(tmp_path, **{field: value}))


def test_parameters_that_are_no_numbers_are_not_saved(tmp_path):
    """A rate that float32 just holds: loss and gradient of the first step are finite.

    Mutation: `_save` without the question.
    """
    toy.corpus(tmp_path / "corpus")
    fields = {"optimizer.learning_rate": 3e38, "checkpoint.every_steps": 1}
    fields |= {"optimizer.weight_decay": 100.0}
    with pytest.raises(NumericError):
        loop.train(toy.run_config(tmp_path, **fields), tmp_path / "run")
    assert outcome.read(tmp_path / "run")["exit_code"] == 44
    with pytest.raises(StorageError, match="no finished checkpoint"):
        run_steps.load(tmp_path / "run")
    assert spikes.are_finite({"a": jnp.ones(3)})
    for wrong in (jnp.nan, jnp.inf):
        assert not spikes.are_finite({"a": jnp.ones(3), "b": jnp.full(2, wrong)})


class Tracker:
    """A wandb that fails at one of its calls."""

    def __init__(self, fails):
        self.fails, self.rows = fails, []

    def init(self, **unused):
        self._do("init")
        return types.SimpleNamespace(
            define_metric=lambda *a, **k: None, log=self.log, finish=self.finish
        )

    def log(self, row):
        self._do("log")
        self.rows.append(row)

    def finish(self):
        self._do("finish")

    def _do(self, what):
        if what == self.fails:
            raise RuntimeError("no network\nand a page of it")


@pytest.mark.parametrize("fails", ["init", "log", "finish", ""])
def test_a_tracker_may_fail(tmp_path, monkeypatch, capsys, fails):
    """Not logged in, unreachable, gone: one line, and metrics.jsonl has every row.

    Mutation: `except Exception` of `Tracker` for `except OSError`.
    """
    fake = Tracker(fails)
    real = importlib.import_module
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        trackers.importlib,
        "import_module",
        lambda name: fake if name == "wandb" else real(name),
    )
    config = metrics.MetricsConfig("wandb:project")
    with metrics.MetricsWriter(tmp_path, config) as writer:
        for step in (1, 2):
            writer.write(step, {"train/loss": 1.0})
    told = capsys.readouterr().err
    assert told.count("\n") == bool(fails)
    assert ("gets no more metrics" in told) == bool(fails)
    assert len(fake.rows) == (0 if fails in ("init", "log") else 2)
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]


def test_rows_that_are_no_rows_are_left_out(tmp_path):
    """Mutation: any JSON object taken for a row."""
    lines = ['{"step": 1, "train/loss": 2.0}', '{"step": 2, "train/loss": null}', "7"]
    lines += [f'{{"step": 6, "train/loss": 1{"0" * 400}}}', f'{{"step": 1{"0" * 400}}}']
    lines += ['{"step": "x"}', "[" * 100_000, '{"step": 3, "train/loss": "nan"}', "{}"]
    lines += [
        '{"step": 4, "val/loss": [1]}',
        json.dumps({"step": 5, "note": "a\u2028b"}),
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 3, 5]


STEP = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "4100", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "variables, found",
    [
        ({"SLURM_NTASKS": "2"}, ("n1:61444", 2, 0)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"}, ("n1:61444", 2, 0)),
        # The shell of `salloc -n4`, in an interactive step of SLURM 20.11 and later.
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "4294967290"}, None),
        ({"SLURM_NTASKS": ""}, None),
    ],
)
def test_a_lone_process_in_a_shell_of_salloc(variables, found):
    """It waits for nobody. Mutation: SLURM_NTASKS first."""
    assert launchers.from_slurm(STEP | variables) == found
    nowhere = STEP | variables | {"SLURM_STEP_NODELIST": ""}
    assert launchers.from_slurm(nowhere) is None


@pytest.mark.parametrize(
    "name, text",
    [
        ("SLURM_PROCID", ""),
        ("SLURM_PROCID", "2"),
        ("SLURM_JOB_ID", "x"),
        ("SLURM_JOB_ID", "²"),
        ("SLURM_NTASKS", "two"),
        ("SLURM_STEP_NODELIST", "["),
        ("JAX_COORDINATOR_PORT", "x"),
    ],
)
def test_half_set_variables_are_named(name, text):
    """Mutation: `int(environment[name])`."""
    variables = STEP | {"SLURM_NTASKS": "2", name: text}
    with pytest.raises(ConfigError, match=rf"^{name}='{re.escape(text)}'"):
        launchers.from_slurm(variables)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_time_limits_that_are_none(seconds):
    """Mutation: the limit checked behind `auto`."""
    with pytest.raises(ConfigError, match="--init_timeout"):
        roll_call.start("auto", timeout=seconds)


@pytest.mark.parametrize(
    "host", ["x" * 70 + ":1", "a..b:1", "h:²", "\0:1", ":1", "h:0"]
)
def test_addresses_that_are_none(host):
    """Mutation: `isdigit`, which takes a raised two; names that no host can have."""
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        roll_call.start(host, 2, 1, timeout=1.0)
