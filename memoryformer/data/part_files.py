"""One part of a corpus: read, tokenised, hashed, and renamed into place.

    train-00003-of-00016.bin, validation-00003-of-00016.bin   [eot, t1, .., tn] each document
    parts/00003.json                                          what they hold; written last

Start at `write`.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from memoryformer.data import (
    digests,
    long_texts,
    manifest,
    parts,
    text_files,
    token_files,
    tokenizer,
)
from memoryformer.data import progress as progress_lib
from memoryformer.files import atomic

_BATCH_CHARS, _BATCH_DOCUMENTS = 1 << 20, 1024


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is the same for every part.

    held_out: sorted digests of the held-out files, if there are any.
    """

    corpus: parts.Corpus
    num_parts: int
    tokenizer: tokenizer.Tokenizer
    held_out: np.ndarray


class Folder(Protocol):
    """Where the files of parts go, by name; each is there whole or not at all."""

    def replacing(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Yield a stream to write to; at the end of the block it becomes the file."""

    def remove(self, name: str) -> None:
        """Delete a file."""


class LocalFolder:
    """A folder of this machine. Only one process at a time writes a file of this name."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[BinaryIO]:
        """See `Folder`; what a killed writer has left of the file goes."""
        path = self._path / name
        for debris in path.parent.glob(f".{path.name}.*.tmp"):
            debris.unlink()
        with atomic.replacing(path) as temporary, temporary.open("wb") as stream:
            yield stream

    def remove(self, name: str) -> None:
        """See `Folder`."""
        (self._path / name).unlink()


def facts_name(number: int) -> str:
    """The file in which a finished part says what it holds."""
    return f"parts/{number:05d}.json"


def facts_path(work: pathlib.Path, number: int) -> pathlib.Path:
    """Where that file lies."""
    return work / facts_name(number)


def write(
    folder: Folder,
    part: parts.Part,
    rules: Rules,
    known: digests.Repeats | None,
    progress: progress_lib.Progress,
) -> dict[str, Any]:
    """Tokenise a part and return what it holds; `known` tells texts that are there already.

    Raises `DataError` for a file of it that cannot be read.
    """
    names = {
        name: f"{name}-{part.number:05d}-of-{rules.num_parts:05d}.bin"
        for name in manifest.SPLITS
    }
    with contextlib.ExitStack() as stack:
        splits = {}
        for split, name in names.items():
            stream = stack.enter_context(folder.replacing(name))
            splits[split] = _Split(token_files.Writer(stream, rules.tokenizer))
        worker = _Worker(part, rules, known, splits, progress)
        worker.run()
    facts: dict[str, Any] = {
        name: split.facts(names[name]) for name, split in splits.items()
    }
    for split, name in names.items():
        if not facts[split]["tokens"]:
            folder.remove(name)
    facts["marked"] = worker.marked
    with folder.replacing(facts_name(part.number)) as stream:
        stream.write(f"{json.dumps(facts)}\n".encode())
    return facts


def read(work: pathlib.Path, num_parts: int) -> list[dict[str, Any]]:
    """What every part holds, all of them finished."""
    texts = (facts_path(work, number).read_text() for number in range(num_parts))
    return [json.loads(text) for text in texts]


def splits(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What a part holds of each split."""
    return [facts[name] for name in manifest.SPLITS]


def joined(
    name: str, facts: Sequence[dict[str, Any]], deduplicated: bool
) -> manifest.PartedFacts:
    """The facts of a whole split."""
    of_split = [part[name] for part in facts]
    stored = [part for part in of_split if part["tokens"]]

    def total(key: str) -> int:
        return sum(part[key] for part in of_split)

    hashes = "".join(part["sha256"] for part in stored)
    return manifest.PartedFacts(
        file="",
        documents=total("documents"),
        tokens=total("tokens") + 1,
        ends_of_document=total("documents"),
        bytes=total("bytes"),
        token_bytes=total("token_bytes"),
        empty_dropped=total("empty_dropped"),
        duplicates_of_validation_dropped=total("duplicates_of_validation_dropped"),
        sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        deduplicated=deduplicated,
        duplicates_dropped=total("duplicates_dropped"),
        parts=tuple(
            manifest.PartFacts(
                **{
                    field.name: part[field.name]
                    for field in dataclasses.fields(manifest.PartFacts)
                }
            )
            for part in stored
        ),
    )


class _Split:
    """The file of one split, and what was left out of it."""

    def __init__(self, writer: token_files.Writer):
        self.writer = writer
        self.empty = self.of_validation = self.duplicates = 0
        self._short: list[str] = []

    def append(self, text: long_texts.Text) -> None:
        if len(text) > 2 * _BATCH_CHARS:
            self.flush()
            self.writer.append_long(text, _BATCH_CHARS)
        else:
            self._short.append("".join(long_texts.pieces(text)))

    def flush(self) -> None:
        if self._short:
            self.writer.append(self._short)
        self._short = []

    def facts(self, file: str) -> dict[str, Any]:
        writer = self.writer
        writer.check_ends(writer.ends)
        return {
            "file": file,
            "documents": writer.documents,
            "tokens": writer.tokens,
            "bytes": writer.bytes,
            "token_bytes": writer.token_bytes,
            "empty_dropped": self.empty,
            "duplicates_of_validation_dropped": self.of_validation,
            "duplicates_dropped": self.duplicates,
            "sha256": writer.sha256,
        }


class _Worker:
    """Deals the texts of a part to its two files, some at a time."""

    def __init__(
        self,
        part: parts.Part,
        rules: Rules,
        known: digests.Repeats | None,
        splits: dict[str, _Split],
        progress: progress_lib.Progress,
    ):
        self._part, self._rules = part, rules
        self._splits, self._progress = splits, progress
        self._known = known
        self._number = 0  # of texts before those in hand
        self.marked = 0

    def run(self) -> None:
        for texts in batches(self._texts()):
            self._deal(texts)
            for split in self._splits.values():
                self._progress.during("", split.flush)
            if sum(map(len, texts)) >= _BATCH_CHARS:
                token_files.give_back_memory()

    def _texts(self) -> Iterator[long_texts.Text]:
        done = 0
        for unit in self._part.units:
            read = 0  # characters, for want of the place in the file
            for text in self._rules.corpus.texts(unit):
                self._progress.update(done + min(read, unit.size))
                yield text
                read += len(text)
            done += unit.size

    def _deal(self, texts: Sequence[long_texts.Text]) -> None:
        hashes = [long_texts.sha256(text) for text in texts]
        short = [digest[:16] for digest in hashes]
        new = np.ones(len(texts), bool)
        if self._known:
            new = self._known.is_new(short, self._number)
        of_validation = np.zeros(len(texts), bool)
        if self._part.split == "train":
            of_validation = digests.contains(
                self._rules.held_out, np.array(short, digests.DTYPE)
            )
        every = self._rules.corpus.validation_every
        for text, digest, is_new, is_held_out in zip(
            texts, hashes, new, of_validation, strict=True
        ):
            by_hash = "train" if int.from_bytes(digest) % every else "validation"
            split = self._splits[self._part.split or by_hash]
            self.marked += long_texts.holds(text, text_files.MARKER)
            if not text:
                split.empty += 1
            elif is_held_out:
                split.of_validation += 1
            elif not is_new:
                split.duplicates += 1
            else:
                split.append(text)
        self._number += len(texts)


def batches(texts: Iterator[long_texts.Text]) -> Iterator[list[long_texts.Text]]:
    """Texts by the megabyte."""
    batch: list[long_texts.Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
