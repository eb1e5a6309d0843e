"""Tokenise a corpus once: documents -> token files and the manifest that describes them.

A prepared directory holds

    train.bin, validation.bin   see `token_files`
    tokenizer.json              exactly what made them
    manifest.json               counts, hashes, fingerprint; written last

The directory appears by one rename, when it is complete. Its name is made of all that
determines its bytes, so `prepare` is idempotent. Start at `prepare`.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import sys
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from memoryformer import errors
from memoryformer.data import (
    identity,
    options,
    part_processes,
    part_runner,
    token_files,
)
from memoryformer.data import manifest as manifest_lib
from memoryformer.data import progress as progress_lib
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.files import atomic, lock

if TYPE_CHECKING:  # importing it imports TFDS
    from memoryformer.data import documents


def prepare(
    data_config: options.DataConfig,
    show_progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
    parallel: int = 1,
    share: part_processes.Share = (0, 1),
    spread: Callable[[part_runner.Job], None] | None = None,
) -> pathlib.Path:
    """Tokenise the corpus unless that is done, and return its directory.

    A large one in parts, by `parallel` processes; where `share` is not (0, 1), only its parts,
    and the directory is there when those of the other shares are done too. `spread` does parts
    on other machines first.

    Safe to call from many processes at once: one works, the others wait for it or find
    its result. Raises `DataError` or `ConfigError` and leaves nothing behind if the
    corpus cannot be read, `StorageError` if the cache cannot be written, `Preempted` when
    `stop`, asked every few documents and while waiting, says so.
    """
    directory, in_parts = identity.located(data_config)
    if (directory / manifest_lib.FILE).is_file() or data_config.source == "prepared":
        manifest_lib.read(directory)
        return directory
    if directory.exists():
        raise errors.DataError(
            f"{directory}: has no manifest.json; delete it and rerun."
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        progress = progress_lib.Progress(
            f"preparing {data_config.source}", enabled=show_progress, stop=stop
        )
        if in_parts:
            progress.again = part_runner.AGAIN
            job = part_runner.Job(directory, data_config, progress)
            if spread and job.missing():
                spread(job)
            if not _prepare_parts(job, parallel, share):
                return directory
        elif share[0]:
            progress.note("the corpus is one part, and that is of share 0")
            return directory
        else:
            _prepare_whole(directory, data_config, progress)
    except errors.MemoryFormerError:
        raise
    except OSError as error:
        raise errors.StorageError(
            f"data.data_dir={str(directory.parent)!r}: cannot be written "
            f"({error.strerror or error}); free space or set data.data_dir."
        ) from error
    manifest_lib.read(directory)
    return directory


def _prepare_whole(
    directory: pathlib.Path,
    data_config: options.DataConfig,
    progress: progress_lib.Progress,
) -> None:
    with _locked(directory, progress) as locked:
        if not directory.exists():
            if locked:
                _remove_stale(directory)
            _prepare_into(directory, data_config, progress)


def _prepare_parts(
    job: part_runner.Job, parallel: int, share: part_processes.Share
) -> bool:
    """Do the parts of a share; return whether the directory is there."""
    if parallel > 1 and job.missing():
        part_processes.run(job, share, parallel)
    is_whole = share == (0, 1)
    job.run(part_processes.mine(share), wait=is_whole)
    if missing := job.missing():
        done = len(job.parts) - len(missing)
        job.progress.note(f"{done} of {len(job.parts)} parts are done")
        return False
    job.finish()
    return True


def _prepare_into(
    directory: pathlib.Path,
    data_config: options.DataConfig,
    progress: progress_lib.Progress,
) -> None:
    """Write everything to a temporary sibling, then rename it to `directory`."""
    temporary = directory.with_name(f".tmp-{directory.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        _write(temporary, data_config, progress)
        # A rename must not outrun the contents.
        for path in (*(p for p in temporary.iterdir() if p.is_file()), temporary):
            atomic.flush(path)
        try:
            temporary.rename(directory)
        except OSError:
            # Another process, on a file system without locks, was first.
            if not (directory / manifest_lib.FILE).is_file():
                raise
        atomic.flush(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    directory: pathlib.Path,
    data_config: options.DataConfig,
    progress: progress_lib.Progress,
) -> None:
    from memoryformer.data import documents as documents_lib  # TFDS: slow to import

    corpus = documents_lib.read(data_config, directory / "records", progress)
    held_out = set(map(token_files.digest, progress.watched(corpus["validation"])))
    tokenizer = _tokenizer(data_config, corpus["train"], held_out, progress)
    tokenizer.save(directory / "tokenizer.json")
    splits = {}
    for name, skip in (("validation", set()), ("train", held_out)):
        progress.start(f"tokenising {name}", len(corpus[name]), "documents")
        splits[name] = token_files.write(
            directory / f"{name}.bin", corpus[name], tokenizer, progress, skip
        )
    shutil.rmtree(directory / "records", ignore_errors=True)
    manifest = manifest_lib.Manifest(
        manifest_lib.describe(data_config),
        dataclasses.replace(
            manifest_lib.facts_of(tokenizer), name=data_config.tokenizer
        ),
        token_files.dtype_for(tokenizer.vocab_size),
        splits,
    )
    if note := manifest_lib.byte_note(manifest):
        print(f"note: {note}", file=sys.stderr, flush=True)
    text = json.dumps(manifest.to_json(), indent=2) + "\n"
    (directory / manifest_lib.FILE).write_text(text)


def _tokenizer(
    data_config: options.DataConfig,
    texts: "documents.Texts",
    held_out: set[bytes],
    progress: progress_lib.Progress,
) -> tokenizer_lib.Tokenizer:
    size = tokenizer_lib.bpe_size(data_config.tokenizer)
    if not size:
        return tokenizer_lib.load(data_config.tokenizer, data_config.end_token)

    def accept(text: str) -> bool:
        progress.check()
        return token_files.digest(text) not in held_out

    progress.start(
        "sampling for the tokenizer", texts.text_bytes or texts.num_bytes, "B"
    )
    sample = texts.sample(tokenizer_lib.BPE_TRAINING_BYTES, accept, progress.update)
    return progress.during(
        f"training {data_config.tokenizer}",
        lambda: tokenizer_lib.train_bpe(sample, size),
    )


def _remove_stale(directory: pathlib.Path) -> None:
    for old in directory.parent.glob(f".tmp-{directory.name}-*"):
        shutil.rmtree(old, ignore_errors=True)


def _locked(
    directory: pathlib.Path, progress: progress_lib.Progress
) -> contextlib.AbstractContextManager[bool]:
    """Hold the data set's lock; yields False where the file system has none."""

    def waiting(holder: str) -> None:
        say(holder)
        progress.check()

    @functools.cache  # once for each holder
    def say(holder: str) -> None:
        print(
            f"waiting for another process that prepares {directory} ({holder})",
            file=sys.stderr,
            flush=True,
        )

    return lock.hold(directory.with_name(f".lock-{directory.name}"), waiting=waiting)
