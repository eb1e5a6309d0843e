"""The manifest of a prepared directory: counts, hashes and one fingerprint.

`fingerprint` covers contents only (tokens, counts, tokenizer), no path, date or machine,
so equal data has equal fingerprints everywhere; checkpoints record it.

Start at `read`.
"""

import hashlib
import json
import pathlib

import numpy as np

from memoryformer import errors
from memoryformer.data import tokenizer as tokenizer_lib

FORMAT = 1
DTYPES = ("uint16", "uint32")
_COUNTS = (  # of a split
    "tokens",
    "bytes",
    "token_bytes",
    "documents",
    "ends_of_document",
    "empty_dropped",
    "duplicates_of_validation_dropped",
)
_LARGEST = 1 << 63


def read(directory: pathlib.Path, verify: bool = False) -> dict:
    """The manifest of a prepared directory, its files checked by size.

    With `verify` their sha256 too, which reads them. Raises `DataError` for a missing,
    damaged or foreign directory.
    """
    path = directory / "manifest.json"
    again = "delete the directory and prepare it again"
    if not path.is_file():
        raise errors.DataError(
            f"{directory}: holds no manifest.json; not prepared data."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        splits = manifest["splits"]
        sound = manifest["fingerprint"] == fingerprint(manifest)
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise errors.DataError(f"{path}: damaged ({error}); {again}.") from error
    if manifest["format"] != FORMAT or not sound:
        raise errors.DataError(
            f"{path}: edited, or of another format than {FORMAT}; {again}."
        )
    if wrong := _wrong_field(manifest):
        raise errors.DataError(f"{path}: damaged ({wrong}); {again}.")
    if manifest["dtype"] not in DTYPES:
        raise errors.DataError(
            f"{path}: dtype {manifest['dtype']!r} is none of {', '.join(DTYPES)}, "
            f"which are little-endian; {again}."
        )
    for name, split in splits.items():
        file = directory / split["file"]
        size = file.stat().st_size if file.is_file() else -1
        expected = split["tokens"] * np.dtype(manifest["dtype"]).itemsize
        if size != expected:
            raise errors.DataError(
                f"{file}: {'missing' if size < 0 else f'{size} bytes'}, but the "
                f"manifest says {expected} bytes for {name}; {again}."
            )
        if verify and _file_sha256(file) != split["sha256"]:
            raise errors.DataError(
                f"{file}: its sha256 is not the manifest's; it is damaged: {again}."
            )
    return manifest


def _wrong_field(manifest: dict) -> str:
    """Name the first field that is not what `shards` writes; '' if all are."""
    tokenizer = {"name": str, "sha256": str, "vocab_size": int, "eot_id": int}
    split = {"file": str, "sha256": str} | dict.fromkeys(_COUNTS, int)
    source = {"kind": str, "name": str, "path": str, "licence": str}
    kinds = {"tokenizer": tokenizer, "splits.train": split, "splits.validation": split}
    kinds["source"] = source
    for section, fields in kinds.items():
        values = manifest
        for name in section.split("."):
            values = values.get(name) if isinstance(values, dict) else None
        for field, kind in fields.items():
            value = values.get(field) if isinstance(values, dict) else None
            if type(value) is not kind or (kind is int and not 0 <= value < _LARGEST):
                return f"{section}.{field} is {value!r}"
    end_token = manifest["tokenizer"].get("end_token", "")  # older ones lack it
    if not isinstance(end_token, str):
        return f"tokenizer.end_token is {end_token!r}"
    for name, info in manifest["splits"].items():
        if name not in ("train", "validation") or info["file"] != f"{name}.bin":
            return f"splits.{name} is in another file"
    return ""


def load_tokenizer(directory: pathlib.Path, manifest: dict) -> tokenizer_lib.Tokenizer:
    """The tokenizer that made the shards, checked against the manifest."""
    path, recorded = directory / "tokenizer.json", manifest["tokenizer"]
    end_token = recorded.get("end_token", "")
    tokenizer = tokenizer_lib.load_recorded(
        path, recorded["sha256"], end_token, "these shards"
    )
    tokenizer.name = manifest["tokenizer"]["name"]
    return tokenizer


def fingerprint(manifest: dict) -> str:
    """sha256 of everything but itself and the names by which things were asked for."""
    content = {
        "format": manifest["format"],
        "tokenizer": manifest["tokenizer"]["sha256"],
        "dtype": manifest["dtype"],
        "splits": manifest["splits"],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def directory_of(root: pathlib.Path, wanted: str) -> pathlib.Path | None:
    """The prepared directory under `root` whose fingerprint is `wanted`, if there is one.

    Whatever else lies there, damaged or not, is passed over.
    """
    for path in sorted(root.glob("*/manifest.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found = manifest["fingerprint"]
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            continue
        if found == wanted:
            return path.parent
    return None


def text_bytes(split: dict, token_bytes: np.ndarray) -> np.ndarray:
    """Bytes of a split's text for each token: [V]; their sum over the split is exact.

    A tokenizer that adds a space, drops pieces or changes the text has tokens of other
    bytes than the text's: each then counts in proportion.
    """
    if split["bytes"] == split["token_bytes"] or not split["token_bytes"]:
        return token_bytes
    return token_bytes * (split["bytes"] / split["token_bytes"])


def byte_note(manifest: dict) -> str:
    """One line on the bytes that the tokenizer does not keep; '' where it keeps them all."""
    splits = manifest["splits"].values()
    text, tokens = (sum(s[key] for s in splits) for key in ("bytes", "token_bytes"))
    if text == tokens:
        return ""
    return (
        f"data.tokenizer={manifest['tokenizer']['name']!r} does not keep every byte: the "
        f"text has {text:,}, its tokens stand for {tokens:,}; bits per byte count the text's."
    )


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise `DataError` naming the first id outside 0..vocab_size-1."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)].flat[0]
        raise errors.DataError(
            f"{where}: token id {int(bad)} is outside the vocabulary of {vocab_size}."
        )


def _file_sha256(path: pathlib.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
