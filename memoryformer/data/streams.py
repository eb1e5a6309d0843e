"""Several token files read as one stream, none of them copied.

    piece    0       1          2
    stream   [eot]   a.bin ..   b.bin ..

Start at `Stream`.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Piece:
    """`count` tokens of a file from token `first` on; without a path, as many `value`s."""

    path: pathlib.Path | None
    dtype: str
    count: int
    first: int = 0
    value: int = 0

    def tokens(self) -> np.ndarray:
        """The tokens, read-only, mapped from disk."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        if self.path is None:
            return np.full(self.count, self.value, dtype)
        offset = self.first * dtype.itemsize
        return np.memmap(self.path, dtype, mode="r", offset=offset, shape=(self.count,))


def end(token: int) -> Piece:
    """One end of document that no file holds."""
    return Piece(None, "int32", 1, value=token)


class Stream:
    """Pieces [N] as one array of token ids; takes slices, indices and arrays of indices.

    Slices are numpy's. Raises `IndexError` for an index outside 0 .. N - 1, also below 0, and
    for what is no whole number.
    """

    def __init__(self, pieces: Sequence[Piece]):
        held = [piece for piece in pieces if piece.count]
        self._arrays = [piece.tokens() for piece in held]
        sizes = np.array([piece.count for piece in held], np.int64)
        self._starts = np.cumsum(sizes) - sizes
        self._size = int(sizes.sum())
        self.dtype = np.result_type(*self._arrays, np.uint16)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            first, stop, step = index.indices(len(self))
            if step == 1:
                return self._between(first, stop)
            index = np.arange(first, stop, step)
        at = np.asarray(index)
        if at.size and at.dtype.kind not in "iu":  # a mask would be read as 0 and 1
            raise IndexError(f"tokens are indexed by whole numbers, not {at.dtype}")
        if at.size and (at.min() < 0 or at.max() >= len(self)):
            raise IndexError(f"tokens {at.min()}..{at.max()} of {len(self)}")
        at = at.astype(np.int64)
        number = np.searchsorted(self._starts, at, side="right") - 1
        tokens = np.empty(at.shape, self.dtype)
        for piece in np.unique(number):
            here = number == piece
            tokens[here] = self._arrays[piece][at[here] - self._starts[piece]]
        return tokens[()]  # a number for a number

    def _between(self, first: int, stop: int) -> np.ndarray:
        tokens = np.empty(max(stop - first, 0), self.dtype)
        for start, array in zip(self._starts, self._arrays, strict=True):
            begin, end = max(first - start, 0), min(stop - start, len(array))
            if begin < end:
                tokens[start + begin - first : start + end - first] = array[begin:end]
        return tokens
