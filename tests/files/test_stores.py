"""Object stores: five verbs, one line for every fault, and one writer at a time."""

import datetime
import json
import os
import subprocess
import sys
import threading
import time
import types

import pytest

from memoryformer.errors import ConfigError, StorageError
from memoryformer.files import lease, lock, stores


def test_verbs(store_url, tmp_path):
    """What is put is there, below its URL alone. Mutations: `startswith(self._root)` in `list`."""
    store = stores.Store(f"{store_url}/")
    assert store.url == store_url and store.list() == {} and store.read("a") is None
    (tmp_path / "file").write_bytes(b"of a file")
    store.write("a", b"content")
    store.write("deep/b", tmp_path / "file")
    stores.Store(f"{store_url}2").write("c", b"a neighbour")
    assert {name: entry.size for name, entry in store.list().items()} == {
        "a": 7,
        "deep/b": 9,
    }
    assert (
        list(store.list("deep")) == ["deep/b"] and store.read("deep/b") == b"of a file"
    )
    assert abs(store.list()["a"].modified - time.time()) < 600
    store.fetch("a", tmp_path / "new" / "a")
    assert (tmp_path / "new" / "a").read_bytes() == b"content"
    assert stores.Store(f"{store_url}/a").entry().size == 7
    assert store.entry() is None
    store.remove("a")
    store.remove("a")
    assert list(store.list()) == ["deep/b"]


def test_what_a_list_leaves_out(store_url, monkeypatch):
    """A name that stands for a folder, as some consoles put it, is no object of the run.

    Mutation tried: the type not looked at.
    """
    store = stores.Store(store_url)
    store.write("deep/a", b"content")
    find = type(store.files()).find

    def with_folders(self, path, **options):
        folder = {"name": f"{path}/deep", "size": 0, "type": "directory"}
        return find(self, path, **options) | {folder["name"]: folder}

    monkeypatch.setattr(type(store.files()), "find", with_folders)
    assert list(store.list()) == ["deep/a"]


def test_a_fork_opens_its_own(store_url, monkeypatch):
    """What was opened before a fork is the parent's. Mutation tried: `if self._files is None`."""
    store = stores.Store(store_url)
    files = store.files()
    assert store.files() is files
    opened = []
    monkeypatch.setattr("fsspec.filesystem", lambda *a, **o: opened.append(a) or files)
    monkeypatch.setattr(stores.os, "getpid", lambda: -1)
    assert store.files() is store.files() and opened == [("memory",)]


def test_times():
    """As each package gives them. Mutation: text that is left out."""
    day = datetime.datetime(2026, 11, 27, tzinfo=datetime.UTC)
    for facts in (
        {"LastModified": day},
        {"updated": "2026-11-27T00:00:00.000Z"},
        {"created": day.timestamp()},
        {"mtime": None, "last_modified": day},
    ):
        assert stores._modified(facts) == day.timestamp()
    assert stores._modified({"updated": "soon"}) == 0.0


def test_faults_are_a_line(store_url, tmp_path, monkeypatch):
    """Mutations: `except OSError` in `faults`; a file half fetched that stays; no memory left
    told as a fault of the store.
    """
    store = stores.Store(store_url)

    def broken(*unused, **options):
        raise RuntimeError("no such\nhost")

    for name in ("find", "cat_file", "pipe_file", "put_file", "get_file", "rm_file"):
        monkeypatch.setattr(type(store.files()), name, broken)
    for call in (
        lambda: store.list(),
        lambda: store.read("a"),
        lambda: store.write("a", b""),
        lambda: store.write("a", tmp_path),
        lambda: store.fetch("a", tmp_path / "a"),
        lambda: store.remove("a"),
    ):
        with pytest.raises(StorageError, match=r"cannot be .* \(RuntimeError: no such"):
            call()
    assert list(tmp_path.glob("*a*")) == []

    def full(*unused, **options):
        raise MemoryError

    monkeypatch.setattr(type(store.files()), "cat_file", full)
    with pytest.raises(MemoryError):
        store.read("a")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memory://", "names no bucket"),
        ("s3:///", "names no bucket"),
        ("memory://b/a*", "stands for other names"),
        ("memory://b/a\nb", "not text"),
        ("nfs://b/a", "names no bucket"),
        ("absent://b/a", "needs the package no_such_package; `pip install"),
    ],
)
def test_what_is_no_place(url, reason, monkeypatch):
    """Mutations: any of the checks left out."""
    schemes = stores.SCHEMES | {"absent": "no_such_package"}
    monkeypatch.setattr(stores, "SCHEMES", schemes)
    pattern = stores._URL.pattern.replace("s3|", "s3|absent|")
    monkeypatch.setattr(stores, "_URL", stores.re.compile(pattern, stores.re.DOTALL))
    with pytest.raises(ConfigError, match=reason) as caught:
        stores.checked(url, "--workdir")
    assert str(caught.value).startswith("--workdir=") and "\n" not in str(caught.value)
    for path in ("/a/b", "a", "hub:a/b", "s3:/b", "file:///a", "x-s3://b"):
        assert not stores.is_store(path)


def marker(pid=None, space=None, beat=0):
    facts = {"pid": pid, "host": "node17", "space": space, "beat": beat}
    return json.dumps(facts).encode()


def test_a_writer_that_is_gone(store_url, monkeypatch):
    """One of this machine at once, another after `LEASE` without a sign, damaged ones too.

    Mutations: `_has_ended` without the space; a marker that is never removed; a list that is
    taken for all (`others` of the first look alone).
    """
    store = stores.Store(store_url)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                           capture_output=True, text=True)  # fmt: skip
    store.write("writers/1", marker(int(ended.stdout), lease._space()))
    monkeypatch.setattr(lease, "LEASE", 600.0)
    told = []
    with lease.hold(store, waiting=told.append) as held:
        assert list(store.list("writers")) == [held.name]
    assert told == [f"{ended.stdout.strip()} on node17"]
    monkeypatch.setattr(lease, "LEASE", 0.3)
    for content in (marker(int(ended.stdout), "another machine"), b"no JSON"):
        store.write("writers/1", content)
        began = time.monotonic()
        with lease.hold(store) as held:
            assert time.monotonic() - began >= 0.3
            assert list(store.list("writers")) == [held.name]
    assert store.list("writers") == {}


def test_a_writer_that_lives(store_url, monkeypatch):
    """Its marker changes; who has patience waits until it ends.

    Mutations: no thread that beats; a beat that does not change the marker; patience left out.
    """
    monkeypatch.setattr(lease, "LEASE", 20.0)
    store = stores.Store(store_url)
    with lease.hold(store):
        with pytest.raises(lock.HeldError, match=f"{os.getpid()} on "):
            with lease.hold(store):
                pytest.fail("two at once")
        assert len(store.list("writers")) == 1
        held, ended = threading.Event(), threading.Event()

        def wait():
            with lease.hold(store, patience=600.0):
                held.set()
                assert ended.is_set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not held.wait(0.5)
        ended.set()
    waiting.join(60)
    assert held.is_set()


def test_a_marker_of_the_same_size_is_a_sign(store_url, monkeypatch):
    """Who waits asks for the content: beats 1 to 9 are as long as each other.

    Mutations tried: `len(content)` compared in `_acquire`; a marker that is read once and kept.
    """
    store = stores.Store(store_url)
    store.write("writers/1", marker(beat=1))
    beats, clock = list(range(2, 10)), [1000.0]

    def sleep(seconds):
        """Pass nine tenths of a lease, with a sign of life while there are any."""
        clock[0] += 0.9 * lease.LEASE
        if beats and store.read(
            "writers/1"
        ):  # a holder does not put a removed one again
            store.write("writers/1", marker(beat=beats.pop(0)))

    monkeypatch.setattr(lease, "time", types.SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(lease, "_now", lambda: clock[0])
    with lease.hold(store, patience=1e6) as held:
        assert not beats and list(store.list("writers")) == [held.name]


def test_two_that_come_together(store_url, monkeypatch):
    """Never both, whatever the order of their requests; who gives way takes its marker back.

    Mutations: no second look after the marker was put; a marker that is left there.
    """
    monkeypatch.setattr(lease, "LEASE", 600.0)
    inside, most, done = [], [], []
    others, together, here = lease.Lease.others, threading.Barrier(4), threading.local()

    def look(self):
        seen = others(self)
        if not hasattr(here, "looked"):
            here.looked = together.wait(60)  # all look before one puts
        return seen

    monkeypatch.setattr(lease.Lease, "others", look)

    def work():
        with lease.hold(stores.Store(store_url), patience=600.0):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()
        done.append(1)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1] * 4 and len(done) == 4


def test_when_a_holder_looks_again(store_url, monkeypatch):
    """After half a lease, from the beginning of its last request; before, another's marker is
    of one that will give way.

    Mutations tried: a whole lease in `_is_late`; `_last` taken after the request; a look at
    the others at every beat.
    """
    store, clock = stores.Store(store_url), [1000.0]
    monkeypatch.setattr(lease, "BEAT", 600.0)
    monkeypatch.setattr(lease, "LEASE", 60.0)
    monkeypatch.setattr(lease, "_now", lambda: clock[0])
    write = stores.Store.write

    def slow(self, name, content):
        write(self, name, content)
        clock[0] += 20.0

    monkeypatch.setattr(stores.Store, "write", slow)
    with lease.hold(store) as held:
        clock[0] += 5.0
        write(store, "writers/another", marker())
        held.check()
        held._go_on()
        held.check()
        clock[0] += 15.0  # 35 since it was begun
        with pytest.raises(StorageError, match="cut off from the store"):
            held.check()


def test_without_a_sign_of_this_machine_nobody_has_ended(monkeypatch):
    """Where /proc does not say which machine it is. Mutation tried: `not _space()` left out."""
    dead = 2**22 + 1  # above the largest number of a process
    assert lease._has_ended(marker(dead, lease._space())) == bool(lease._space())
    monkeypatch.setattr(lease, "_space", lambda: "")
    assert not lease._has_ended(marker(dead, ""))


def test_a_writer_that_was_cut_off(store_url, monkeypatch):
    """It goes on if nobody came meanwhile, and else writes no more, nor its marker.

    Mutations: no look at the others when late; a marker put again that was removed.
    """
    store = stores.Store(store_url)
    monkeypatch.setattr(lease, "BEAT", 600.0)  # no sign of it for long
    with lease.hold(store) as held:
        monkeypatch.setattr(lease, "LEASE", 0.0)
        held.check()
        store.write("writers/another", marker())
        with pytest.raises(StorageError, match="cut off from the store"):
            held.check()
        monkeypatch.setattr(lease, "LEASE", 600.0)
        with pytest.raises(StorageError, match="cut off from the store"):
            held.check()
    assert list(store.list("writers")) == ["writers/another"]
    store.remove("writers/another")
    with lease.hold(store) as held:
        store.remove(held.name)
        monkeypatch.setattr(lease, "LEASE", 0.0)
        with pytest.raises(StorageError, match="cut off from the store"):
            held.check()
        assert store.list("writers") == {}
