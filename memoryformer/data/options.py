"""What to read and how to tokenise it: the `data` section of a config."""

import dataclasses
import os
import pathlib

from memoryformer import config as config_lib
from memoryformer import errors
from memoryformer.config import field
from memoryformer.files import paths

SOURCES = ("stdlib", "text", "c4", "tfds", "prepared", "megatron")


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

    Raises `ConfigError` for a field that its source cannot use.
    """

    source: str = field(
        "numbers", "stdlib", doc="stdlib | text | c4 | tfds | prepared | megatron."
    )
    # The fingerprint says whether it is the same text, wherever it lies.
    path: str = field(
        "nothing", "", local=True, doc="File, folder or glob of the source."
    )
    name: str = field("numbers", "", doc="Name of a TFDS data set.")
    text_field: str = field(
        "numbers",
        "text",
        doc="Key of the text in JSON lines and TFDS; meta.text: inside of meta.",
    )
    separator: str = field(
        "numbers",
        "",
        doc="Ends a document inside of a text file, as <|endoftext|>; '': files are whole.",
    )
    validation_path: str = field(
        "numbers", "", doc="Held-out files of text or c4; '': documents are held out."
    )
    validation_every: int = field(
        "numbers", 20, doc="One document in about so many is held out."
    )
    max_documents: int = field("numbers", 0, doc="Read only so many documents; 0: all.")
    part_bytes: int = field(
        "numbers",
        32 << 20,
        doc="Bytes of a part of text or c4; a smaller corpus is whole; 0: so is any.",
    )
    deduplicate: bool = field(
        "numbers", False, doc="Keep equal texts of text or c4 once."
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
        config_lib.choose(self.source, SOURCES, "data.source")
        if self.source in ("text", "c4", "prepared", "megatron") and not self.path:
            raise errors.ConfigError(
                f"data.path='': data.source={self.source!r} needs one; "
                "set --config.data.path=FILE_OR_FOLDER."
            )
        # A field that would be ignored is a mistake: training on the wrong corpus.
        users = {
            "path": ("text", "c4", "tfds", "prepared", "megatron"),
            "validation_path": ("text", "c4", "megatron"),
            "separator": ("text",),
            "name": ("tfds",),
            "text_field": ("text", "c4", "tfds"),
            "part_bytes": ("text", "c4"),
            "deduplicate": ("text", "c4"),
            "max_documents": ("stdlib", "text", "c4", "tfds"),
            "validation_every": ("stdlib", "text", "c4", "tfds", "megatron"),
        }
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for key, sources in users.items():
            value = getattr(self, key)
            if value != defaults[key] and self.source not in sources:
                raise errors.ConfigError(
                    f"data.{key}={value!r}: data.source={self.source!r} does not use "
                    f"it; set data.source to one of {', '.join(sources)}."
                )
        for key in ("path", "validation_path", "data_dir"):
            if value := getattr(self, key):
                paths.local(value, f"data.{key}")
        if self.source == "tfds" and not self.name:
            raise errors.ConfigError(
                "data.name='': data.source='tfds' needs a TFDS name, e.g. "
                "--config.data.name=lm1b."
            )
        if self.validation_every < 2:
            raise errors.ConfigError(
                f"data.validation_every={self.validation_every}: must be at least 2, "
                "or nothing is left to train on."
            )
        if self.max_documents < 0:
            raise errors.ConfigError(
                f"data.max_documents={self.max_documents}: must be 0 (all) or more."
            )
        if self.part_bytes < 0:
            raise errors.ConfigError(
                f"data.part_bytes={self.part_bytes}: must be 0 (one part) or more."
            )
        if self.deduplicate and self.max_documents:
            raise errors.ConfigError(
                f"data.deduplicate=True: needs all documents; leave out "
                f"data.max_documents={self.max_documents}."
            )
        if self.align_documents < 0:
            raise errors.ConfigError(
                f"data.align_documents={self.align_documents}: must be 0 (off) or more."
            )
        own_end = self.tokenizer == "bytes" or self.tokenizer.startswith("bpe:")
        if self.end_token and (own_end or self.source == "prepared"):
            raise errors.ConfigError(
                f"data.end_token={self.end_token!r}: names the end of a tokenizer.json; "
                f"data.source={self.source!r} with data.tokenizer={self.tokenizer!r} has "
                "its own; leave it ''."
            )
        if not self.text_field:
            raise errors.ConfigError(
                "data.text_field='': name the field with the text."
            )


def part_bytes(data_config: DataConfig) -> int:
    """Bytes of input that make a part; more than any corpus has, for one part."""
    return data_config.part_bytes or 1 << 62


def deduplicates(data_config: DataConfig) -> bool:
    """Whether equal texts are kept once."""
    return data_config.deduplicate


def cache_root(data_config: DataConfig) -> pathlib.Path:
    """The folder that holds every prepared data set.

    `data_config.data_dir`, else $MEMORYFORMER_DATA, else ~/.cache/memoryformer. Token
    files are memory-mapped, so it must be a local or mounted path.
    """
    root = data_config.data_dir or os.environ.get("MEMORYFORMER_DATA", "")
    name = "data.data_dir" if data_config.data_dir else "MEMORYFORMER_DATA"
    return paths.local(root or "~/.cache/memoryformer", name)
