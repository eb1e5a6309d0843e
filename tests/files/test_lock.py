"""One process at a time holds a lock file; see also runs/test_directory.py."""

import errno
import os

import pytest

from memoryformer.files import lock


def test_who_waits_is_told_the_holder(tmp_path):
    """At every try, and is let in once the holder is gone; the file then names it.

    Mutations: no `waiting`; truncate the file before it is locked; patience of 0.
    """
    path, told = tmp_path / "lock", []
    with lock.hold(path) as locked:
        assert locked

        def waiting(holder):
            told.append(holder)
            if len(told) == 3:
                raise InterruptedError

        with pytest.raises(InterruptedError), lock.hold(path, waiting=waiting):
            pytest.fail("two at once")
        assert len(told) == 3 and {*told} == {path.read_text().strip()}
        assert told[0].startswith(f"{os.getpid()} on ")
        with pytest.raises(lock.HeldError, match=str(os.getpid())):
            with lock.hold(path, patience=0, waiting=pytest.fail):
                pytest.fail("two at once")
    with lock.hold(path, patience=0):
        assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    """Mutations: raise; yield True."""

    def unable(*unused, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.filelock, "lock_descriptor", unable)
    with lock.hold(tmp_path / "lock") as first, lock.hold(tmp_path / "lock") as second:
        assert not first and not second


def test_any_other_error_is_raised(tmp_path, monkeypatch):
    """Mutation: every OSError means that there are no locks."""

    def broken(*unused, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lock.filelock, "lock_descriptor", broken)
    with pytest.raises(OSError, match="Input/output"), lock.hold(tmp_path / "lock"):
        pytest.fail("not locked")
