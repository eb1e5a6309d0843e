"""The safetensors format: read and write named numpy arrays, bfloat16 included.

    8 bytes: length n of the header · n bytes: JSON {name: {dtype, shape, data_offsets}}
    · the arrays, one after another, little-endian, without holes

Written here and not taken from the `safetensors` package: its numpy side knows no
bfloat16, and it is sixty lines. Start at `read` and `write`.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from memoryformer.convert import folders
from memoryformer.errors import DataError
from memoryformer.files import atomic

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8
_LONGEST_HEADER = 100_000_000  # the reference reader's limit


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return (arrays, metadata); arrays are mapped from the file, read when touched.

    Raises `DataError` for a file that is cut short or not of this format.
    """
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise DataError(f"{path}: not a safetensors file, or cut short.")
            text = file.read(length)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    header = folders.parse_object(text, f"{path}: its safetensors header")
    metadata = header.pop("__metadata__", None) or {}
    start = 8 + length
    # An empty array cannot be mapped.
    data = np.memmap(path, np.uint8, "r", start) if size > start else np.zeros(0, "u1")
    arrays, spans = {}, []
    for name, entry in header.items():
        dtype, shape, span = _layout(path, name, entry)
        if span[1] > len(data):
            raise DataError(
                f"{path}: {name} does not fit the file, which is cut short."
            )
        try:
            arrays[name] = data[slice(*span)].view(dtype).reshape(shape)
        except (ValueError, OverflowError) as error:  # of more axes than numpy has, say
            raise DataError(f"{path}: {name} has a shape of none: {error}.") from error
        spans.append(span)
    _check_tiling(path, spans, len(data))
    return arrays, metadata


def write(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `arrays`; `path` appears only once everything is on disk."""
    # Widest type first, as the reference writer does: every array stays aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    offset = 0
    for name in order:
        array = arrays[name]
        if array.dtype not in _NAMES:
            raise DataError(f"{name}: safetensors has no type for {array.dtype}.")
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).tobytes())


def _layout(path, name, entry) -> tuple[np.dtype, list[int], tuple[int, int]]:
    """The type, shape and byte span that a header gives a tensor."""
    odd = DataError(f"{path}: the header's entry of {name!r:.60} is damaged.")
    if not isinstance(entry, dict):
        raise odd
    kind, shape = entry.get("dtype"), entry.get("shape")
    span = entry.get("data_offsets")
    if not isinstance(kind, str) or not _naturals(shape) or not _naturals(span):
        raise odd
    if kind not in DTYPES:
        raise DataError(f"{path}: {name} has the unknown type {kind:.20}.")
    dtype = np.dtype(DTYPES[kind])
    if len(span) != 2 or span[1] - span[0] != math.prod(shape) * dtype.itemsize:
        raise odd
    return dtype, shape, (span[0], span[1])


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_tiling(path, spans, size) -> None:
    """The arrays lie one after another and fill the file, as the format wants it."""
    end = 0
    for begin, after in sorted(spans):
        if begin != end:
            raise DataError(
                f"{path}: its arrays overlap or leave holes at byte {begin}."
            )
        end = after
    if end != size:
        raise DataError(f"{path}: holds {size - end} bytes that belong to no array.")
