"""Metrics: rows that survive restarts bit for bit, trackers, the progress line."""

import io
import json
import math
import resource
import types

import jax.numpy as jnp
import numpy as np
import pytest

from memoryformer.errors import ConfigError, StorageError
from memoryformer.runs import console, metrics, trackers
from memoryformer.runs.metrics import MetricsConfig, MetricsWriter

QUIET = MetricsConfig("")


def write_rows(workdir, steps, start_step=0):
    with MetricsWriter(workdir, QUIET, start_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1 / (step + 3)})


def test_rows_keep_full_precision(tmp_path):
    """float32 and float64 come back bit for bit; what is not finite stays readable.

    Mutation: round to six digits; or let json write NaN.
    """
    values = {
        "train/loss": jnp.float32(1) / 3,
        "val/loss": math.pi * 1e-30,
        "val/tokens": np.int64(2**53 + 1),
        "bad": float("nan"),
        "worse": jnp.float32(-jnp.inf),
    }
    with MetricsWriter(tmp_path, QUIET) as writer:
        writer.write(jnp.int32(7), values)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row["step"] == 7
    assert np.float32(row["train/loss"]) == np.float32(1) / np.float32(3)
    assert row["val/loss"] == values["val/loss"]
    assert row["val/tokens"] == 2**53 + 1
    assert math.isnan(float(row["bad"])) and float(row["worse"]) == -math.inf
    assert metrics.read(tmp_path) == [row]


def test_restart_drops_later_rows_and_half_a_line(tmp_path):
    """12 rows straight equal 8 rows, a kill, and a restart from step 5.

    Mutation: keep rows up to `start_step + 1`; or keep the broken line.
    """
    write_rows(tmp_path / "straight", range(1, 13))
    run = tmp_path / "resumed"
    write_rows(run, range(1, 9))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train/lo')
    assert [row["step"] for row in metrics.read(run)] == list(range(1, 9))
    write_rows(run, range(6, 13), start_step=5)
    straight, resumed = (
        (d / "metrics.jsonl").read_bytes() for d in (tmp_path / "straight", run)
    )
    assert straight == resumed
    assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl"]


def test_half_a_line_at_the_restored_step(tmp_path):
    """No row is later, only the last line is broken: it goes all the same.

    Mutation: rewrite only where a row is later.
    """
    write_rows(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "x": "\xff')
    write_rows(tmp_path, [3], start_step=2)
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]


def test_from_scratch_starts_an_empty_file(tmp_path):
    """Mutation: keep rows of step 0."""
    write_rows(tmp_path, [0, 1, 2])
    write_rows(tmp_path, [0, 1])
    assert [row["step"] for row in metrics.read(tmp_path)] == [0, 1]


def test_broken_bytes_cost_their_line_only(tmp_path):
    """Mutation: read strict UTF-8."""
    write_rows(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe"step"\n{"step": 3}\n')
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]


def test_rows_are_on_disk_at_once(tmp_path):
    """A killed process loses no row. Mutation: drop the flush."""
    writer = MetricsWriter(tmp_path, QUIET)
    writer.write(1, {"a": 1})
    assert [row["step"] for row in metrics.read(tmp_path)] == [1]
    writer.close()
    writer.close()


def test_comparable_leaves_out_the_wall_clock():
    """Mutation: return the row as it is."""
    row = {"step": 1, "train/loss": 2.0, "train/tokens_per_second": 3.0}
    assert metrics.comparable(row) == {"step": 1, "train/loss": 2.0}


def test_unwritable_workdir_is_a_storage_error(tmp_path):
    """Mutation: let the OSError through."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        MetricsWriter(tmp_path / "file", QUIET)
    with pytest.raises(StorageError, match="cannot be read"):
        metrics.read(tmp_path)


@pytest.fixture
def small_files():
    """Files end at 4096 bytes, as a full disk ends them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_with_its_step(tmp_path, small_files):
    """Not covered up by the flush of `close`, which fails again; the rows before stay.

    Mutation: `__exit__` without its except.
    """
    with pytest.raises(StorageError, match=r"step 3: cannot be written: .*too large"):
        with MetricsWriter(tmp_path, QUIET) as writer:
            for step in range(1, 9):
                writer.write(step, {"note": "x" * 1800})
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]


def test_what_cannot_be_flushed_at_the_end_is_told(tmp_path, small_files):
    """Mutation: let the OSError of `close` through."""
    writer = MetricsWriter(tmp_path, QUIET)
    writer._file.write("x" * 5000)
    with pytest.raises(StorageError, match=r"cannot be written: .*too large"):
        writer.close()
    writer.close()


def test_tensorboard_gets_the_numbers(tmp_path):
    """Mutation: leave out `add_scalar`."""
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path, MetricsConfig()) as writer:
        writer.write(3, {"train/loss": 2.5, "note": "text"})
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"train/loss" in content and b"note" not in content


@pytest.mark.parametrize(
    "text", ["tensorbord", "wandb", "wandb:", "tensorboard:x", "\x01"]
)
def test_trackers_that_there_are_not(text):
    """In one line. Mutation: `and` for `!=` of the project and the name."""
    assert trackers.chosen(" wandb:mine,,tensorboard") == {
        "wandb": "mine",
        "tensorboard": "",
    }
    assert trackers.chosen("") == {}
    with pytest.raises(
        ConfigError, match=r"^metrics\.trackers='.*name tensorboard"
    ) as e:
        MetricsConfig(text)
    assert "\n" not in str(e.value)


def test_wandb_is_one_run_over_restarts(tmp_path, monkeypatch, capsys):
    """The id is kept in the workdir, rows carry their own step; missing, it is done without,
    in one line.

    Mutation: a new id at each start.
    """
    config = MetricsConfig("wandb:project")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with MetricsWriter(tmp_path / "without", config) as writer:
        writer.write(1, {"train/loss": 2.0})
    (said,) = capsys.readouterr().err.splitlines()
    assert "pip install wandb" in said
    assert [row["step"] for row in metrics.read(tmp_path / "without")] == [1]

    started, logged = [], []
    run = types.SimpleNamespace(
        define_metric=lambda *a, **k: logged.append((a, k)),
        log=logged.append,
        finish=lambda: logged.append("finished"),
    )
    fake = types.SimpleNamespace(init=lambda **k: started.append(k) or run)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers.importlib, "import_module", lambda name: fake)
    for start in (0, 1):
        with MetricsWriter(tmp_path, config, start, run_config={"a": 1}) as writer:
            writer.write(start + 1, {"train/loss": 2.0})
    assert started[0]["id"] == started[1]["id"] and started[0]["resume"] == "allow"
    assert started[0]["project"] == "project" and started[0]["config"] == {"a": 1}
    assert {"step": 2, "train/loss": 2.0} in logged and logged[-1] == "finished"


def test_progress_line():
    """Mutation: the share of the steps without the factor of 100."""
    figures = [("loss", "3.412"), ("lr", console.short_power(3e-3))]
    line = console.progress_line(1200, 106418, figures)
    assert line == "step 1200/106418 (1.1%) loss 3.412 lr 3.0e-3"
    assert console.progress_line(0, 0) == "step 0/0 (0.0%)"


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0s"), (59.6, "1m00s"), (3599, "59m59s"), (7500, "2h05m"), (2e5, "2d07h")],
)
def test_short_time(seconds, text):
    """Mutation: drop a modulus."""
    assert console.short_time(seconds) == text


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (51500, "51.5k"),
        (412e3, "412k"),
        (2.5e6, "2.50M"),
    ],
)
def test_short_number(number, text):
    """Mutation: compare with `size` itself (999.6 becomes 1e+03)."""
    assert console.short_number(number) == text


def test_progress_overwrites_itself_on_a_terminal_only(monkeypatch):
    """A file gets whole lines; a terminal one line, cut to its width.

    Mutation: always print; or never cut.
    """
    monkeypatch.setenv("COLUMNS", "30")
    log = io.StringIO()
    printer = console.ProgressPrinter(log)
    printer.update("x" * 50)
    printer.note("saved")
    printer.close()
    assert log.getvalue() == "x" * 50 + "\nsaved\n"

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    printer = console.ProgressPrinter(terminal)
    printer.update("x" * 50)
    printer.update("y")
    printer.note("saved")
    printer.update("z")
    printer.close()
    erase = "\x1b[K"
    assert terminal.getvalue() == (
        f"\r{'x' * 29}{erase}\ry{erase}\r{erase}saved\n\rz{erase}\n"
    )
