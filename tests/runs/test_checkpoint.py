"""Checkpoints: exact, whole or refused, and never lost without a word.

The children (killed, or out of space) run `python tests/runs/test_checkpoint.py NAME WORKDIR`.
"""

import logging
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy_checkpoints import (
    RUN_CONFIG,
    assert_equal,
    lose_manifests,
    make_state,
    open_run,
    save_steps,
    steps_on_disk,
)

from memoryformer.errors import ConfigError, StorageError
from memoryformer.runs import (
    checkpoint,
    compatibility,
    manifest,
    orbax_files,
    state_spec,
)
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment

# Exactness.


def test_restored_state_is_equal_bit_for_bit(tmp_path):
    """Every leaf and the NamedTuples come back, though the next step took the buffers.

    Mutation: in `restore`, target dtype float32 for every leaf.
    """
    expected = make_state(3)
    state = make_state(3)
    train_step = jax.jit(
        lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0
    )
    with open_run(tmp_path) as run:
        assert run.save(3, state)
        for _ in range(5):  # donates what is being saved
            state = train_step(state)
        assert not run.save(3, expected)  # there already
    with open_run(tmp_path) as run:
        step, restored = run.restore_latest(make_state(0))
    assert step == 3
    assert_equal(restored, expected)


@pytest.mark.parametrize("before, after", [(1, 8), (8, 1), (8, 2)])
def test_restore_onto_another_number_of_devices(tmp_path, before, after):
    """The arrays are equal bit for bit and lie as the abstract state asks.

    Mutation: `runs.orbax_files.abstract` ignores the sharding.
    """

    def shard(state, count):
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])

        def sharding(x):
            return NamedSharding(mesh, P("data") if x.ndim == 3 else P())

        return jax.tree.map(lambda x: jax.device_put(x, sharding(x)), state)

    expected = make_state(5)
    with open_run(tmp_path) as run:
        run.save(5, shard(expected, before))
    target = shard(make_state(0), after)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
    )
    with open_run(tmp_path) as run:
        restored = run.restore(5, abstract)
    assert_equal(restored, expected)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert x.sharding == y.sharding


def test_load_needs_neither_model_nor_state(tmp_path):
    """`load` gives config and parameters back, tuples and string keys included.

    Mutation: drop `_tuples`; or take every leaf instead of those under 'params'.
    """
    save_steps(tmp_path, [1, 2])
    config, params = run_steps.load(tmp_path)
    assert config.to_dict() == RUN_CONFIG
    assert_equal(params, jax.tree.map(np.asarray, make_state(2).params))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
    facts = run_steps.facts(tmp_path)
    assert facts["step"] == 2 and facts["data_fingerprint"] == "abc"
    assert facts["versions"]["jax"] == jax.__version__
    _, params = run_steps.load(tmp_path, step=1)
    assert_equal(params, jax.tree.map(np.asarray, make_state(1).params))


def test_saving_and_loading_change_nothing_global(tmp_path):
    """Loggers and jax are as before; Orbax's dump of an error that we report is kept off.

    Mutations: no `removeFilter` in `orbax_files.no_dumps`; a filter for the process; the same
    filter for two blocks, so that the end of one ends the other's.
    """
    log = logging.getLogger("absl")
    before = list(log.filters), log.level, dict(jax.config.values)
    save_steps(tmp_path, [1, 2])
    run_steps.load(tmp_path)

    def dump():
        record = log.makeRecord("absl", 40, "/x/orbax/y.py", 1, "dump", (), (1, 2, 3))
        return bool(log.filter(record))

    assert dump()
    with orbax_files.no_dumps():
        with orbax_files.no_dumps():
            assert not dump()
        assert not dump()
        assert log.filter(log.makeRecord("absl", 40, "/x/orbax/y.py", 1, "", (), None))
    assert dump()
    assert (list(log.filters), log.level, dict(jax.config.values)) == before


def test_what_a_killed_writer_left_does_no_harm(tmp_path):
    """A temporary file beside the ledger goes; one in a step is no part of the step.

    Mutations: `atomic.TEMPORARY` left out of `retention.remove_debris`; of `manifest._files`.
    """
    save_steps(tmp_path, [1])
    folder = tmp_path / run_steps.FOLDER
    for name in (".LEDGER.12ab.tmp", "1/.MANIFEST.34cd.tmp"):
        (folder / name).write_bytes(b"half")
    manifest.write(folder / "1", manifest.facts(folder / "1"))
    (folder / "1" / ".MANIFEST.34cd.tmp").unlink()
    with open_run(tmp_path) as run:
        assert run.restore_latest(make_state(0))[0] == 1
    assert not (folder / ".LEDGER.12ab.tmp").exists()


# Damage.


def test_damage_is_never_restored(tmp_path, capfd):
    """100 random flips, cuts and deletions in the newest step: each falls back, loudly.

    Mutation: `runs.manifest.verify` compares sizes only; or skips small files.
    """
    save_steps(tmp_path, [1, 2])
    newest = tmp_path / run_steps.FOLDER / "2"
    shutil.copytree(newest, tmp_path / "good")
    rng = random.Random(0)
    for trial in range(100):
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(tmp_path / "good", newest)
        what = damage(newest, rng)
        with open_run(tmp_path) as run:
            capfd.readouterr()
            step, restored = run.restore_latest(make_state(0))
        assert step == 1, (trial, what)
        assert_equal(restored, make_state(1))
        assert "checkpoint 2: skipped" in capfd.readouterr().err, (trial, what)
        with pytest.raises(StorageError):
            run_steps.load(tmp_path, step=2)


def damage(directory: pathlib.Path, rng: random.Random) -> str:
    """Flip a bit of, cut short or delete one file."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size)
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "cut", "delete"])
    if kind == "delete":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    return f"{kind} {file.relative_to(directory)}"


def test_all_damaged_stops_the_run(tmp_path):
    """Nothing whole is left: an error, not a start from scratch.

    Mutation: return None from `restore_latest` whatever was skipped.
    """
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        (tmp_path / run_steps.FOLDER / str(step) / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(StorageError, match=r"every checkpoint is damaged .*1, 2"):
        with open_run(tmp_path) as run:
            run.restore_latest(make_state(0))


def test_a_damaged_step_is_saved_anew(tmp_path):
    """After the fallback the same step is written again and is whole.

    Mutation: `save` leaves an existing directory alone (Orbax then refuses the step).
    """
    save_steps(tmp_path, [1, 2])
    shutil.rmtree(tmp_path / run_steps.FOLDER / "2" / "state")
    with open_run(tmp_path) as run:
        assert run.restore_latest(make_state(0))[0] == 1
        assert run.save(2, make_state(2))
    with open_run(tmp_path) as run:
        step, restored = run.restore_latest(make_state(0))
    assert step == 2
    assert_equal(restored, make_state(2))


def test_leftovers_of_killed_saves(tmp_path, capfd):
    """An unfinished save, one without manifest and a half-deleted step do no harm.

    Mutation: `restore_latest` looks at every numbered directory; or `retention.remove_debris`
    does nothing.
    """
    save_steps(tmp_path, [1, 2, 3])
    folder = tmp_path / run_steps.FOLDER
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    shutil.copytree(folder / "3", folder / "1")  # half deleted: manifest first
    (folder / "1" / manifest.MANIFEST).unlink()
    lose_manifests(tmp_path, 3)  # killed before the manifest
    manifest.write_ledger(folder, [2])
    with open_run(tmp_path) as run:
        assert steps_on_disk(tmp_path) == [2, 3]
        assert run.restore_latest(make_state(0))[0] == 2
        assert "checkpoint 3: skipped" in capfd.readouterr().err
        run.save(4, make_state(4))
    assert steps_on_disk(tmp_path) == [2, 4]


# Retention and timing.


def test_retention_keeps_newest_and_every_nth(tmp_path):
    """Mutation: `retention.keep` without `keep_every`; or with `whole[: keep]`."""
    config = checkpoint.CheckpointConfig(keep=2, keep_every=4)
    save_steps(tmp_path, range(1, 8), config)
    assert steps_on_disk(tmp_path) == [4, 6, 7]


def test_nothing_is_deleted_before_the_manifest(tmp_path, monkeypatch):
    """The older step stays as long as the newer one is not proven whole.

    Mutation: call `retention.keep` before `runs.manifest.write`.
    """
    config = checkpoint.CheckpointConfig(keep=1)
    save_steps(tmp_path, [1], config)

    def fails(directory, facts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", fails)
    with pytest.raises(StorageError, match=r"2: saving failed: .*No space left"):
        save_steps(tmp_path, [2], config)
    monkeypatch.undo()
    with open_run(tmp_path, config) as run:
        assert run.restore_latest(make_state(0))[0] == 1


def test_a_future_given_up_is_not_resumed(tmp_path, capfd):
    """Going on from step 1 replaces step 2 and, once that is whole, deletes step 3.

    Mutation: `retention.keep` counts steps above the newest one as kept; then 3 survives.
    """
    config = checkpoint.CheckpointConfig(keep=5)
    save_steps(tmp_path, [1, 2, 3], config)
    with open_run(tmp_path, config) as run:
        run.restore(1, make_state(0))
        run.save(2, make_state(20))
    assert "checkpoint 3: deleted" in capfd.readouterr().err
    with open_run(tmp_path, config) as run:
        step, restored = run.restore_latest(make_state(0))
    assert step == 2
    assert_equal(restored, make_state(20))


def test_should_save_by_steps_and_minutes(tmp_path, monkeypatch):
    """Mutation: forget to reset `_last_save`; or to compare with `_current`."""
    config = checkpoint.CheckpointConfig(every_steps=4, every_minutes=1)
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    with open_run(tmp_path, config) as run:
        due = [step for step in range(1, 9) if run.should_save(step)]
        now[0] = 61.0
        assert due == [4, 8] and run.should_save(3)
        run.save(3, make_state(3), wait=True)
        now[0] = 100.0
        assert not run.should_save(3) and not run.should_save(5)
        now[0] = 122.0
        assert run.should_save(5) and not run.should_save(3)


# At the edges.


def test_minutes_are_whole(tmp_path, monkeypatch):
    """Due after exactly as many; never where both are off; process 0's clock of several.

    Mutations: `>` for `>=`; `every_steps` of 0 divided by; every step asks.
    """
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    minutes = checkpoint.CheckpointConfig(every_steps=0, every_minutes=0.5)
    with open_run(tmp_path / "a", minutes) as run:
        now[0] = 29.0
        assert not run.should_save(0) and not run.should_save(1)
        now[0] = 30.0
        assert run.should_save(1)
        asked = []
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(
            checkpoint.processes, "from_chief", lambda due: asked.append(due) or not due
        )
        assert not run.should_save(9) and not run.should_save(10) and asked == [True]
        now[0] = 29.0
        assert run.should_save(20) and asked == [True, False]
        monkeypatch.undo()
    with open_run(tmp_path / "b", checkpoint.CheckpointConfig(every_steps=0)) as run:
        assert not any(run.should_save(step) for step in range(1000, 3000, 1000))


def test_just_enough_space_is_enough(tmp_path, monkeypatch):
    """Mutation: `<=` for `<`."""
    state = {"w": jax.ShapeDtypeStruct((2**28,), jnp.float32)}  # 1 GiB
    exact = shutil.disk_usage(tmp_path)._replace(free=4 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: exact)
    with open_run(tmp_path, checkpoint.CheckpointConfig(keep=2)) as run:
        run.preflight(state)
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: exact._replace(free=4 * 2**30 - 1)
        )
        with pytest.raises(StorageError, match=r"checkpoint\.keep=2 plus 2, 1.00 GiB"):
            run.preflight(state)


def test_nothing_lies_in_the_folder_but_steps(tmp_path):
    """Folders are made as deep as asked. Mutations: `parents=False`; Orbax's own file."""
    workdir = tmp_path / "a" / "b"
    save_steps(workdir, [1])
    names = {path.name for path in (workdir / run_steps.FOLDER).iterdir()}
    assert names == {"1", manifest.LEDGER}
    save_steps(workdir, [1, 2])  # there already


def test_a_damaged_step_does_not_count_as_kept(tmp_path):
    """With two to keep, the whole one stays. Mutation: `_damaged.add` left out."""
    save_steps(tmp_path, [1, 2])
    shutil.rmtree(tmp_path / run_steps.FOLDER / "2" / "state")
    with open_run(tmp_path) as run:
        assert run.restore_latest(make_state(0))[0] == 1
        run.save(3, make_state(3))
    assert steps_on_disk(tmp_path) == [1, 3]


def test_what_a_failed_save_leaves_is_removed(tmp_path, monkeypatch, capfd):
    """Which would keep a full disk full; of a killed one at the next start.

    Mutations: `rmtree` left out of `_failed`; out of `_remove_debris`.
    """
    folder = tmp_path / run_steps.FOLDER

    def fails(directory, facts):
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        with open_run(tmp_path) as run:
            (folder / "2.orbax-checkpoint-tmp-7").mkdir()
            monkeypatch.setattr(manifest, "write", fails)
            run.save(2, make_state(2), wait=True)
    assert not list(folder.glob("*tmp*"))
    monkeypatch.undo()
    (folder / "5.orbax-checkpoint-tmp-7").mkdir()
    capfd.readouterr()
    with open_run(tmp_path):
        assert not list(folder.glob("*tmp*"))
    assert "checkpoint 5: unfinished save removed." in capfd.readouterr().err


def test_an_error_is_told_once(tmp_path, monkeypatch, capfd):
    """Mutation: the error that ends the run printed as if it hid another."""

    def fails(directory, facts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", fails)
    with pytest.raises(StorageError, match="1: saving failed"):
        with open_run(tmp_path) as run:
            run.save(1, make_state(1), wait=True)
    assert "error:" not in capfd.readouterr().err


def test_processes_wait_for_each_other(tmp_path, monkeypatch):
    """Where one deletes what all must see the same of.

    Mutations: either barrier left out; the chief's work done by every process.
    """
    waited = []
    monkeypatch.setattr(checkpoint.processes, "barrier", waited.append)
    save_steps(tmp_path, [1])
    assert waited == ["checkpoints", "replace 1"]
    (tmp_path / run_steps.FOLDER / "3.orbax-checkpoint-tmp-7").mkdir()
    monkeypatch.setattr(checkpoint.processes, "is_chief", lambda: False)
    with open_run(tmp_path) as run:
        run.preflight({"w": jax.ShapeDtypeStruct((2**60,), jnp.float32)})
    assert list((tmp_path / run_steps.FOLDER).glob("3.orbax*"))


def test_dumps_of_orbax_are_not_logged(tmp_path):
    """An error of its own that we tell in a line; whatever else absl logs stays.

    Mutations: `or` for `and`; the filter not added.
    """
    log = logging.getLogger("absl")
    for old in list(log.filters):
        log.removeFilter(old)
    with open_run(tmp_path), orbax_files.no_dumps():
        (keeps,) = log.filters
    assert not log.filters  # another library's logger is left as it was

    def record(path, error):
        exc_info = (ValueError, ValueError("x"), None) if error else None
        return logging.LogRecord("absl", 40, path, 1, "text", (), exc_info)

    assert not keeps(record("/lib/orbax/a.py", True))
    assert keeps(record("/lib/orbax/a.py", False)) and keeps(record("/lib/x.py", True))


def test_a_sample_of_every_kind():
    """The smallest array of each first key, or a scalar where there is no other.

    Mutations: `!=` for `==` in the order of sizes; the largest.
    """
    array = jax.ShapeDtypeStruct
    state = {
        "params": {
            "a": array((4,), "int8"),
            "b": array((2,), "int8"),
            "c": array((), "int8"),
        },
        "opt": {"count": array((), "int32")},
    }
    kept = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree.leaves_with_path(orbax_files.samples(state))
        if isinstance(leaf, jax.ShapeDtypeStruct)
    }
    assert kept == {"params/b", "opt/count"}


# Refusals.


def test_errors_are_one_line_and_say_what_is_there(tmp_path):
    """Mutation: swap the checks of `load`; or let Orbax raise."""
    with pytest.raises(StorageError, match="there is no directory"):
        run_steps.load(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="there is no directory"):
        run_steps.facts(tmp_path / "nowhere")
    (tmp_path / run_steps.FOLDER).mkdir()
    with pytest.raises(StorageError, match="no finished checkpoint"):
        run_steps.load(tmp_path)
    save_steps(tmp_path, [3, 5])
    with pytest.raises(StorageError, match=r"no step 4; there are 3, 5") as info:
        run_steps.load(tmp_path, step=4)
    assert "\n" not in str(info.value)


def test_another_model_is_refused_by_leaf(tmp_path):
    """Shape, dtype and missing leaves are named; Orbax would cast the dtype silently.

    Mutation: leave the dtype out of `runs.state_spec.describe`.
    """
    save_steps(tmp_path, [1])
    state = make_state(1)
    tables = state.params["ffn"]["tables"]
    others = {
        r"tables is float32\[16, 8, 8\] there and float32\[4, 8, 8\]": tables[:4],
        r"params/ffn/tables is float32.* and bfloat16": tables.astype(jnp.bfloat16),
    }
    with open_run(tmp_path) as run:
        for message, other in others.items():
            params = state.params | {"ffn": {"tables": other}}
            with pytest.raises(ConfigError, match=message):
                run.restore_latest(state._replace(params=params))
        with pytest.raises(ConfigError, match=r"opt_state/0/count is int32\[\] there"):
            run.restore_latest(state._replace(opt_state=()))


DRIFT = [  # (field, new value, refused)
    ("model.embed_dim", 16, True),
    ("model.betas", (0.9, 0.99), True),
    ("optimizer.learning_rate", 2e-3, True),
    ("train.num_steps", 20, True),
    ("train.log_every", 5, False),
    ("mesh", "fsdp", False),
    ("checkpoint.keep", 7, False),
    ("data.source", "text", True),
]


@pytest.mark.parametrize("field, value, refused", DRIFT)
def test_config_drift(field, value, refused):
    """What changes the run is refused by name, with both values and the way round it.

    Mutation: add '*' to what may change; or compare the sections' names only.
    """
    config = jax.tree.map(lambda x: x, RUN_CONFIG)
    *section, key = field.split(".")
    node = config.setdefault(section[0], {}) if section else config
    old = node.get(key, compatibility.ABSENT)
    node[key] = value
    old, new = (list(x) if isinstance(x, tuple) else x for x in (old, value))
    assert compatibility.drift(RUN_CONFIG, config) == [(field, old, new)]
    free = experiment.may_change()
    if not refused:
        assert compatibility.check(RUN_CONFIG, config, free) == [(field, old, new)]
        return
    with pytest.raises(ConfigError) as info:
        compatibility.check(RUN_CONFIG, config, free)
    message = str(info.value)
    assert f"{field}: {old!r} -> {new!r}" in message
    assert f"--allow={field}" in message and "\n" not in message
    assert compatibility.check(RUN_CONFIG, config, allow={field}) == [(field, old, new)]


def test_num_steps_is_free_when_no_schedule_hangs_on_it():
    """Mutation: look at the new config only."""
    for fixed in ({"schedule_options": {"decay_steps": 50}}, {"schedule": "constant"}):
        saved = RUN_CONFIG | {"optimizer": RUN_CONFIG["optimizer"] | fixed}
        longer = saved | {"train": {"num_steps": 99, "log_every": 1}}
        assert compatibility.check(saved, longer) == [("train.num_steps", 10, 99)]
        with pytest.raises(ConfigError, match="the schedule ends at num_steps"):
            compatibility.check(RUN_CONFIG, longer, allow=["optimizer.*"])


def test_restore_refuses_another_config_or_other_data(tmp_path, capfd):
    """Mutation: drop `_compare` from `restore`; or the fingerprint from it."""
    save_steps(tmp_path, [1])
    with open_run(tmp_path, data_fingerprint="xyz") as run:
        with pytest.raises(ConfigError, match="data_fingerprint: 'abc' -> 'xyz'"):
            run.restore_latest(make_state(0))
    other = RUN_CONFIG | {"model": {"embed_dim": 9, "betas": (0.9, 0.95)}}
    with open_run(tmp_path, run_config=other) as run:
        with pytest.raises(ConfigError, match=r"model.embed_dim: 8 -> 9"):
            run.restore_latest(make_state(0))
    with open_run(tmp_path, run_config=other, allow={"model.*"}) as run:
        assert run.restore_latest(make_state(0))[0] == 1
    told = capfd.readouterr().err
    assert "checkpoint 1: going on under a changed config:\n" in told
    assert "  model.embed_dim: 8 -> 9" in told


def test_preflight_gives_the_numbers(tmp_path, monkeypatch):
    """Mutation: compare with one state; or forget what checkpoints take up already."""
    state = {"w": jax.ShapeDtypeStruct((2**28,), jnp.float32)}  # 1 GiB
    usage = shutil.disk_usage(tmp_path)
    with open_run(tmp_path, checkpoint.CheckpointConfig(keep=2)) as run:
        for free, enough in ((3.9, False), (4.1, True)):
            fake = usage._replace(free=int(free * 2**30))
            monkeypatch.setattr(shutil, "disk_usage", lambda _, fake=fake: fake)
            if enough:
                run.preflight(state)
                continue
            with pytest.raises(StorageError, match=r"3.90 GiB free, .* need 4.00 GiB"):
                run.preflight(state)
        monkeypatch.setattr(manifest, "size", lambda _: int(0.3 * 2**30))
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: usage._replace(free=int(3.9 * 2**30))
        )
        run.preflight(state)
    assert state_spec.total_bytes(state) == 2**30


def test_close_reads_the_last_step_again(tmp_path):
    """Damage done after the save and before the end is not reported as success.

    Mutation: `close` without `runs.manifest.verify`.
    """
    with pytest.raises(StorageError, match="missing"):
        with open_run(tmp_path) as run:
            run.save(1, make_state(1), wait=True)
            shutil.rmtree(tmp_path / run_steps.FOLDER / "1" / "state")


def test_the_first_error_is_the_one_that_is_seen(tmp_path, capfd):
    """A save that fails while an exception unwinds is printed and hides nothing.

    Mutation: `__exit__` lets the StorageError out.
    """
    with pytest.raises(ZeroDivisionError):
        with open_run(tmp_path) as run:
            run.save(1, make_state(1), wait=True)
            shutil.rmtree(tmp_path / run_steps.FOLDER / "1" / "state")
            raise ZeroDivisionError
    assert "error:" in capfd.readouterr().err


# Processes that die or run out of space.


ROWS = 1 << 16  # x 64 x 4 bytes x 3 = 48 MiB


def child_saves_forever(workdir):
    config = checkpoint.CheckpointConfig(keep=1)
    states = [make_state(step, ROWS) for step in range(2)]
    with open_run(workdir, config) as run:
        run.save(2, states[0], wait=True)
        print("saving", flush=True)
        for step in range(3, 1000):
            run.save(step, states[step % 2])


def test_kill_during_saves_and_deletions(tmp_path, runner):
    """kill -9 at three moments: the newest manifest restores, with the right values.

    Mutation: `save` deletes older steps before the new one is whole.
    """
    # Another moment each time; KILL_SEED=N tries those of a failure once more.
    seed = int(os.environ.get("KILL_SEED") or time.time_ns() % 2**32)
    print(f"KILL_SEED={seed}")  # which pytest shows where it fails
    rng = random.Random(seed)
    for trial, longest in enumerate((0.05, 0.3, 0.8)):
        workdir = tmp_path / str(trial)
        started = runner.launch(__file__, "saves_forever", workdir)
        runner.wait_for(started, "saving")
        delay = rng.uniform(0, longest)
        time.sleep(delay)
        runner.kill(started)
        result = runner.wait(started)
        assert result.code == -signal.SIGKILL, result
        with open_run(workdir) as run:
            found = run.restore_latest(make_state(0, ROWS))
            assert found is not None, delay
            step, restored = found
            assert step >= 2
            assert_equal(restored, make_state(step % 2, ROWS))
            assert not list(run.directory.glob("*tmp*"))
        shutil.rmtree(workdir)


def child_runs_out_of_space(workdir):
    with open_run(workdir) as run:
        run.save(1, make_state(1), wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        run.save(2, make_state(2, 1 << 12))
        for step in range(3, 3000):
            time.sleep(0.01)
            print("step", step, flush=True)
            run.check()


def test_failed_save_is_reported_at_its_step(tmp_path, runner):
    """Over the file size limit: one line, within the loop, and the rest stays whole.

    When several writes of a save fail at once, TensorStore may print tracebacks of its own
    around that line (docs/reliability.md); ours is the only `error:`.

    Mutation: `check` does nothing; or `_finalise` swallows the error; or cut the message
    at its end; or let Orbax's traceback through.
    """
    started = runner.launch(__file__, "runs_out_of_space", tmp_path)
    code, out, err = runner.wait(started, timeout=120)
    assert code == StorageError.exit_code, err
    # It may stand behind half a line of another thread, or before its last words.
    (line,) = (words.strip() for words in err.splitlines() if "error: " in words)
    assert line.startswith(
        f"error: {tmp_path / run_steps.FOLDER / '2'}: saving failed: "
    ), err
    # The middle of a long message is cut out, and the words may stand there.
    assert "File too large" in line or "os_error_code='27'" in line, err
    assert "StorageError" not in err, err  # no traceback of ours
    assert 0 < len(out.splitlines()) < 2900, out
    assert steps_on_disk(tmp_path) == [1]
    with open_run(tmp_path) as run:
        step, restored = run.restore_latest(make_state(0))
    assert step == 1
    assert_equal(restored, make_state(1))


def test_a_file_in_the_way_of_the_directory(tmp_path):
    """Mutation: let the OSError through."""
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        open_run(tmp_path / "run")


if __name__ == "__main__":
    try:
        globals()[f"child_{sys.argv[1]}"](pathlib.Path(sys.argv[2]))
    except StorageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
