"""The files of Megatron-LM and GPT-NeoX: tokens in PREFIX.bin, their bounds in PREFIX.idx.

    .bin   the tokens of all sequences, one behind the other, no header
    .idx   magic, version, kind of integer, then sizes and offsets of the sequences [N] and
           the documents' first sequences [D + 1], all little-endian

    MMIDIDX  sizes int32 [N], byte offsets int64 [N], documents int64 [D + 1]
    TNTIDX   (the one before) first dimensions [N + 1], offsets in tokens [N + 1], sizes [N],
             documents [D + 1], all int64

The layout is that of `indexed_dataset.py` of both projects. Nothing is read whole but the
index, in parts. Start at `open_pair`.
"""

import dataclasses
import pathlib
import re
import struct
from collections.abc import Iterator

import numpy as np

from memoryformer import errors
from memoryformer.data import streams
from memoryformer.data.names import shown

MMIDIDX, TNTIDX = b"MMIDIDX\0\0", b"TNTIDX\0\0"
CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CHUNK = 1 << 22  # entries of the index that are looked at together
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.bin")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prefix: sizes of sequences [N] and first sequences of documents [D + 1]."""

    prefix: pathlib.Path
    dtype: str
    sizes: np.ndarray
    offsets: np.ndarray  # [N], in tokens or bytes
    documents: np.ndarray
    num_tokens: int
    files: tuple[streams.Piece, ...]

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.documents) - 1

    def start_of(self, document: int) -> int:
        """The first token of a document; of document D, the number of tokens."""
        sequence = int(self.documents[document])
        if sequence == len(self.sizes):
            return self.num_tokens
        return int(self.offsets[sequence]) // self._unit

    @property
    def _unit(self) -> int:
        is_bytes = len(self.offsets) == len(self.sizes)  # TNTIDX has one more
        return np.dtype(self.dtype).itemsize if is_bytes else 1

    def check(self) -> None:
        """Raise `DataError` unless sequences lie one behind the other, and documents too."""
        where = shown(f"{self.prefix}.idx")
        begin = 0
        for first in range(0, len(self.sizes), CHUNK):
            sizes = np.asarray(self.sizes[first : first + CHUNK], np.int64)
            ends = begin + np.cumsum(sizes)
            offsets = self.offsets[first : first + len(sizes)]
            if sizes.min() < 0 or (offsets != (ends - sizes) * self._unit).any():
                raise errors.DataError(
                    f"{where}: sequences do not lie one behind the other; damaged, or "
                    "not Megatron's: make the pair again."
                )
            begin = int(ends[-1])
        if begin != self.num_tokens:
            raise errors.DataError(
                f"{shown(f'{self.prefix}.bin')}: {self.num_tokens} tokens, but its index "
                f"says {begin}: truncated, or of another index; copy the pair again."
            )
        edges = self.documents[[0, -1]] if len(self.documents) else np.array([1, 1])
        steps = (
            np.diff(self.documents[first : first + CHUNK + 1])
            for first in range(0, self.num_documents, CHUNK)
        )
        sound = not edges[0] and edges[1] == len(self.sizes)
        if not sound or any((step < 0).any() for step in steps):
            raise errors.DataError(
                f"{where}: its documents do not cover its {len(self.sizes)} sequences; "
                "damaged: make the pair again."
            )

    def bounds(self, first: int, stop: int) -> Iterator[np.ndarray]:
        """What says where sequences and documents of `first..stop` end, int64, in parts."""
        sequences = slice(int(self.documents[first]), int(self.documents[stop]))
        for values, start, end in (
            (self.sizes, sequences.start, sequences.stop),
            (self.documents, first, stop + 1),
        ):
            shift = 0 if values is self.sizes else sequences.start
            for at in range(start, end, CHUNK):
                yield np.asarray(values[at : min(at + CHUNK, end)], "<i8") - shift

    def pieces(self, first: int, stop: int) -> list[streams.Piece]:
        """Tokens `first..stop`."""
        found, begin = [], 0
        for file in self.files:
            low, high = max(first - begin, 0), min(stop - begin, file.count)
            if low < high:
                piece = dataclasses.replace(file, first=low, count=high - low)
                found.append(piece)
            begin += file.count
        return found


def open_pair(prefix: pathlib.Path) -> Pair:
    """Map PREFIX.bin (or PREFIX-00000-of-00020.bin and so on) and PREFIX.idx, checked.

    Raises `DataError` naming the file that is missing, truncated or foreign.
    """
    path = prefix.with_name(prefix.name + ".idx")
    try:
        content = _mapped(path)
        head = content[: 1 << 7].tobytes()
        read = {MMIDIDX: _read_mmididx, TNTIDX: _read_tntidx}
        magic = next((magic for magic in read if head.startswith(magic)), None)
        if magic is None:
            raise errors.DataError(
                f"{shown(path)}: begins with {head[:9]!r}, not with MMIDIDX or TNTIDX: no "
                "index of Megatron; data.path is the PREFIX of PREFIX.bin and PREFIX.idx."
            )
        dtype, sizes, offsets, documents = read[magic](content, head, shown(path))
        files = tuple(_bins(prefix, dtype))
    except OSError as error:
        name = shown(error.filename or path)
        raise errors.DataError(
            f"{name}: cannot be read ({error.strerror}); data.path is the PREFIX of "
            "PREFIX.bin and PREFIX.idx."
        ) from error
    num_tokens = sum(piece.count for piece in files)
    pair = Pair(prefix, dtype, sizes, offsets, documents, num_tokens, files)
    pair.check()
    return pair


def _mapped(path: pathlib.Path) -> np.ndarray:
    if not path.stat().st_size:
        raise errors.DataError(f"{shown(path)}: the file is empty; copy it again.")
    return np.memmap(path, np.uint8, mode="r")


def _read_mmididx(content: np.ndarray, head: bytes, where: str):
    version, code, sequences, documents = _unpacked("<QBQQ", head, 9, where)
    dtype = _dtype(version, code, where)
    fields = [("<i4", sequences), ("<i8", sequences), ("<i8", documents)]
    # One byte for each sequence may follow: the modes of multimodal data.
    sizes, offsets, first = _arrays(content, 34, fields, where)
    return dtype, sizes, offsets, first


def _read_tntidx(content: np.ndarray, head: bytes, where: str):
    version, code, _, sequences, dimensions, documents = _unpacked(
        "<QQQQQQ", head, 8, where
    )
    dtype = _dtype(version, code, where)
    if sequences != dimensions:
        raise errors.DataError(
            f"{where}: {dimensions} dimensions of {sequences} sequences: not tokens."
        )
    counts = (sequences + 1, sequences + 1, sequences, documents)
    fields = [("<i8", count) for count in counts]
    _, offsets, sizes, first = _arrays(content, 56, fields, where)
    return dtype, sizes, offsets, first


def _unpacked(form: str, head: bytes, start: int, where: str) -> tuple[int, ...]:
    if len(head) < start + struct.calcsize(form):
        raise errors.DataError(f"{where}: truncated in its header; copy it again.")
    return struct.unpack_from(form, head, start)


def _dtype(version: int, code: int, where: str) -> str:
    if version != 1 or code not in CODES:
        what = f"version {version}" if version != 1 else f"kind of number {code}"
        raise errors.DataError(
            f"{where}: has {what}; read are version 1 and the kinds "
            f"{', '.join(f'{code} ({name})' for code, name in CODES.items())}."
        )
    return CODES[code]


def _arrays(
    content: np.ndarray, start: int, fields: list[tuple[str, int]], where: str
) -> list[np.ndarray]:
    """Arrays one behind the other, mapped; they need not lie at multiples of their size."""
    needed = start + sum(np.dtype(kind).itemsize * count for kind, count in fields)
    if needed > len(content):
        raise errors.DataError(
            f"{where}: {len(content)} bytes, but its header says {needed} or more: "
            "truncated; copy it again."
        )
    arrays = []
    for kind, count in fields:
        stop = start + np.dtype(kind).itemsize * count
        arrays.append(content[start:stop].view(kind))
        start = stop
    return arrays


def _bins(prefix: pathlib.Path, dtype: str) -> Iterator[streams.Piece]:
    """PREFIX.bin, or its parts as the hub holds them: PREFIX-00000-of-00020.bin and so on."""
    whole, itemsize = prefix.with_name(prefix.name + ".bin"), np.dtype(dtype).itemsize
    paths = [whole]
    if not whole.exists():
        found = sorted(
            (match[1], match[2], path)
            for path in prefix.parent.iterdir()
            if path.name.startswith(prefix.name)
            and (match := _PART.fullmatch(path.name[len(prefix.name) :]))
        )
        paths = [path for *_, path in found] or [whole]
        counts = {(int(count), int(number)) for number, count, _ in found}
        if found and counts != {(len(found), n) for n in range(len(found))}:
            raise errors.DataError(
                f"{shown(prefix)}-*-of-*.bin: {len(found)} parts here, not all of "
                f"{found[0][1]}; copy the others too."
            )
    for path in paths:
        size = path.stat().st_size
        if size % itemsize:
            raise errors.DataError(
                f"{shown(path)}: {size} bytes hold no whole number of {dtype} tokens: "
                "truncated; copy it again."
            )
        yield streams.Piece(path, dtype, size // itemsize)
