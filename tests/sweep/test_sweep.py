"""Sweeps: what their points are, that they share what is compiled, how they end."""

import csv
import fcntl
import hashlib
import io
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import toy
from absl import flags

from memoryformer import cli, sharding
from memoryformer.errors import ConfigError, NumericError, Preempted
from memoryformer.runs import compatibility, metrics, outcome
from memoryformer.sweep import (
    best,
    commands,
    files,
    old_names,
    points,
    runner,
    statistics,
    worker,
)
from memoryformer.training import experiment
from memoryformer.training import programs as programs_lib

ROOT = pathlib.Path(__file__).parents[2]
SWEEPS = '''

def sweep_seed():
    """Seeds."""
    for seed in range(3):
        yield {"train.seed": seed}

def sweep_rate():
    for rate in (1e-3, 2e-3, 3e-3, 4e-3):
        yield {"optimizer.learning_rate": rate}

def sweep_same_rates():
    yield {"label": "other name", "optimizer.learning_rate": 2e-3}

def sweep_width(projection):
    for width in (16, 32):
        yield {"label": f"{projection}{width}", "model.embed_dim": width}

def sweep_sides():
    for score in ("softmax", "l1_softmax"):
        for rate in (1e-3, 2e-3, 4e-3):
            label = f"{score}, lr={rate:g}"
            fields = {"model.score": score, "optimizer.learning_rate": rate}
            yield {"label": label, **fields}

def sweep_twins():
    yield {"model.code_bits": 4}
    yield {}

def sweep_wrong():
    yield {"model.embed_dim": 18}

def sweep_misspelt():
    yield {"model.embed_dims": 32}

def sweep_old_field():
    yield {"model.luna_slots": 3}

def sweep_mixers():
    for mixer in ("luna", "linformer"):
        yield {"model.mixer": mixer}

def sweep_explodes():
    yield {"optimizer.learning_rate": 1e-3}
    yield {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0}

def sweep_none():
    return ()
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    toy.corpus(folder / "corpus")
    path = toy.config_file(folder)
    path.write_text(path.read_text() + SWEEPS)
    return folder


def expand(folder, *names, argument="", root="", **base):
    config = f"{folder / 'toy_config.py'}" + (f":{argument}" if argument else "")
    return points.expand(config, names, root or folder / "runs", base)


def train(point):
    """Train one point in this process."""
    config = compatibility.plain(experiment.as_dict(point.run))
    return worker.train(config, str(point.workdir))


def test_product_of_sweeps(folder):
    """Every combination, the last sweep fastest; labels, names of directories.

    Mutation: `zip` in place of `itertools.product`.
    """
    sweep = expand(folder, "width", "seed", argument="memory")
    assert len(sweep.points) == 6
    assert [p.run.train.seed for p in sweep.points] == [0, 1, 2] * 2
    assert [p.run.model.embed_dim for p in sweep.points] == [16] * 3 + [32] * 3
    assert {p.variant for p in sweep.points} == {"memory16", "memory32"}
    first = sweep.points[0].workdir
    assert first.parent == folder / "runs" / "toy_config-memory" / "width-seed"
    assert first.name.startswith("memory16_seed=0-")
    assert shlex.quote(first.name) == first.name


def test_directories_are_named_by_content(folder):
    """The same run has the same hash whatever it is called, another one another hash; what
    changes no number (here, where to log) changes no name.

    Mutations: the label hashed; `optimizer.learning_rate` declared to change nothing;
    `data.tokenizer` out of `NAMING`.
    """
    plain = [p.workdir.name for p in expand(folder, "rate").points]
    named = expand(folder, "same_rates").points[0].workdir.name
    assert named[-8:] == plain[1][-8:] and named[:-8] != plain[1][:-8]
    assert len({name[-8:] for name in plain}) == 4
    quiet = expand(folder, "rate", **{"train.log_every": 3})
    assert [p.workdir.name for p in quiet.points] == plain
    for changed in ({"train.batch_size": 16}, {"data.tokenizer": "bpe:300"}):
        other = expand(folder, "rate", **changed)
        assert not {p.workdir.name for p in other.points} & set(plain)


def test_what_another_sweep_trained_is_not_trained_again(folder, tmp_path):
    """Mutation: `_directory` returns its own directory always."""
    done = expand(folder, "rate", root=tmp_path).points[1].workdir
    done.mkdir(parents=True)
    assert expand(folder, "same_rates", root=tmp_path).points[0].workdir == done


# What moved of a model's fields, as older code resolved and named them.
OLD_FIELDS = {
    "model.conv_luna_filter": "conv",
    "model.conv_luna_width": 4,
    "model.cosformer_max_len": 0,
    "model.dape_width": 32,
    "model.linformer_max_len": 0,
    "model.linformer_slots": 64,
    "model.logit_transform": "none",
    "model.luna_slots": 64,
    "model.memformer_temperature": 0.5,
    "model.performer_draw": 0,
    "model.performer_features": 256,
    "model.performer_redraw_every": 0,
    "model.performer_seed": 0,
    "model.recurrence_bptt": 0,
    "model.recurrence_chunk": 0,
    "model.recurrence_slots": 16,
    "model.trained_kernel_layers": 3,
}


@pytest.mark.parametrize(
    "base, old",
    [
        ({}, {}),
        ({"model.mixer": "linear"}, {}),
        (
            {"model.mixer": "luna", "model.mixer_options.num_slots": 5},
            {"model.luna_slots": 5},
        ),
        (
            {"model.mixer": "performer", "model.mixer_options.redraw_every": 7},
            {"model.performer_redraw_every": 7},
        ),
        (
            {"model.recurrence": "memformer", "data.align_documents": 4},
            {"model.recurrence_slots": 16},
        ),
    ],
)
def test_points_of_older_sweeps_are_found(folder, tmp_path, base, old):
    """Under the digest of the flat fields, which options of mixers were then.

    Mutations: the digest of today alone; the two fields of random features left out; the
    option of another mixer with the value of this one's.
    """
    point = expand(folder, "rate", root=tmp_path, **base).points[0]
    nested = ("model.mixer_options", "model.recurrence_options")
    fields = old_names.spellings(json.loads(points.identity(point, without=())))[0]
    flat = {k: v for k, v in fields.items() if not k.startswith(nested)}
    text = json.dumps(flat | OLD_FIELDS | old, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    done = point.workdir.with_name(f"{point.workdir.name[:-8]}{digest}")
    done.mkdir(parents=True)
    again = expand(folder, "rate", root=tmp_path, **base)
    assert again.points[0].workdir == done
    assert again.points[1].workdir.name[-8:] != digest


@pytest.mark.parametrize(
    "names, message",
    [
        (["sed"], "--sweep='sed': unknown choice; did you mean 'seed'?"),
        (["rate", "same_rates"], "'same_rates' sets optimizer.learning_rate, and so"),
        (["twins"], "points 0 and 1 are the same run"),
        (["wrong"], "point 0 (embed_dim=18): model.embed_dim=18 is not a multiple"),
        (["misspelt"], "model.embed_dims: the config has no such field; did you mean"),
        (
            ["old_field"],
            "model.luna_slots: is no longer a field; set model.mixer_options",
        ),
        (["none"], "--sweep=none: has no points"),
    ],
)
def test_mistakes_are_one_line(folder, names, message):
    """Mutations: `_refuse_twins` not called; a later sweep's field wins."""
    with pytest.raises(ConfigError) as caught:
        expand(folder, *names)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_commands_without_a_sweep(folder, capsys):
    """`list` says what there is; the other words ask for a name; a near miss is named.

    Mutation: `list` expands an empty product.
    """
    config = str(folder / "toy_config.py")
    arguments = (config, [], str(folder / "runs"), {}, commands.Options())
    assert commands.main(["list"], *arguments) == 0
    assert "seed        Seeds." in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--sweep is missing: .* defines seed, rate"):
        commands.main(["run"], *arguments)
    with pytest.raises(ConfigError, match="did you mean 'status'"):
        commands.main(["statis"], *arguments)
    with pytest.raises(ConfigError, match="name one of list, check, print"):
        commands.main([], *arguments)


def as_read(argv):
    """The config that a command makes of a command line."""
    found = []
    with pytest.raises(SystemExit) as ended:
        cli.run_main(
            lambda argv: found.append(flags.FLAGS.config), cli.define_config_flag, argv
        )
    assert not ended.value.code
    return found[0]


def test_print_gives_commands_that_make_the_points(folder, capsys):
    """Each line, read as a shell and the command do, resolves to its point; `index` picks one.

    Mutation: overrides of the command line left out of the lines.
    """
    sweep = expand(
        folder, "width", "seed", argument="dense", **{"train.batch_size": 16}
    )
    commands.show_commands(sweep, commands.Options())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    for line, point in zip(lines, sweep.points, strict=True):
        python, flag, module, config, workdir, *overrides = shlex.split(line)
        assert [python, flag, module] == ["python", "-m", "memoryformer.training"]
        assert workdir == f"--workdir={point.workdir}"
        read = as_read([module, config, *overrides])
        assert read.train.batch_size == 16
        assert experiment.resolve(read) == point.run
    commands.show_commands(sweep, commands.Options(index=4))
    assert capsys.readouterr().out.splitlines() == [lines[4]]
    with pytest.raises(ConfigError, match="--index=6: the sweep has 6 points"):
        commands.show_commands(sweep, commands.Options(index=6))


def test_options_of_the_command_line_stay_with_a_mixer_of_a_point(folder):
    """`run` and `print` train the same model. Mutation: base and point overridden in turn."""
    sweep = expand(folder, "mixers", **{"model.mixer_options.num_slots": 5})
    assert [p.run.model.mixer_options.num_slots for p in sweep.points] == [5, 5]
    for point in sweep.points:
        words = shlex.split(points.command(sweep, point))
        overrides = [word for word in words if word.startswith("--config.")]
        read = as_read(["train", f"--config={sweep.config}", *overrides])
        assert experiment.resolve(read) == point.run


def test_check_builds_every_point(folder, capsys):
    """Sizes in its table; a point that does not fit its mesh is named; nothing is written.

    Mutation: `check` without `training.programs.make`.
    """
    sweep = expand(folder, "rate", "seed", root="/nowhere")
    commands.check(sweep, commands.Options())
    out = capsys.readouterr().out
    assert "12 points are sound, of 1 compiled programs." in out
    wrong = expand(folder, "rate", **{"train.num_microbatches": 3})
    with pytest.raises(
        ConfigError, match=r"point 0 .*num_microbatches=3 does not divide"
    ):
        commands.check(wrong, commands.Options())


def test_twelve_points_compile_once(folder, tmp_path):
    """Learning rate x seed in one process: the first point compiles, the others nothing.
    And each is what it would be alone, to the bit.

    Mutations: `dataclasses.replace(run.train, seed=0)` left out of `training.programs.program`;
    `hyper` not passed to the step.
    """
    short = {"train.num_steps": 4, "eval.every_steps": 0, "checkpoint.every_steps": 0}
    sweep = expand(folder, "rate", "seed", root=tmp_path, **short)
    requests = [
        json.dumps(
            {
                "index": point.index,
                "config": compatibility.plain(experiment.as_dict(point.run)),
                "workdir": str(point.workdir),
            }
        )
        for point in sweep.points
    ]
    replies, programs = io.StringIO(), programs_lib.Cache()
    worker.serve(requests, replies, programs)
    replies = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert [reply["code"] for reply in replies] == [0] * 12
    assert replies[0]["compilations"] > 0
    assert [reply["compilations"] for reply in replies[1:]] == [0] * 11
    run = sweep.points[0].run
    shared = programs.programs(run, sharding.make(run.mesh), None)
    assert shared.train_step._cache_size() == 1
    losses = {p.index: files.values(p.workdir, ["val/loss"]) for p in sweep.points}
    assert len({loss["val/loss"] for loss in losses.values()}) == 12
    alone = expand(folder, "rate", "seed", root=tmp_path / "alone", **short).points[7]
    assert train(alone) == (0, "")
    assert files.values(alone.workdir, ["val/loss"]) == losses[7]
    rows = metrics.read(alone.workdir)
    assert max(row.get("train/learning_rate", 0) for row in rows) <= 3e-3


def start_run(sweep, *arguments):
    """Start `sweep run` as a process of its own."""
    command = [sys.executable, "-m", "memoryformer.sweep", f"--config={sweep.config}"]
    command += [
        f"--sweep={','.join(sweep.names)}",
        f"--root={sweep.directory.parents[1]}",
    ]
    command += [f"--config.{key}={value}" for key, value in sweep.base.items()]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command += [*arguments, "run"]
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_free(path):
    """Whether no process holds the lock."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_killed_run_leaves_no_process_behind(folder, tmp_path):
    """After SIGKILL of the sweep its process saves and ends by itself, without a word on the
    terminal; the same command then goes on from there, and nothing has failed.

    Mutations: `end_with` not started; `BrokenPipeError` not caught (a traceback).
    """
    endless = {"train.num_steps": 20_000, "eval.every_steps": 0}
    endless |= {"checkpoint.every_steps": 0, "train.log_every": 50}
    sweep = expand(folder, "same_rates", root=tmp_path, **endless)
    [point] = sweep.points
    first = start_run(sweep)
    wait_for(lambda: files.state(point).step or first.poll() is not None)
    first.kill()
    out = first.communicate(timeout=60)[0]  # until the worker, too, has closed its end
    assert re.search("started as process [0-9]+\n$", out), out
    assert is_free(point.workdir / "lock")
    saved = max(int(p.name) for p in (point.workdir / "checkpoints").glob("[0-9]*"))
    assert files.state(point).name == "partial" and saved >= files.state(point).step
    second = start_run(sweep)
    wait_for(lambda: files.state(point).step > saved or second.poll() is not None)
    second.send_signal(signal.SIGTERM)
    out = second.communicate(timeout=60)[0]
    assert second.returncode == 42 and "failed" not in out, out
    steps = [row["step"] for row in metrics.read(point.workdir)]
    assert steps == sorted(set(steps))


# Answers the first request for point 1 as a worker does that finds the point locked.
BUSY_WORKER = """
import json, pathlib, sys
for line in sys.stdin:
    request = json.loads(line)
    folder = pathlib.Path(request["workdir"])
    folder.mkdir(parents=True, exist_ok=True)
    tries = folder / "tries"
    tried = tries.exists()
    with tries.open("a") as file:
        file.write("x")
    locked = not tried and request["index"] == 1
    code, error = (-1, "another process trains it") if locked else (0, "")
    reply = {"index": request["index"], "code": code, "error": error}
    print(json.dumps(reply | {"compilations": 0, "seconds": 0.0}), flush=True)
"""


def test_locked_points_are_tried_again(folder, tmp_path, monkeypatch):
    """A point that another process has comes last, and is not failed; if that one has
    trained it to the end meanwhile, it is left alone.

    Mutations: no `elif code == LOCKED`; locked points not put last; `_leave_out_done` away.
    """
    monkeypatch.setattr(worker, "LOCK_SECONDS", 0.3)
    [point, *_] = expand(folder, "rate", root=tmp_path / "a").points
    point.workdir.mkdir(parents=True)
    with (point.workdir / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert train(point) == (worker.LOCKED, "another process trains it")
    assert worker.LOCKED == -1 and outcome.read(point.workdir) is None

    command = [sys.executable, "-c", BUSY_WORKER]
    monkeypatch.setattr(runner, "WORKER", command)
    sweep = expand(folder, "width", "rate", argument="memory", root=tmp_path / "b")
    stream = io.StringIO()
    assert runner.run(sweep, stream=stream) == 0
    out = stream.getvalue()
    assert out.count("done (") == 8 and "failed" not in out
    first, last = out.index("[2/8]"), out.rindex("[2/8]")
    assert first < out.index("it is tried again later") < out.index("[3/8]")
    assert last > out.rindex("[8/8]")
    assert (sweep.points[1].workdir / "tries").read_text() == "xx"

    sweep = expand(folder, "rate", root=tmp_path / "c")
    sweep.points[1].workdir.mkdir(parents=True)

    class Other(io.StringIO):
        """Ends point 1, as another process would, when it was found locked."""

        def write(self, text):
            if "tried again" in text:
                path = sweep.points[1].workdir / outcome.FILE
                path.write_text('{"state": "done"}')
            return super().write(text)

    stream = Other()
    assert runner.run(sweep, stream=stream) == 0
    assert "done by another process" in stream.getvalue()
    assert (sweep.points[1].workdir / "tries").read_text() == "x"


def test_run_stops_resumes_and_skips(folder, tmp_path, capsys):
    """A sweep that is stopped half-way says 42 and goes on where it was; a third run has
    nothing to do; results are those of points trained alone.

    Mutations: `files.state` says 'new' for all; code 42 listed as a failure.
    """
    slow = {"train.num_steps": 60, "eval.every_steps": 0, "checkpoint.every_steps": 0}
    sweep = expand(folder, "seed", root=tmp_path, **slow)
    first = start_run(sweep, "--parallel=2")
    while first.poll() is None and not any(
        files.state(point).step for point in sweep.points
    ):
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    out = first.communicate(timeout=120)[0]
    assert first.returncode == 42, out
    assert "run the same command to go on" in out
    assert any(files.state(point).name == "partial" for point in sweep.points)
    second = start_run(sweep)
    assert "done (" in second.communicate(timeout=240)[0]
    assert second.returncode == 0
    assert [files.state(point).name for point in sweep.points] == ["done"] * 3
    stream = io.StringIO()
    assert runner.run(sweep, stream=stream) == 0
    assert stream.getvalue().count("done before") == 3
    assert "started" not in stream.getvalue()
    commands.status(sweep, commands.Options())
    assert "3 done, 0 failed, 0 partial, 0 new" in capsys.readouterr().out
    steps = [row["step"] for row in metrics.read(sweep.points[0].workdir)]
    assert steps == sorted(steps) and steps[-1] == 60


def test_failed_points_are_listed(folder, tmp_path):
    """A loss that is not finite fails its point alone, once; `retry_failed` tries again.

    Mutations: `outcome.recorded` writes nothing; the first failure ends the sweep.
    """
    short = {"train.num_steps": 6, "eval.every_steps": 0}
    sweep = expand(folder, "explodes", root=tmp_path, **short)
    codes, texts = [], []
    for retry in (False, False, True):
        stream = io.StringIO()
        codes.append(runner.run(sweep, retry_failed=retry, stream=stream))
        texts.append(stream.getvalue())
    assert codes == [44] * 3
    assert [files.state(p).name for p in sweep.points] == ["done", "failed"]
    assert files.state(sweep.points[1]).exit_code == 44
    assert ["started" in text for text in texts] == [True, False, True]
    assert all("not finite" in text for text in texts)
    log = (sweep.points[1].workdir / "log.txt").read_text()
    assert log.count("error: ") == 2


def test_outcome(tmp_path):
    """Stopped runs leave none; a refused config leaves what was there.

    Mutations: `except Exception` before `except Preempted`; `before` not put back.
    """
    with outcome.recorded(tmp_path):
        assert outcome.read(tmp_path) is None
    assert outcome.read(tmp_path) == {"state": "done"}
    with pytest.raises(ConfigError), outcome.recorded(tmp_path):
        raise ConfigError("another config")
    assert outcome.read(tmp_path) == {"state": "done"}
    with pytest.raises(NumericError), outcome.recorded(tmp_path):
        raise NumericError("nan")
    assert outcome.read(tmp_path)["exit_code"] == 44
    with pytest.raises(Preempted), outcome.recorded(tmp_path):
        raise Preempted("asked")
    assert outcome.read(tmp_path) is None


def fake_results(sweep, values):
    """Write what a run leaves, without running."""
    for point, value in zip(sweep.points, values, strict=True):
        point.workdir.mkdir(parents=True)
        row = {"step": 20, "train/loss": 1.0, "val/loss": value}
        row |= {"val/bits_per_byte": value, "train/tokens_per_second": 5.0}
        (point.workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (point.workdir / "outcome.json").write_text('{"state": "done"}')


def test_one_seed_has_no_spread(folder, tmp_path):
    """Means and differences stand alone. Mutation: `with_spread` writes nan."""
    sweep = expand(folder, "width", argument="memory", root=tmp_path)
    fake_results(sweep, [2.0, 1.5])
    text = statistics.collect(sweep)
    assert "| memory16 | 1 | 2.0000 | baseline | |" in text
    assert "| memory32 | 1 | 1.5000 | -0.5 | one seed |" in text
    assert "noise floor: not known" in text and "nan" not in text


def test_collect(folder, tmp_path):
    """Mean, s.d. with n - 1, differences with their standard errors, and a CSV file.

    Mutations: `statistics.pstdev`; sqrt(1/n) in place of sqrt(1/n + 1/m).
    """
    sweep = expand(folder, "width", "seed", argument="memory", root=tmp_path)
    values = [2.0, 2.1, 2.2, 1.5, 1.6, 1.4]
    fake_results(sweep, values)
    text = statistics.collect(sweep)
    assert "6 of 6 points are done" in text
    assert "| memory16 | 3 | 2.1000 ± 0.1 | baseline | |" in text
    error = 0.1 * np.sqrt(2 / 3)
    assert f"| memory32 | 3 | 1.5000 ± 0.1 | -0.6 ± {error:.2g} | lower |" in text
    assert "noise floor (s.d. over seeds, pooled): 0.1" in text
    with (sweep.directory / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val/loss"]) for row in rows] == values
    assert rows[4]["variant"] == "memory32" and rows[4]["train.seed"] == "1"
    assert rows[0]["tokens"] == str(20 * 8 * 16)
    turned = statistics.collect(sweep, "memory32")
    assert "| +0.6 ±" in turned and "| higher |" in turned
    with pytest.raises(ConfigError, match="known: memory16, memory32"):
        statistics.collect(sweep, "memory64")


def test_each_side_at_its_own_best(folder, tmp_path, capsys):
    """By hand: softmax is best between the rates, at 2.1 ± 0.1; l1_softmax at the lowest, at
    2.0 ± 0.2, since the rate with a seed that diverged does not count, good as the others
    are. Floor sqrt((0.1^2 + 0.2^2) / 2) = 0.158, error 0.158 sqrt(2/3) = 0.129.

    Mutations: a rate counts when one seed is done; the floor pooled over all rates; failed
    rates left out of those tried.
    """
    sweep = expand(folder, "sides", "seed", root=tmp_path)
    softmax = [2.5, 2.6, 2.7, 2.0, 2.1, 2.2, 3.0, 4.0, 5.0]
    fake_results(sweep, [*softmax, 1.8, 2.0, 2.2, 2.3, 2.4, 2.5, 1.0, 1.0, 9.0])
    diverged = sweep.points[17].workdir / "outcome.json"
    diverged.write_text('{"state": "failed", "exit_code": 44, "error": "nan"}')
    commands.collect(sweep, commands.Options())
    *_, header, _, first, second, _, floor, left = capsys.readouterr().out.splitlines()
    assert header.startswith("| val/bits_per_byte at the best learning_rate | learning")
    assert first == "| softmax | 0.002 | 3 | 2.1000 ± 0.1 | baseline | |"
    edge = "| l1_softmax | 0.001 (lowest tried) | 3 | 2.0000 ± 0.2 "
    assert second == edge + "| -0.1 ± 0.13 | within noise |"
    assert floor.endswith("over these rows): 0.16")
    assert left == "left out, as not all seeds are done: l1_softmax at 0.004"
    turned = best.table(sweep, "optimizer.learning_rate", "l1_softmax, lr=0.002")
    assert turned[2].endswith("| +0.1 ± 0.13 | within noise |")
    highest = sweep.points[8].workdir / "outcome.json"  # of softmax
    highest.write_text('{"state": "failed", "exit_code": 44, "error": "nan"}')
    assert "| 0.002 |" in best.table(sweep)[2]
    highest.unlink()
    assert "| 0.002 (highest tried) |" in best.table(sweep)[2]
    diverged.write_text('{"state": "done"}')
    assert "| l1_softmax | 0.001 (lowest tried)" in best.table(sweep)[3]
    assert not best.table(expand(folder, "seed", root=tmp_path))
    for field in ("model.code_bits", "optimizer.lerning_rate"):
        with pytest.raises(
            ConfigError, match="no side has several of it; the sweep sets"
        ):
            best.table(sweep, field)
    with pytest.raises(ConfigError, match="its values are no numbers"):
        best.table(sweep, "model.score")


@pytest.mark.parametrize(
    "ours, theirs, verdict",
    [
        ([1.0, 1.2], [1.1, 1.3], "within noise"),
        ([1.0, 1.01], [1.1, 1.11], "lower"),
        ([1.2], [1.1], "one seed"),
    ],
)
def test_verdicts(ours, theirs, verdict):
    """Mutation: NOISE = 0."""
    summaries = [statistics.summarise("a", ours), statistics.summarise("b", theirs)]
    pooled = statistics.pooled_deviation(summaries)
    assert statistics.difference(*summaries, pooled).verdict == verdict


LABELS = """

def sweep_last_names():
    yield {"train.batch_size": 16}
    yield {"eval.batch_size": 16}

def sweep_one_label():
    for rate in (1e-3, 1.0000001e-3):
        yield {"label": "mine", "optimizer.learning_rate": rate}

def sweep_numbers():
    for rate in (1e-3, 2e-3):
        yield {"label": rate, "optimizer.learning_rate": rate}

def sweep_two_labels():
    yield {"label": "a", "train.seed": 0}
    yield {"label": "b", "train.seed": 1}

def sweep_same_value():
    yield {"optimizer.learning_rate": 1}
    yield {"optimizer.learning_rate": 1.0, "train.seed": 1}

def sweep_seed():
    for seed in range(2):
        yield {"train.seed": seed}

def sweep_raises():
    yield 1 / 0
"""


@pytest.mark.parametrize(
    "name, groups",
    [
        ("last_names", ["batch_size=16, train.batch_size=16", "batch_size=16, eval.batch_size=16"]),
        ("one_label", ["mine, optimizer.learning_rate=0.001",
                       "mine, optimizer.learning_rate=0.0010000001"]),
        ("numbers", ["0.001", "0.002"]),
        ("two_labels", ["a", "a"]),
        ("same_value", ["learning_rate=1", "learning_rate=1"]),
    ],
)  # fmt: skip
def test_variants_are_configs_not_labels(tmp_path, name, groups):
    """Points are seeds of one variant if their resolved configs differ in that alone.

    Mutation: `_named_apart` left out; `identity` of the overrides as they are written.
    """
    config = toy.config_file(tmp_path)
    config.write_text(config.read_text() + LABELS)
    found = points.expand(str(config), [name], tmp_path / "sweeps")
    assert [point.variant for point in found.points] == groups
    if groups[0] != groups[1]:  # with seeds: each of the two is in its own group twice
        both = points.expand(str(config), [name, "seed"], tmp_path / "sweeps")
        variants = [point.variant for point in both.points]
        assert variants == [groups[0]] * 2 + [groups[1]] * 2


def test_a_generator_that_raises_is_one_line(tmp_path):
    """Mutation: `_overrides` outside of `explained`."""
    config = toy.config_file(tmp_path)
    config.write_text(config.read_text() + LABELS)
    with pytest.raises(ConfigError, match=r"line \d+: ZeroDivisionError"):
        points.expand(str(config), ["raises"], tmp_path / "sweeps")


def test_sides_are_configs_not_overrides(tmp_path):
    """A field given at its default makes no other side. Mutation: the overrides for a key."""
    config = toy.config_file(tmp_path)
    text = """
def sweep_default():
    yield {"optimizer.learning_rate": 1e-3}
    yield {"optimizer.learning_rate": 2e-3, "train.batch_size": 8}
"""
    config.write_text(config.read_text() + text)
    found = points.expand(str(config), ["default"], tmp_path / "sweeps")
    trials = [
        best._trial(p, "optimizer.learning_rate", "val/loss") for p in found.points
    ]
    assert trials[0].side == trials[1].side
