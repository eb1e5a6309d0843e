"""Files appear whole, whatever happens while they are written."""

import json
import os

import pytest

from memoryformer.errors import StorageError
from memoryformer.files import atomic


def no_space(*unused):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_what_cannot_be_finished_leaves_the_file_before(tmp_path, monkeypatch, moment):
    """Neither half a file nor a temporary one stays.

    Mutations: write in place; no `flush`; no `unlink`; catch `Exception` and say nothing.
    """
    path = tmp_path / "sub" / "config.json"
    atomic.write_json(path, {"a": 1}, indent=2)
    monkeypatch.setattr(atomic.os, moment, no_space)
    with pytest.raises(
        StorageError, match=r"config.json: cannot be written: .*No space"
    ):
        atomic.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_an_interrupt_in_the_middle_leaves_the_file_before(tmp_path):
    """Mutation: clean up after an `OSError` only."""
    path = tmp_path / "weights"
    atomic.write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        with atomic.replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            assert path.read_bytes() == b"old"
            assert temporary.match(atomic.TEMPORARY)
            raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_the_contents_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """Mutation: `flush` after `os.replace`."""
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            atomic.os,
            name,
            lambda *words, n=name, f=real: (order.append(n), f(*words))[1],
        )
    atomic.write_text(tmp_path / "a", "é")
    assert (
        order == ["fsync", "replace"] and (tmp_path / "a").read_bytes() == "é".encode()
    )


def test_no_two_writers_share_a_temporary(tmp_path):
    """Two processes write one file, or a.json and a.txt, at once.

    Mutations: the suffix alone for a name; the name alone; the process id alone.
    """
    with (
        atomic.replacing(tmp_path / "a.json") as first,
        atomic.replacing(tmp_path / "a.json") as second,
        atomic.replacing(tmp_path / "a.txt") as third,
    ):
        assert len({first, second, third}) == 3
        for number, temporary in enumerate((first, second, third)):
            temporary.write_text(str(number))
    contents = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert contents == {"a.json": "0", "a.txt": "2"}
