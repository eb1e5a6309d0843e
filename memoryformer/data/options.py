"""What to read and how to tokenise it: the `data` section of a config."""

import dataclasses
import os
import pathlib
from typing import Any

from memoryformer import config as config_lib
from memoryformer import errors
from memoryformer.config import field
from memoryformer.files import paths, stores

_NAME = "data.source_options"


@dataclasses.dataclass(frozen=True)
class DocumentOptions:
    """Of every source that is read document by document."""

    validation_every: int = field(
        "numbers", 20, doc="One document in about so many is held out."
    )
    max_documents: int = field("numbers", 0, doc="Read only so many documents; 0: all.")

    def __post_init__(self):
        # With 1 nothing is left to train on.
        config_lib.at_least(self, _NAME, 2, "validation_every")
        config_lib.at_least(self, _NAME, 0, "max_documents")


@dataclasses.dataclass(frozen=True)
class RecordOptions(DocumentOptions):
    """Of documents that are records with fields."""

    text_field: str = field(
        "numbers",
        "text",
        doc="Key of the text in JSON lines and TFDS; meta.text: inside of meta.",
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.text_field:
            raise errors.ConfigError(
                f"{_NAME}.text_field='': name the field with the text."
            )


@dataclasses.dataclass(frozen=True)
class ShardOptions(RecordOptions):
    """Of JSON-lines shards."""

    validation_path: str = field(
        "numbers", "", doc="Held-out files; '': documents are held out."
    )
    part_bytes: int = field(
        "numbers",
        32 << 20,
        doc="Input of a part, bytes; a smaller corpus is not divided; 0: nor is any.",
    )
    deduplicate: bool = field("numbers", False, doc="Keep equal texts once.")

    def __post_init__(self):
        super().__post_init__()
        if self.validation_path:
            _check_path(self.validation_path, f"{_NAME}.validation_path", in_store=True)
        config_lib.at_least(self, _NAME, 0, "part_bytes")
        if self.deduplicate and self.max_documents:
            raise errors.ConfigError(
                f"{_NAME}.deduplicate=True: needs all documents; leave out "
                f"{_NAME}.max_documents={self.max_documents}."
            )


@dataclasses.dataclass(frozen=True)
class TextOptions(ShardOptions):
    """Of text and JSON-lines files."""

    separator: str = field(
        "numbers",
        "",
        doc="Ends a document inside of a text file, as <|endoftext|>; '': files are whole.",
    )


@dataclasses.dataclass(frozen=True)
class CatalogueOptions(RecordOptions):
    """Of TFDS."""

    name: str = field("numbers", "", doc="Name of a TFDS data set.")

    def __post_init__(self):
        super().__post_init__()
        if not self.name:
            raise errors.ConfigError(
                f"{_NAME}.name='': data.source='tfds' needs a TFDS name, e.g. "
                f"--config.{_NAME}.name=lm1b."
            )


@dataclasses.dataclass(frozen=True)
class TokenOptions:
    """Of tokens that were made elsewhere."""

    validation_path: str = field(
        "numbers", "", doc="Held-out prefixes; '': the last documents are held out."
    )
    validation_every: int = field(
        "numbers", 20, doc="One document in about so many is held out."
    )

    def __post_init__(self):
        if self.validation_path:
            paths.local(self.validation_path, f"{_NAME}.validation_path")
        config_lib.at_least(self, _NAME, 2, "validation_every")


_IN_STORE = ("text", "c4", "prepared")  # sources whose path may be in an object store
SOURCES: dict[str, Any] = {
    "stdlib": DocumentOptions,
    "text": TextOptions,
    "c4": ShardOptions,
    "tfds": CatalogueOptions,
    "prepared": config_lib.NoOptions,
    "megatron": TokenOptions,
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One corpus and one tokenizer.

    source: where documents come from
        stdlib    the Python standard library's own sources (no download)
        text      local text or JSON-lines files: a file, a folder or a glob in `path`
        c4        downloaded C4/Pile-style JSON-lines shards: a folder or a glob in `path`
        tfds      the TFDS data set `name`; `path` is TFDS's data_dir ('': TFDS's default)
        prepared  a directory that `prepare` made earlier, perhaps elsewhere, in `path`
        megatron  tokens of Megatron-LM or GPT-NeoX, PREFIX.bin and PREFIX.idx, in `path`

    Raises `ConfigError` for an option that its source cannot use: it would be ignored.
    """

    source: str = field(
        "numbers", "stdlib", doc="stdlib | text | c4 | tfds | prepared | megatron."
    )
    source_options: Any = field(
        "numbers", None, doc="Options of the source.", options=SOURCES
    )
    # The fingerprint says whether it is the same text, wherever it lies.
    path: str = field(
        "nothing", "", local=True, doc="File, folder or glob of the source."
    )
    # By which name it was asked for: its hash says whether it is the same.
    tokenizer: str = field(
        "nothing",
        "bpe:4096",
        doc="bytes | bpe:VOCAB_SIZE | path/to/tokenizer.json | hub:owner/name[@revision].",
    )
    end_token: str = field(
        "nothing",
        "",
        doc="Token of a tokenizer.json that ends a document; '': the first known of it.",
    )
    data_dir: str = field(
        "nothing",
        "",
        local=True,
        doc="Cache; '': $MEMORYFORMER_DATA, else ~/.cache/memoryformer.",
    )
    align_documents: int = field(
        "numbers",
        0,
        doc="Documents begin at multiples of so many positions; 0: anywhere.",
    )

    def __post_init__(self):
        config_lib.freeze(self, "data")
        needs_path = ("text", "c4", "prepared", "megatron")
        if self.source in needs_path and not self.path:
            raise errors.ConfigError(
                f"data.path='': data.source={self.source!r} needs one; "
                "set --config.data.path=FILE_OR_FOLDER."
            )
        if self.source == "stdlib" and self.path:
            others = ", ".join(name for name in SOURCES if name != "stdlib")
            raise errors.ConfigError(
                f"data.path={self.path!r}: data.source='stdlib' does not use it; set "
                f"data.source to one of {others}."
            )
        for key in ("path", "data_dir"):
            if value := getattr(self, key):
                in_store = key == "path" and self.source in _IN_STORE
                _check_path(value, f"data.{key}", in_store)
        config_lib.at_least(self, "data", 0, "align_documents")
        own_end = self.tokenizer == "bytes" or self.tokenizer.startswith("bpe:")
        if self.end_token and (own_end or self.source == "prepared"):
            raise errors.ConfigError(
                f"data.end_token={self.end_token!r}: names the end of a tokenizer.json; "
                f"data.source={self.source!r} with data.tokenizer={self.tokenizer!r} has "
                "its own; leave it ''."
            )

    @property
    def name(self) -> str:
        """The data set's in the catalogue of its source; '' where that has none."""
        return getattr(self.source_options, "name", "")


def _check_path(path: str, name: str, in_store: bool) -> None:
    """Raise `ConfigError` for what can be no path here, nor (`in_store`) in a store."""
    if in_store and stores.is_store(path):
        stores.checked(path, name, pattern=True)
    else:
        paths.local(path, name)


def part_bytes(data_config: DataConfig) -> int:
    """Bytes of input that make a part; more than any corpus has, for one part."""
    return data_config.source_options.part_bytes or 1 << 62


def cache_root(data_config: DataConfig) -> pathlib.Path:
    """The folder that holds every prepared data set.

    `data_config.data_dir`, else $MEMORYFORMER_DATA, else ~/.cache/memoryformer. Token
    files are memory-mapped, so it must be a local or mounted path.
    """
    root = data_config.data_dir or os.environ.get("MEMORYFORMER_DATA", "")
    name = "data.data_dir" if data_config.data_dir else "MEMORYFORMER_DATA"
    return paths.local(root or "~/.cache/memoryformer", name)
