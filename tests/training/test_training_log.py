"""The row of a log interval: what a step cost, against what the device could do."""

import dataclasses
import types

import jax
import pytest
import toy

from memoryformer import accounting
from memoryformer.accounting import targets as targets_lib
from memoryformer.runs import metrics
from memoryformer.training import experiment
from memoryformer.training import log as training_log

CHIP = dataclasses.replace(targets_lib.CHIPS["h200"], matrix_flops=1e12)
GIB = 2**30


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A log of a device with known rates on a clock of our own; rows and lines written."""
    seconds, rows, lines = [50.0], [], []
    device = types.SimpleNamespace(
        device_kind="Some GPU",
        memory_stats=lambda: {"peak_bytes_in_use": 3 * GIB, "bytes_limit": 8 * GIB},
    )
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(jax, "local_devices", lambda *_: [device])
    monkeypatch.setattr(
        targets_lib, "chip_of", lambda kind: CHIP if kind == "Some GPU" else None
    )
    run = experiment.resolve(toy.run_config(tmp_path, **{"train.log_every": 2}))
    writer = types.SimpleNamespace(write=lambda step, row: rows.append(row))
    printer = types.SimpleNamespace(update=lines.append, note=lambda line: None)
    log = training_log.TrainingLog(run, writer, printer, 0, num_devices=4)
    return run, log, seconds, rows, lines


def values():
    names = ("nats", "weight", "grad_norm", "finite", "updates")
    return dict.fromkeys(names, 1.0) | {"spike": 0.0}


def test_mfu_memory_and_wall(world):
    """MFU = training FLOPs of a second over the peak of all devices; time away from the steps
    counts for the wall, not for them. In the row, and in the line.

    Mutations tried: the peak of one device; forward FLOPs alone; `wall` since the last row.
    """
    run, log, seconds, rows, lines = world
    for step in range(1, 5):
        seconds[0] += 2.0
        if step == 3:
            with log.section("evaluate"):
                seconds[0] += 100.0
        log.push(step, values())
    log.drain()
    tokens = run.train.batch_size * run.model.seq_len
    flops = accounting.count(run.model).training_flops_per_token
    assert len(rows) == 2
    # Step 2 is read when step 3 is under way: three steps' time, then one for two steps.
    rates = [row["train/tokens_per_second"] for row in rows]
    assert rates == pytest.approx([tokens * 2 / 6, tokens * 2 / 2])
    for row, rate, wall in zip(rows, rates, (106.0, 108.0), strict=True):
        assert row["train/mfu"] == pytest.approx(rate * flops / (4 * 1e12))
        assert row["train/memory_bytes"] == 3 * GIB
        assert row["train/wall_seconds"] == wall
    assert "mfu " in lines[0] and " mem 3/8GiB wall 1m46s eta " in lines[0]
    assert {
        "train/mfu",
        "train/memory_bytes",
        "train/wall_seconds",
    } <= metrics.WALL_CLOCK


def test_mfu_is_left_out_for_an_unknown_chip(world, monkeypatch):
    """No MFU against a peak that is not known, no memory that the device does not tell.

    Mutation: a peak of 1 where the chip is not known.
    """
    run, _, seconds, rows, lines = world
    monkeypatch.setattr(targets_lib, "chip_of", lambda kind: None)
    other = types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda *_: [other])
    writer = types.SimpleNamespace(write=lambda step, row: rows.append(row))
    printer = types.SimpleNamespace(update=lines.append, note=lambda line: None)
    log = training_log.TrainingLog(run, writer, printer, 0, num_devices=1)
    for step in (1, 2, 3):
        seconds[0] += 1.0
        log.push(step, values())
    assert not {"train/mfu", "train/memory_bytes"} & rows[0].keys()
    assert "mfu" not in lines[0] and "mem" not in lines[0] and "wall 3s" in lines[0]


def test_a_cpu_tells_the_memory_of_its_process(monkeypatch):
    """The resident set at its largest, of what the machine has.

    Mutation: kilobytes taken for bytes.
    """
    cpu = types.SimpleNamespace(platform="cpu", memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda *_: [cpu])
    usage = types.SimpleNamespace(ru_maxrss=5 * 2**20)  # KiB on Linux
    monkeypatch.setattr(training_log.resource, "getrusage", lambda _: usage)
    monkeypatch.setattr(training_log.sys, "platform", "linux")
    used, total = training_log._memory()
    assert used == 5 * GIB and total > 0


def test_time_by_section(world):
    """Of data as its share of a step; the first step's as the time to compile, alone.

    Mutation: `data` counted as away; every step counted as compiled.
    """
    _, log, seconds, rows, _ = world
    for step, taken in ((1, 7.0), (2, 3.0), (3, 3.0)):
        with log.section("data"):
            seconds[0] += 1.0
        with log.section("step"):
            seconds[0] += taken
        log.push(step, values())
    assert rows[0]["train/compile_seconds"] == 7.0
    assert rows[0]["train/step_seconds"] == pytest.approx((3 + 6) / 2)
    assert rows[0]["train/data_fraction"] == pytest.approx(3 / 9)
