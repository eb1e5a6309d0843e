"""The directory of a run: one process at a time."""

import errno
import os
import subprocess
import sys
import time

import filelock
import pytest

from memoryformer.errors import ConfigError, StorageError
from memoryformer.runs import directory, outcome

HOLD = (
    "import sys, time\n"
    "from memoryformer.runs import directory\n"
    "with directory.only_one(sys.argv[1]):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


def test_the_second_is_told_who_the_first_is(tmp_path):
    """Another process is named; once it was killed, the directory is free at once.

    Mutations: no lock; a lock file whose existence is the lock.
    """
    workdir = tmp_path / "deep" / "run"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, workdir], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "held\n"
        wanted = rf"--workdir={workdir}: process {first.pid} on .* trains there"
        with pytest.raises(StorageError, match=wanted) as caught:
            with directory.only_one(workdir):
                pytest.fail("two at once")
        assert "\n" not in str(caught.value) and caught.value.exit_code == 45
    finally:
        first.kill()
        first.communicate()
    with directory.only_one(workdir):
        assert (workdir / directory.LOCK).read_text().startswith(f"{os.getpid()} on ")


def test_patience(tmp_path):
    """Who has patience waits that long.

    Mutation: ask once, whatever the deadline.
    """
    with directory.only_one(tmp_path):
        began = time.monotonic()
        with pytest.raises(StorageError):
            with directory.only_one(tmp_path, patience=0.5):
                pytest.fail("two at once")
        assert time.monotonic() - began >= 0.5
    with directory.only_one(tmp_path, patience=0.5):
        pass


def test_where_nothing_can_be_locked_nobody_is_kept_out(tmp_path, monkeypatch):
    """Both try to lock, and go on. Mutation: let the OSError of such a system through."""
    tried = []

    def unable(*unused, **options):
        tried.append(unused)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock, "lock_descriptor", unable)
    with directory.only_one(tmp_path), directory.only_one(tmp_path):
        assert len(tried) == 2


def test_a_file_in_the_way(tmp_path):
    """Mutations: let any of the OSErrors through."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError, match=f"--workdir={file}: cannot be used"):
        with directory.only_one(file):
            pass
    with pytest.raises(StorageError, match="cannot be removed"):
        with outcome.recorded(file):
            pass
    assert file.read_text() == ""


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[3]", b'"done"', b"{}"])
def test_an_outcome_that_makes_no_sense_is_none(tmp_path, content):
    """Mutations: catch JSONDecodeError only; return whatever JSON holds."""
    (tmp_path / outcome.FILE).write_bytes(content)
    assert outcome.read(tmp_path) is None


def test_what_is_read_is_no_output(tmp_path):
    """A file by any of its names, a model's or a run's own; another beside them is fine.

    Mutations: `samefile` left out (a hard link); `realpath` left out (a link whose file is
    not there yet); the folders' own files not looked at.
    """
    model, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    model.mkdir()
    prompts.write_text("one")
    (tmp_path / "soft").symlink_to(prompts)
    (tmp_path / "hard").hardlink_to(prompts)
    (tmp_path / "linked").symlink_to(model)
    (model / "config.json").write_text("{}")
    refused = ["prompts.txt", "soft", "hard", "model/../prompts.txt"]
    refused += ["model/config.json", "linked/reader.py", "model/model.safetensors"]
    refused += ["model/tokenizer.json", "model/metrics.jsonl", "model/outcome.json"]
    for name in refused:
        with pytest.raises(ConfigError, match=r"--output=.* would be written over"):
            directory.check_output(tmp_path / name, [prompts], [model])
    for name in ("new.jsonl", "model/results.json", "config.json"):
        directory.check_output(tmp_path / name, [prompts], [model])
