"""Tokens out: the pairs of files that Megatron-LM and GPT-NeoX train on.

    OUTPUT/train.bin, train.idx, validation.bin, validation.idx    see `megatron_index`
    OUTPUT/tokenizer.json                                          what made them

A document is stored as [t1, .., tn, eot]. Start at `to_megatron`.
"""

import pathlib
import struct
from collections.abc import Callable

import numpy as np

from memoryformer import data, errors
from memoryformer.data import megatron_index
from memoryformer.files import atomic

_CHUNK = 1 << 24  # tokens written together
_LONGEST = (1 << 31) - 1  # tokens of a sequence, which its index counts in int32


def to_megatron(
    dataset: data.Dataset,
    output: pathlib.Path,
    on_tokens: Callable[[int], None] = lambda done: None,
) -> list[pathlib.Path]:
    """Write both splits and the tokenizer; return the prefixes. Files appear whole.

    Tokens are uint16, or int32 for larger vocabularies: the format knows no uint32. Raises
    `StorageError` where they cannot be written.
    """
    dtype = np.dtype("<u2" if dataset.tokenizer.vocab_size <= 1 << 16 else "<i4")
    prefixes = []
    for split in (dataset.train, dataset.validation):
        prefix = output / split.name
        with atomic.replacing(f"{prefix}.bin") as temporary:
            sizes = _write_tokens(temporary, split, dtype, on_tokens)
        with atomic.replacing(f"{prefix}.idx") as temporary:
            _write_index(temporary, sizes, dtype)
        prefixes.append(prefix)
    dataset.tokenizer.save(output / "tokenizer.json")
    return prefixes


def _write_tokens(
    path: pathlib.Path,
    split: data.Split,
    dtype: np.dtype,
    on_tokens: Callable[[int], None],
) -> np.ndarray:
    """Write the stream behind its first end of document; return documents' sizes [D]."""
    tokens = split.tokens
    ends = []
    with path.open("wb") as stream:
        # The first end only begins the stream; every other one ends a document.
        for first in range(1, len(tokens), _CHUNK):
            chunk = tokens[first : first + _CHUNK]
            stream.write(chunk.astype(dtype).tobytes())
            ends.append(first + np.flatnonzero(chunk == split.eot_id))
            on_tokens(first + len(chunk))
    sizes = np.diff(np.concatenate(ends), prepend=0)
    if sizes.max(initial=0) > _LONGEST:
        raise errors.DataError(
            f"{split.name}: a document has {sizes.max()} tokens, and Megatron's index "
            f"holds {_LONGEST} at most."
        )
    return sizes


def _write_index(path: pathlib.Path, sizes: np.ndarray, dtype: np.dtype) -> None:
    code = {name: code for code, name in megatron_index.CODES.items()}[dtype.name]
    offsets = (np.cumsum(sizes) - sizes) * dtype.itemsize
    with path.open("wb") as stream:
        stream.write(megatron_index.MMIDIDX)
        stream.write(struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1))
        stream.write(sizes.astype("<i4").tobytes())
        stream.write(offsets.astype("<i8").tobytes())
        stream.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
