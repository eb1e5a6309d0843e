"""One split on disk: a flat file of token ids, written once and mapped into memory.

    train.bin, validation.bin   uint16 or uint32, little-endian, no header

Each document is stored as [eot, t1, .., tn], and the file ends with one more eot. So an eot
both ends the document before it and starts the next; inputs are stream[:-1], targets
stream[1:], and every token and every end of document is predicted exactly once, each in the
context of its own document.

Start at `write` and `read`.
"""

import ctypes
import functools
import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Sequence, Set
from typing import BinaryIO

import numpy as np

from memoryformer import errors
from memoryformer.data import local_files, long_texts
from memoryformer.data import progress as progress_lib
from memoryformer.data.manifest import SplitFacts
from memoryformer.data.tokenizer import Tokenizer

_BATCH_CHARS = 1 << 20
_BATCH_DOCUMENTS = 1024
_LONE_END = re.compile(r"\S\n(?=\S)")
_AROUND, _TRIES = 256, 16  # characters that are looked at; ends


def read(path: pathlib.Path, dtype: str) -> np.ndarray:
    """The whole stream of a token file, read-only, mapped from disk."""
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r")


def dtype_for(vocab_size: int) -> str:
    """The narrower of `manifest.DTYPES` that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write(
    path: pathlib.Path,
    texts: Iterable[str],
    tokenizer: Tokenizer,
    progress: progress_lib.Progress,
    skip: Set[bytes] = frozenset(),
) -> SplitFacts:
    """Tokenise `texts` into a new file, less empty ones and those whose `digest` is in `skip`.

    Raises `DataError` where no text is left, and for ids that no table can hold.
    """
    num_read = empty = duplicates = 0
    with path.open("wb") as stream:
        writer = Writer(stream, tokenizer)
        batch, size = [], 0
        for text in progress.watched(texts):
            num_read += 1
            if not text:
                empty += 1
            elif skip and digest(text) in skip:
                duplicates += 1
            else:
                batch.append(text)
                size += len(text)
            if size >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
                progress.during("", functools.partial(writer.append, batch))
                if size >= _BATCH_CHARS:
                    give_back_memory()
                batch, size = [], 0
                progress.update(num_read)
        writer.append(batch)
        writer.close()
    progress.finish(num_read)
    return writer.facts(path, empty, duplicates)


def digest(text: long_texts.Text) -> bytes:
    """What tells two documents apart: 16 bytes of sha256."""
    return long_texts.sha256(text)[:16]


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise `DataError` naming the first id outside 0..vocab_size-1."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)].flat[0]
        raise errors.DataError(
            f"{where}: token id {int(bad)} is outside the vocabulary of {vocab_size}."
        )


def safe_end(tokenizer: Tokenizer, text: str, start: int, size: int) -> int:
    """Where to cut a text so that its pieces have the tokens of the whole.

    That is behind a line end with no white space beside it: tokenizers that divide text into
    words before they encode divide it there, whatever comes before and behind. Others show
    by what is around it whether they do. Where none does, `first_end`.
    """
    ends = _LONE_END.finditer(text, max(start - 1, 0), min(start + size, len(text)))
    for match in itertools.islice(ends, _TRIES):
        end = match.start() + 2
        before, behind = text[max(end - _AROUND, 0) : end], text[end : end + _AROUND]
        apart = tokenizer.encode(before) + tokenizer.encode(behind)
        if apart == tokenizer.encode(before + behind):
            return end
    return local_files.first_end(text, start, size)


class Writer:
    """Appends documents to one token file and counts what it writes."""

    def __init__(self, stream: BinaryIO, tokenizer: Tokenizer):
        self._stream = stream
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype_for(tokenizer.vocab_size)).newbyteorder("<")
        self._sha256 = hashlib.sha256()
        self.documents = self.tokens = self.ends = 0
        self.bytes = self.token_bytes = 0

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._sha256.hexdigest()

    def append(self, texts: Sequence[str]) -> None:
        """Write documents, each behind an end of document."""
        encodings = self._tokenizer.encode_batch(texts)
        for text, encoding in zip(texts, encodings, strict=True):
            self._begin(text)
            self._ids(encoding, [self._tokenizer.eot_id])

    def append_long(self, text: long_texts.Text, piece_chars: int) -> None:
        """`append` of one text, in pieces of about so many characters; see `safe_end`.

        Encoding takes a hundred times a text's memory.
        """
        self._begin(text)
        start = [self._tokenizer.eot_id]
        end_of = functools.partial(safe_end, self._tokenizer)
        for piece in local_files.cut(long_texts.pieces(text), piece_chars, end_of):
            self._ids(self._tokenizer.encode(piece), start)
            start = []

    def close(self) -> None:
        """Write the end of the last document."""
        self._write(np.array([self._tokenizer.eot_id]))

    def facts(self, path: pathlib.Path, empty: int, duplicates: int) -> SplitFacts:
        """What a closed file holds; raises `DataError` if that is no document."""
        if not self.documents:
            raise errors.DataError(f"{path.stem}: no document holds any text.")
        ends = self.ends - 1
        self.check_ends(ends)
        return SplitFacts(
            file=path.name,
            documents=self.documents,
            tokens=self.tokens,
            ends_of_document=ends,
            bytes=self.bytes,
            token_bytes=self.token_bytes,
            empty_dropped=empty,
            duplicates_of_validation_dropped=duplicates,
            sha256=self.sha256,
        )

    def check_ends(self, ends: int) -> None:
        """Raise `DataError` if text has made an end of document."""
        if ends != self.documents:
            raise errors.DataError(
                f"data.tokenizer={self._tokenizer.name!r}: made the end-of-document token "
                f"from text ({ends} ends in {self.documents} documents)."
            )

    def _begin(self, text: long_texts.Text) -> None:
        self.documents += 1
        self.bytes += long_texts.num_bytes(text)

    def _ids(self, encoding: Sequence[int], start: Sequence[int]) -> None:
        ids = np.array(encoding, np.int64)
        check_ids(ids, self._tokenizer.vocab_size, "the tokenizer's output")
        self._write(np.concatenate([np.array(start, np.int64), ids]))
        self.token_bytes += int(self._tokenizer.token_bytes[ids].sum())

    def _write(self, ids: np.ndarray) -> None:
        content = ids.astype(self._dtype).tobytes()
        self._stream.write(content)
        self._sha256.update(content)
        self.tokens += len(ids)
        self.ends += int((ids == self._tokenizer.eot_id).sum())


def give_back_memory() -> None:
    """Return freed memory to the system, or each thread of the tokenizer keeps its own."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim:
        trim(0)
