"""The manifest of a prepared directory: counts, hashes and one fingerprint.

`fingerprint` covers contents only (tokens, counts, tokenizer), no path, date or machine,
so equal data has equal fingerprints everywhere; checkpoints record it.

Start at `read`.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from memoryformer import errors
from memoryformer.data import options
from memoryformer.data import tokenizer as tokenizer_lib

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT, PARTED = 1, 2  # one file for each split; several
FILE = "manifest.json"
DTYPES = ("uint16", "uint32")
SPLITS = ("validation", "train")
_LARGEST = 1 << 63
_DAMAGE = (ValueError, KeyError, TypeError, OSError, RecursionError)
T = TypeVar("T", bound="DataclassInstance")


@dataclasses.dataclass(frozen=True)
class SourceFacts:
    """Where the documents come from."""

    kind: str
    name: str
    path: str
    licence: str


@dataclasses.dataclass(frozen=True)
class TokenizerFacts:
    """Which tokenizer made the tokens."""

    name: str
    sha256: str
    vocab_size: int
    eot_id: int
    end_token: str = ""  # older manifests lack it


@dataclasses.dataclass(frozen=True)
class SplitFacts:
    """What one token file holds."""

    file: str
    documents: int
    tokens: int
    ends_of_document: int
    bytes: int  # of the text, as UTF-8
    token_bytes: int  # that its tokens stand for
    empty_dropped: int
    duplicates_of_validation_dropped: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class PartFacts:
    """One file of a split that lies in several; an end of document begins each document."""

    file: str
    documents: int
    tokens: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class PartedFacts(SplitFacts):
    """What a split in several files holds; `parts` is their order.

    file: ''.  tokens: of all files, and the one end behind the last, which none holds.
    sha256: over those of the files.  duplicates_dropped: where equal texts are kept once.
    """

    deduplicated: bool = False
    duplicates_dropped: int = 0
    parts: tuple[PartFacts, ...] = ()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json says; `splits` are those of SPLITS."""

    source: SourceFacts
    tokenizer: TokenizerFacts
    dtype: str  # of the token ids: one of DTYPES
    splits: Mapping[str, SplitFacts]

    @property
    def fingerprint(self) -> str:
        """sha256 of contents and tokenizer; see `fingerprint`."""
        return self.to_json()["fingerprint"]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        is_parted = isinstance(self.splits["train"], PartedFacts)
        values = {"format": PARTED if is_parted else FORMAT} | dataclasses.asdict(self)
        return values | {"fingerprint": fingerprint(values)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Manifest":
        """Raises `ValueError` naming the first field that is not what `to_json` makes."""
        if values["dtype"] not in DTYPES:
            raise ValueError(
                f"dtype {values['dtype']!r} is none of {', '.join(DTYPES)}, which are "
                "little-endian"
            )
        splits = values["splits"]
        if not isinstance(splits, Mapping) or set(splits) - set(SPLITS):
            raise ValueError(f"splits is {splits!r}")
        read = _parted if values["format"] == PARTED else _in_one_file
        parsed = {name: read(name, splits.get(name)) for name in SPLITS}
        source = _parsed(SourceFacts, values.get("source"), "source")
        tokenizer = _parsed(TokenizerFacts, values["tokenizer"], "tokenizer")
        return cls(source, tokenizer, values["dtype"], parsed)


def _in_one_file(name: str, values: Any) -> SplitFacts:
    split = _parsed(SplitFacts, values, f"splits.{name}")
    if split.file != f"{name}.bin":  # it may name any file of the machine
        raise ValueError(f"splits.{name}.file is {split.file!r}")
    return split


def _parted(name: str, values: Any) -> PartedFacts:
    where = f"splits.{name}"
    split = _parsed(PartedFacts, {**values, "parts": ()}, where)
    parts = [_parsed(PartFacts, part, f"{where}.parts") for part in values["parts"]]
    for part in parts:
        if not re.fullmatch(rf"{name}-\d{{5}}-of-\d{{5}}\.bin", part.file):
            raise ValueError(f"{where}.parts has the file {part.file!r}")
    if split.tokens != 1 + sum(part.tokens for part in parts):
        raise ValueError(f"{where}.tokens is {split.tokens}")
    return dataclasses.replace(split, parts=tuple(parts))


def _parsed(cls: type[T], values: Any, where: str) -> T:
    """A dataclass of texts and counts from JSON; raises `ValueError` for any other value."""
    values = values if isinstance(values, Mapping) else {}
    known = {}
    for field in dataclasses.fields(cls):
        default = None if field.default is dataclasses.MISSING else field.default
        value = known[field.name] = values.get(field.name, default)
        is_count = field.type is int
        kind = getattr(field.type, "__origin__", field.type)
        if type(value) is not kind or (is_count and not 0 <= value < _LARGEST):
            raise ValueError(f"{where}.{field.name} is {value!r}")
    return cls(**known)


def read(directory: pathlib.Path, verify: bool = False) -> Manifest:
    """The manifest of a prepared directory, its files checked by size.

    With `verify` their sha256 too, which reads them. Raises `DataError` for a missing,
    damaged or foreign directory.
    """
    path = directory / FILE
    again = "delete the directory and prepare it again"
    if not path.is_file():
        raise errors.DataError(f"{directory}: holds no {FILE}; not prepared data.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sound = values["fingerprint"] == fingerprint(values)
        is_ours = values["format"] in (FORMAT, PARTED) and sound
        manifest = Manifest.from_json(values) if is_ours else None
    except _DAMAGE as error:
        raise errors.DataError(f"{path}: damaged ({error}); {again}.") from error
    if manifest is None:
        raise errors.DataError(
            f"{path}: edited, or of another format than {FORMAT} and {PARTED}; {again}."
        )
    for split in manifest.splits.values():
        for stored in files_of(split):
            _check_file(directory / stored.file, stored, manifest.dtype, verify)
    return manifest


def describe(data_config: options.DataConfig) -> SourceFacts:
    """What a manifest says about the origin of the documents."""
    licences = {"stdlib": "PSF-2.0 (read locally, not shipped)"}
    return SourceFacts(
        kind=data_config.source,
        name=data_config.name,
        path=data_config.path,
        licence=licences.get(data_config.source, "the corpus's own"),
    )


def files_of(split: SplitFacts) -> Sequence[SplitFacts | PartFacts]:
    """The files of a split, in their order."""
    return split.parts if isinstance(split, PartedFacts) else [split]


def _check_file(
    file: pathlib.Path, stored: SplitFacts | PartFacts, dtype: str, verify: bool
) -> None:
    again = "delete the directory and prepare it again"
    size = file.stat().st_size if file.is_file() else -1
    expected = stored.tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise errors.DataError(
            f"{file}: {'missing' if size < 0 else f'{size} bytes'}, but the "
            f"manifest says {expected} bytes for {file.stem}; {again}."
        )
    if verify and _file_sha256(file) != stored.sha256:
        raise errors.DataError(
            f"{file}: its sha256 is not the manifest's; it is damaged: {again}."
        )


def facts_of(tokenizer: tokenizer_lib.Tokenizer) -> TokenizerFacts:
    """What a manifest says of a tokenizer."""
    return TokenizerFacts(
        name=tokenizer.name,
        sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        end_token=tokenizer.end_token,
    )


def load_tokenizer(
    directory: pathlib.Path, manifest: Manifest
) -> tokenizer_lib.Tokenizer:
    """The tokenizer that made the token files, checked against the manifest."""
    path, facts = directory / "tokenizer.json", manifest.tokenizer
    tokenizer = tokenizer_lib.load_recorded(
        path, facts.sha256, facts.end_token, "these token files"
    )
    tokenizer.name = facts.name
    return tokenizer


def fingerprint(values: Mapping[str, Any]) -> str:
    """sha256 of a manifest's values, less itself and the names of corpus and tokenizer."""
    content = {
        "format": values["format"],
        "tokenizer": values["tokenizer"]["sha256"],
        "dtype": values["dtype"],
        "splits": values["splits"],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def directory_of(root: pathlib.Path, wanted: str) -> pathlib.Path | None:
    """The prepared directory under `root` whose fingerprint is `wanted`, if there is one.

    Whatever else lies there, damaged or not, is passed over.
    """
    for path in sorted(root.glob(f"*/{FILE}")):
        try:
            if json.loads(path.read_text(encoding="utf-8"))["fingerprint"] == wanted:
                return path.parent
        except _DAMAGE:
            continue
    return None


def text_bytes(split: SplitFacts, token_bytes: np.ndarray) -> np.ndarray:
    """Bytes of a split's text for each token: [V]; their sum over the split is exact.

    A tokenizer that adds a space, drops pieces or changes the text has tokens of other
    bytes than the text's: each then counts in proportion.
    """
    if split.bytes == split.token_bytes or not split.token_bytes:
        return token_bytes
    return token_bytes * (split.bytes / split.token_bytes)


def byte_note(manifest: Manifest) -> str:
    """One line on the bytes that the tokenizer does not keep; '' where it keeps them all."""
    text = sum(split.bytes for split in manifest.splits.values())
    tokens = sum(split.token_bytes for split in manifest.splits.values())
    if text == tokens:
        return ""
    return (
        f"data.tokenizer={manifest.tokenizer.name!r} does not keep every byte: the "
        f"text has {text:,}, its tokens stand for {tokens:,}; bits per byte count the text's."
    )


def _file_sha256(path: pathlib.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
