"""Runs in an object store: as on a disk, whatever happens when."""

import json
import os
import pathlib

import jax
import pytest
import stores_helpers
import toy
import toy_checkpoints

from memoryformer import runs
from memoryformer.convert import transfer
from memoryformer.errors import ConfigError, StorageError
from memoryformer.files import atomic, lease, lock, stores
from memoryformer.runs import directory, manifest, metrics, outcome, remote
from memoryformer.runs import folder as folder_lib
from memoryformer.runs import steps as run_steps
from memoryformer.training import banner, evaluate_run, loop


def saved(url, steps, restore=None, keep=2):
    """Save toy states as a run does; restore: begin with the state of this step."""
    config = toy_checkpoints.checkpoint.CheckpointConfig(keep=keep)
    with remote.opened(url) as folder:
        (folder.path / "config.json").write_text("{}")
        (folder.path / "metrics.jsonl").write_text(f"{steps}\n")
        with toy_checkpoints.open_run(folder.path, config, folder=folder) as run:
            if restore is not None:
                run.restore(restore, toy_checkpoints.make_state(restore))
            for step in steps:
                run.save(step, toy_checkpoints.make_state(step), wait=True)


def newest_whole(folder):
    """The newest step that is whole, and the damaged ones that a user would be told of."""
    damaged = []
    for step in sorted(run_steps.known(folder), reverse=True):
        try:
            manifest.verify(folder / str(step))
        except manifest.DamagedError:
            damaged.append(step)
            continue
        return step, damaged
    return None, damaged


def test_a_kill_at_any_moment(store_url, tmp_path, monkeypatch):
    """After every single put and removal the store holds a whole step, none of them damaged.

    Steps 1 to 3 with two kept, then step 2 again from step 1 on, which replaces 2 and gives up
    3. Mutations: `_rank` that is 0 for all; the ledger before the
    manifests; files removed in the order in which they are put.
    """
    seen = stores_helpers.Recorder(monkeypatch)
    saved(store_url, [1, 2, 3], keep=3)
    first = len(seen.done)
    saved(store_url, [2, 4], restore=1)
    local = tmp_path / "as_it_was" / run_steps.FOLDER
    local.mkdir(parents=True)
    newest = []
    for number, (name, content) in enumerate(seen.done):
        path = local.parent / name
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        step, damaged = newest_whole(local)
        assert not damaged, (number, name)
        if step != (newest or [None])[-1]:
            newest.append(step)
            # What a step needs beside its files is there before it.
            assert (local.parent / "metrics.jsonl").exists()
    assert newest == [1, 2, 3, 2, 4]
    assert first > 40 and len(seen.done) > first + 30
    names = {name.split("/")[1] for name in stores.Store(store_url).list("checkpoints")}
    assert names == {"2", "4", "LEDGER"}


def test_an_old_step_goes_before_the_new_one_comes(store_url, monkeypatch):
    """A step is saved anew with other values: no file of it is put while one of the old is there.

    Else a kill leaves the old manifest with new files, which is a damaged step. Mutations tried:
    `publish` left out of `Checkpointer.save`; called before `retention.remove`; `_renew` that
    leaves a manifest that is there.
    """
    saved(store_url, [1, 2])
    remote.copied(store_url, 2)  # its files are as large as those that come
    seen = stores_helpers.Recorder(monkeypatch)
    with remote.opened(store_url) as folder:
        with toy_checkpoints.open_run(folder.path, folder=folder) as run:
            run.restore(1, toy_checkpoints.make_state(1))
            run.save(2, toy_checkpoints.make_state(7), wait=True)
    of_step = [content for name, content in seen.done if "checkpoints/2/" in name]
    removed = of_step.count(None)
    assert removed > 10 and of_step[:removed] == [None] * removed
    copy = remote.copied(store_url, 2)
    manifest.verify(copy / run_steps.FOLDER / "2")
    state = toy_checkpoints.make_state(2)
    with toy_checkpoints.open_run(copy) as run:
        toy_checkpoints.assert_equal(
            run.restore(2, state), toy_checkpoints.make_state(7)
        )


@pytest.fixture
def copy(store_url, tmp_path):
    """A copy to write through, with step 1 whole and sent."""
    made = folder_lib.Copy(stores.Store(store_url), tmp_path / "copy")
    made.refresh()
    for name in ("state/x", manifest.MANIFEST):
        path = made.path / run_steps.FOLDER / "1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (made.path / "metrics.jsonl").write_text("1\n")
    made.publish()
    return made


def test_what_is_not_whole_is_not_sent(copy, store_url):
    """Half a step, what is being written, the lock. Mutations tried: each left out of `_whole`."""
    store = stores.Store(store_url)
    before = store.list()
    assert list(before) == [
        "checkpoints/1/MANIFEST",
        "checkpoints/1/state/x",
        "metrics.jsonl",
    ]
    for name in ("checkpoints/2/state/x", "lock", ".config.json.0a1b.tmp"):
        (copy.path / name).parent.mkdir(parents=True, exist_ok=True)
        (copy.path / name).write_text("half")
    assert (copy.path / ".config.json.0a1b.tmp").match(atomic.TEMPORARY)
    (copy.path / "link").symlink_to("metrics.jsonl")
    copy.publish()
    assert store.list() == before


def test_what_grows_while_it_is_sent_is_sent_again(copy, store_url, monkeypatch):
    """Beside the checkpoints: its bytes at one moment, and the rest at the next time.

    Mutations tried: `_stat` after the request; the path given to the store for such a file;
    `_same` that keeps a file that is gone.
    """
    store, sent = stores.Store(store_url), []
    write, metrics_file = stores.Store.write, copy.path / "metrics.jsonl"

    def growing(self, name, content):
        sent.append((name, type(content) is bytes))
        write(self, name, content)
        if len(sent) == 1:
            metrics_file.write_text("1\n2\n3\n")

    monkeypatch.setattr(stores.Store, "write", growing)
    metrics_file.write_text("1\n2\n")
    copy.publish()
    assert store.read("metrics.jsonl") == b"1\n2\n"
    copy.publish()
    copy.publish()
    assert store.read("metrics.jsonl") == b"1\n2\n3\n"
    assert sent == [("metrics.jsonl", True)] * 2
    changed = metrics_file.stat().st_mtime_ns
    metrics_file.unlink()
    copy.publish()
    metrics_file.write_text("1\n2\n4\n")
    os.utime(metrics_file, ns=(changed, changed))
    copy.publish()
    assert store.read("metrics.jsonl") == b"1\n2\n4\n"


def test_a_step_that_is_gone_goes_from_the_copy(copy, store_url, tmp_path):
    """Of a reader who comes again. Mutation tried: no `rmtree` in `refresh`."""
    reader = folder_lib.Copy(stores.Store(store_url), tmp_path / "reader")
    reader.refresh()
    steps = reader.path / run_steps.FOLDER
    assert run_steps.finished(steps) == [1]
    for name in ("checkpoints/1/MANIFEST", "checkpoints/1/state/x"):
        stores.Store(store_url).remove(name)
    reader.refresh()
    assert list(steps.iterdir()) == []


def test_what_is_removed_here_is_removed_there(store_url):
    """A file of the run's folder, of this run or one before; what was never here stays.

    Mutations tried: `_is_gone` that is False without a step; that does not ask `_same`;
    `_same` without what was fetched.
    """
    store = stores.Store(store_url)
    saved(store_url, [1])
    store.write("notes/mine.txt", b"of the user")
    with remote.opened(store_url) as folder:
        (folder.path / "config.json").unlink()
        (folder.path / "new.json").write_text("{}")
        folder.publish()
        assert store.read("config.json") is None and store.read("new.json") == b"{}"
        (folder.path / "new.json").unlink()
        folder.publish()
        assert store.read("new.json") is None
    names = {name for name in store.list() if not name.startswith("checkpoints/")}
    assert names == {"metrics.jsonl", "notes/mine.txt"}


def test_a_copy_of_the_same_size_is_not_believed(store_url):
    """What is small is brought at every start, though a copy of as many bytes is here.

    Mutation tried: `refresh` that fetches only what `_is_here` does not find.
    """
    saved(store_url, [1])
    first = remote.copied(store_url) / "config.json"
    assert first.read_text() == "{}"
    for name, content in (("config.json", b"[]"), ("checkpoints/LEDGER", b"")):
        old = stores.Store(store_url).read(name)
        new = content or old[::-1]
        assert len(new) == len(old) and new != old
        stores.Store(store_url).write(name, new)
        assert (remote.copied(store_url, params=False) / name).read_bytes() == new


def test_the_copy_is_of_one_run_only(store_url, tmp_path):
    """Nothing stays of the copy of a run that has ended; a damaged step is left as it is.

    Mutations: no `rmtree` in `opened` or in `end`; `_is_gone` for a step without manifest.
    """
    saved(store_url, [1, 2])
    (written,) = (tmp_path / "cache" / "stores").glob("written-*")
    assert list(written.iterdir()) == []
    stores.Store(store_url).remove("checkpoints/2/MANIFEST")
    before = stores.Store(store_url).list("checkpoints/2")
    (written / "run" / "tensorboard").mkdir(parents=True)
    (written / "run" / "tensorboard" / "stray").write_text("of a killed run")
    with remote.opened(store_url) as folder:
        assert not (folder.path / "tensorboard").exists()
        steps = folder.path / run_steps.FOLDER
        assert run_steps.finished(steps) == [1] and run_steps.known(steps) == {1, 2}
    assert stores.Store(store_url).list("checkpoints/2").keys() == before.keys()
    with pytest.raises(StorageError, match="MANIFEST: missing"):
        runs.load(store_url)


def test_a_killed_run_goes_on(store_url, toy_run, tmp_path, monkeypatch, capsys):
    """The network goes in the middle of a save; another machine goes on, bit for bit.

    Everything that the run has put stays, and so does what it could not put, in its copy.
    Mutations: metrics.jsonl not sent at a save; the step not fetched; `end` that removes
    what was not sent.
    """
    config = toy.run_config(toy_run.parent)
    seen = stores_helpers.Recorder(monkeypatch, gone="checkpoints/10/MANIFEST")
    with pytest.raises(StorageError, match="checkpoints/10: saving failed") as caught:
        loop.train(config, store_url)
    assert "\n" not in str(caught.value)
    (unsent,) = (tmp_path / "cache" / "stores").glob("written-*/unsent-run-*")
    assert f"What was not sent lies in {unsent}." in capsys.readouterr().err
    assert (unsent / "checkpoints" / "10" / "MANIFEST").exists()
    assert outcome.read(unsent)["exit_code"] == 45
    seen.gone, seen.failing = None, False
    known = run_steps.known(remote.copied(store_url) / run_steps.FOLDER)
    assert known == {5}
    (tmp_path / "cache").rename(tmp_path / "lost")
    values = loop.train(config, store_url)
    want = [metrics.comparable(row) for row in metrics.read(toy_run)]
    copy = remote.copied(store_url)
    assert [metrics.comparable(row) for row in metrics.read(copy)] == want
    assert values["val/loss"] == want[-1]["val/loss"]
    toy_checkpoints.assert_equal(runs.load(toy_run)[1], runs.load(store_url)[1])
    assert "going on from step 5 in memory://bucket/run" in capsys.readouterr().out
    assert outcome.read(copy) == {"state": "done"}
    assert list(stores.Store(store_url).list(lease.FOLDER)) == []


@pytest.fixture
def stored(store_url, toy_run):
    """A run that somebody has put into a store."""
    stores_helpers.put(toy_run, store_url)
    return store_url


def test_readers(stored, toy_run, tmp_path):
    """Whatever reads a run reads it there, a second time without a file of the state.

    Mutations: `copied` without the step; `_is_here` that is never true.
    """
    want = evaluate_run.evaluate_checkpoint(toy_run)
    assert evaluate_run.evaluate_checkpoint(stored) == want | {
        "val/seconds": pytest.approx(want["val/seconds"], abs=60)
    }
    for name, source in (("here", toy_run), ("there", stored)):
        transfer.export_run(source, tmp_path / name, step=15)
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()
    text = banner.text(toy.run_config(toy_run.parent), str(_config(toy_run)), stored)
    assert f"nothing changed since the last run in {stored}" in text
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        fetch = stores.Store.fetch
        patch.setattr(stores.Store, "fetch", lambda *a: asked.append(a[1]) or fetch(*a))
        copy = remote.copied(stored, 15)
        assert asked and not [name for name in asked if "/state/" in name]
        # Another run has written the step anew.
        path = copy / "checkpoints" / "15" / "MANIFEST"
        (copy / "checkpoints" / "15" / "state" / "_METADATA").write_text("old")
        path.write_bytes(b"old" + path.read_bytes())
        remote.copied(stored, 15)
        assert [name for name in asked if "/state/" in name]
    manifest.verify(path.parent)
    (copy / "outcome.json").exists()
    stores.Store(stored).remove("outcome.json")
    assert outcome.read(remote.copied(stored, params=False)) is None


def _config(toy_run):
    return toy.config_file(toy_run.parent)


def test_what_is_not_there(store_url, stored, monkeypatch):
    """One line each. Mutations: an empty copy for a run that is not there; a default output."""
    for place, step, reason in (
        ("memory://bucket/other", None, "holds no run"),
        ("memory://bucket/ru", None, "holds no run"),
        (stored, 7, "no step 7; there are 15, 20"),
    ):
        with pytest.raises(StorageError, match=reason) as caught:
            remote.copied(place, step)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="--output: missing"):
        remote.output(None, stored, "plots")
    assert remote.output("x", stored, "plots") == pathlib.Path("x")
    before = stores.Store(store_url).list()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"2 processes .* mount the store"):
        with remote.opened(store_url):
            pytest.fail("two processes")
    assert stores.Store(store_url).list() == before


def test_one_reader_at_a_time_changes_a_copy(stored, monkeypatch):
    """Mutation tried: `copied` without the lock."""
    tried = []

    def refresh(self):
        with pytest.raises(lock.HeldError):
            with lock.hold(self.path.parent / "lock", patience=0):
                tried.append("two at once")
        tried.append("held")

    monkeypatch.setattr(folder_lib.Copy, "refresh", refresh)
    remote.copied(stored, params=False)
    assert tried == ["held"]


def test_one_run_at_a_time(store_url, monkeypatch):
    """Mutations: `opened` without the lease; its error told as any other."""
    monkeypatch.setattr(lease, "LEASE", 20.0)
    with remote.opened(store_url):
        with pytest.raises(directory.OccupiedError, match="trains there") as caught:
            with remote.opened(store_url):
                pytest.fail("two at once")
        assert caught.value.exit_code == 45
        assert "--workdir=memory://bucket/run: process " in str(caught.value)
    with remote.opened(store_url):
        (marker,) = stores.Store(store_url).list(lease.FOLDER)
        assert json.loads(stores.Store(store_url).read(marker))["pid"]
