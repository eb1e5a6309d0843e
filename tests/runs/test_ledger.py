"""The ledger of checkpoints: what was whole once and is not any more is damaged."""

import hashlib
import os
import shutil

import pytest
from toy_checkpoints import (
    assert_equal,
    lose_manifests,
    make_state,
    open_run,
    save_steps,
    steps_on_disk,
)

from memoryformer.errors import StorageError
from memoryformer.runs import checkpoint, manifest
from memoryformer.runs import steps as run_steps


def test_a_lost_manifest_is_damage(tmp_path, capfd):
    """Named, with an older step in its place; without one the run stops, nothing deleted.

    Mutations: `read_ledger` returns nothing; `retention.remove_debris` deletes what is listed.
    """
    save_steps(tmp_path, [1, 2, 3], checkpoint.CheckpointConfig(keep=3))
    lose_manifests(tmp_path, 1)
    with open_run(tmp_path):
        assert steps_on_disk(tmp_path) == [1, 2, 3]  # debris it is not
    lose_manifests(tmp_path, 3)
    with open_run(tmp_path) as run:
        step, restored = run.restore_latest(make_state(0))
    assert step == 2
    assert_equal(restored, make_state(2))
    assert "checkpoint 3: skipped, damaged: " in capfd.readouterr().err
    with pytest.raises(manifest.DamagedError, match="3/MANIFEST: missing"):
        run_steps.load(tmp_path)
    lose_manifests(tmp_path, 2)
    with pytest.raises(StorageError, match=r"every checkpoint is damaged .*1, 2, 3"):
        with open_run(tmp_path) as run:
            run.restore_latest(make_state(0))
    assert steps_on_disk(tmp_path) == [1, 2, 3]


def test_a_lost_step_is_damage(tmp_path, capfd):
    """The whole directory of the only step is gone: not a start from scratch.

    Mutation: `restore_latest` looks at the numbered directories only.
    """
    save_steps(tmp_path, [1], checkpoint.CheckpointConfig(keep=1))
    shutil.rmtree(tmp_path / run_steps.FOLDER / "1")
    with pytest.raises(StorageError, match=r"every checkpoint is damaged .*1"):
        with open_run(tmp_path) as run:
            run.restore_latest(make_state(0))


def test_without_a_ledger_it_is_as_it_was(tmp_path, capfd):
    """Of before there were any: a step without manifest was never finished, one with it
    is whole and is listed from now on. A damaged ledger lists whatever is there.

    Mutations: `_existing` or `restore_latest` look at the ledger alone; no ledger is made
    where there is none.
    """
    save_steps(tmp_path, [1, 2])
    folder = tmp_path / run_steps.FOLDER
    (folder / manifest.LEDGER).unlink()
    lose_manifests(tmp_path, 2)
    assert run_steps.facts(tmp_path)["step"] == 1
    with open_run(tmp_path) as run:
        assert run.restore_latest(make_state(0))[0] == 1
    assert "2: skipped, its save was never finished" in capfd.readouterr().err
    assert manifest.read_ledger(folder) == {1}
    lose_manifests(tmp_path, 1)
    (folder / manifest.LEDGER).write_bytes(b"0\n[]")
    with pytest.raises(StorageError, match=r"every checkpoint is damaged .*1, 2"):
        with open_run(tmp_path) as run:
            run.restore_latest(make_state(0))


def test_the_ledger_forgets_what_is_deleted(tmp_path, monkeypatch, capfd):
    """Retention, and a kill in the middle of it: what was deleted is not damaged.

    Mutations: `retention.keep` deletes first; the ledger is only added to; `save` deletes what it
    replaces before the ledger forgets it.
    """
    config = checkpoint.CheckpointConfig(keep=2)
    folder = tmp_path / run_steps.FOLDER
    save_steps(tmp_path, [1, 2, 3], config)
    assert manifest.read_ledger(folder) == {2, 3}

    def killed(directory):
        (directory / manifest.MANIFEST).unlink()
        raise OSError(5, "killed")

    # The first is killed as it deletes 2 at the end, the second as it replaces 4.
    for newest, listed in ((4, {3, 4}), (3, {3})):
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "remove", killed)
            with pytest.raises(StorageError, match="killed"):
                with open_run(tmp_path, config) as run:
                    run.restore(3, make_state(0))
                    run.save(4, make_state(4), wait=True)
        assert manifest.read_ledger(folder) == listed
        with open_run(tmp_path, config) as run:
            assert run.restore_latest(make_state(0))[0] == newest
        assert "damaged" not in capfd.readouterr().err


def test_killed_before_the_ledger(tmp_path, monkeypatch):
    """A step that has a manifest is whole, listed or not.

    Mutation: take the steps from the ledger alone.
    """
    save_steps(tmp_path, [1])
    before = manifest.read_ledger(tmp_path / run_steps.FOLDER)
    save_steps(tmp_path, [2])
    manifest.write_ledger(tmp_path / run_steps.FOLDER, before)
    assert run_steps.facts(tmp_path)["step"] == 2
    with open_run(tmp_path) as run:
        assert run.restore_latest(make_state(0))[0] == 2
    assert manifest.read_ledger(tmp_path / run_steps.FOLDER) == {1, 2}


@pytest.mark.parametrize("value", [{"1": 2}, [1, True], [1, "2"], 3, None])
def test_a_ledger_is_a_list_of_steps(tmp_path, value):
    """Mutations: `and` for `or`; true taken for 1."""
    manifest._seal(tmp_path / manifest.LEDGER, value)
    with pytest.raises(manifest.DamagedError, match="is no list of steps"):
        manifest.read_ledger(tmp_path)


@pytest.mark.parametrize("value", [[], {}, {"facts": {}}, {"files": {}}, {"facts": 1}])
def test_a_manifest_has_facts_and_files(tmp_path, value):
    """Mutation: either not asked for."""
    manifest._seal(tmp_path / manifest.MANIFEST, value)
    for read in (manifest.facts, manifest.verify):
        with pytest.raises(manifest.DamagedError, match="is no manifest"):
            read(tmp_path)


def test_what_cannot_be_read_is_damaged(tmp_path, monkeypatch):
    """Whatever the reason. Mutation: `differs` says no of it."""
    (tmp_path / "a").write_text("a")
    manifest.write(tmp_path, {"step": 1})
    assert manifest.verify(tmp_path) == {"step": 1} == manifest.facts(tmp_path)

    def refuse(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifest, "_sha256", refuse)
    with pytest.raises(manifest.DamagedError, match="a: changed since it was written"):
        manifest.verify(tmp_path)


def test_a_manifest_is_on_disk_behind_its_files(tmp_path, monkeypatch):
    """Each file is flushed whole, the manifest last, and moved into place.

    Mutations: `flush=False`; `os.fsync` or `file.flush` left out; keys not sorted.
    """
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_text("bb")
    (tmp_path / "a").write_text("a")
    flushed = []
    fsync = os.fsync

    def note(handle):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
        flushed.append((name, os.fstat(handle).st_size))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    manifest.write(tmp_path, {"b": 1, "a": 2})
    content = (tmp_path / manifest.MANIFEST).read_bytes()
    name, size = flushed.pop()
    assert flushed == [("a", 1), ("b", 2)] and size == len(content)
    assert name.startswith(f".{manifest.MANIFEST}.") and name.endswith(".tmp")
    digest, _, body = content.partition(b"\n")
    assert digest.decode() == hashlib.sha256(body).hexdigest()
    assert body.startswith(b'{"facts": {"a": 2, "b": 1}, "files": {"a": [1, ')
    assert manifest.size(tmp_path) == 3
    assert manifest.size(tmp_path / "nowhere") == 0


def test_the_manifest_goes_first(tmp_path, monkeypatch):
    """Killed while it deletes, what is left is not whole. Mutation: the order turned."""
    step, bare = tmp_path / "1", tmp_path / "2"
    for folder in (step, bare):
        folder.mkdir()
    manifest.write(step, {})
    manifest.remove(bare)  # without one
    assert not bare.exists()

    def killed(directory):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        manifest.remove(step)
    assert step.exists() and not manifest.exists(step)
