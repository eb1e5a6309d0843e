"""Which texts a part holds, sorted on disk, so that equal texts can be kept once.

    digests-00003.npy         sha256 of the part's texts, 16 bytes each, sorted, each once
    digests-00003.first.npy   the number in the part of the first text that has it

A text is kept where it comes first: no earlier part holds it, and no earlier text of its own.
That depends on the order of the corpus alone. Start at `write` and `Known`.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from memoryformer.data import long_texts, token_files
from memoryformer.data import parts as parts_lib
from memoryformer.files import atomic

DTYPE = (
    "S16"  # NumPy drops zeros at the end: of two texts that differ there, never mind
)


def paths(work: pathlib.Path, number: int) -> tuple[pathlib.Path, pathlib.Path]:
    """The two files of a part; the first is written last."""
    name = f"digests-{number:05d}"
    return work / f"{name}.npy", work / f"{name}.first.npy"


def write(
    work: pathlib.Path, part: parts_lib.Part, texts: Iterable[long_texts.Text]
) -> None:
    """Read a part and write what it holds."""
    read = b"".join(map(token_files.digest, texts))
    unique, first = np.unique(np.frombuffer(read, DTYPE), return_index=True)
    whole, where = paths(work, part.number)
    for path, values in ((where, first), (whole, unique)):
        with atomic.replacing(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, values)


class Repeats(Protocol):
    """Tells the texts of a part that the corpus holds before."""

    def is_new(self, digests: Sequence[bytes], start: int) -> np.ndarray:
        """Whether texts `start, start + 1, ..` of the part come first: bool [N]."""


class Known:
    """`Repeats` by what earlier parts hold, and where texts come first in the part itself."""

    def __init__(self, work: pathlib.Path, number: int):
        self._earlier = [
            np.load(paths(work, n)[0], mmap_mode="r") for n in range(number)
        ]
        whole, where = paths(work, number)
        self._whole = np.load(whole, mmap_mode="r")
        self._first = np.load(where, mmap_mode="r")

    def is_new(self, digests: Sequence[bytes], start: int) -> np.ndarray:
        """See `Repeats`."""
        wanted = np.array(digests, DTYPE)
        here = self._first[np.searchsorted(self._whole, wanted)]
        new = here == start + np.arange(len(wanted))
        for known in self._earlier:
            new &= ~contains(known, wanted)
        return new


def contains(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether sorted `known` holds each of `wanted`: bool [N]."""
    if not len(known):
        return np.zeros(len(wanted), bool)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return known[at] == wanted
