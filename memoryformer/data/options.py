"""What to read and how to tokenise it: the `data` section of a config."""

import dataclasses
import os
import pathlib

from memoryformer import config as config_lib
from memoryformer import errors
from memoryformer.files import paths

SOURCES = ("stdlib", "text", "c4", "tfds", "prepared")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One corpus and one tokenizer.

    source: where documents come from
        stdlib    the Python standard library's own sources (no download)
        text      local text or JSON-lines files: a file, a folder or a glob in `path`
        c4        downloaded C4/Pile-style JSON-lines shards: a folder or a glob in `path`
        tfds      the TFDS data set `name`; `path` is TFDS's data_dir ('': TFDS's default)
        prepared  a directory that `prepare` made earlier, perhaps elsewhere, in `path`
    text_field: the key that holds the text in JSON lines and TFDS examples; `meta.text`
        is the text inside of `meta`.
    separator: what ends a document inside of plain-text files of a `text` source, such as
        <|endoftext|> or \\n\\n; '' leaves them whole.
    validation_path: held-out files of a `text` or `c4` source; '' splits by document.
    validation_every: one document in about this many goes to validation.
    align_documents: documents begin at multiples of this many positions of a row, behind
        padding, as model.recurrence needs (0: packed as they lie).
    max_documents: read only this many documents (0: all).
    tokenizer: bytes | bpe:VOCAB_SIZE | path/to/tokenizer.json | hub:owner/name[@revision]
    end_token: the token of a tokenizer.json that ends a document ('': the first of <eot>,
        <|endoftext|>, <|end_of_text|>, </s>, <eos>, <|eot|> that it has).
    data_dir: the cache; '' means $MEMORYFORMER_DATA, else ~/.cache/memoryformer.

    Raises `ConfigError` for a field that its source cannot use.
    """

    source: str = "stdlib"
    # The fingerprint says whether it is the same text, wherever it lies.
    path: str = config_lib.field("nothing", "", local=True)
    name: str = ""
    text_field: str = "text"
    separator: str = ""
    validation_path: str = ""
    validation_every: int = 20
    max_documents: int = 0
    # By which name it was asked for: its hash says whether it is the same.
    tokenizer: str = config_lib.field("nothing", "bpe:4096")
    end_token: str = config_lib.field("nothing", "")
    data_dir: str = config_lib.field("nothing", "", local=True)
    align_documents: int = 0

    def __post_init__(self):
        config_lib.choose(self.source, SOURCES, "data.source")
        if self.source in ("text", "c4", "prepared") and not self.path:
            raise errors.ConfigError(
                f"data.path='': data.source={self.source!r} needs one; "
                "set --config.data.path=FILE_OR_FOLDER."
            )
        # A field that would be ignored is a mistake: training on the wrong corpus.
        users = {
            "path": ("text", "c4", "tfds", "prepared"),
            "validation_path": ("text", "c4"),
            "separator": ("text",),
            "name": ("tfds",),
            "text_field": ("text", "c4", "tfds"),
            "max_documents": ("stdlib", "text", "c4", "tfds"),
            "validation_every": ("stdlib", "text", "c4", "tfds"),
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for field, sources in users.items():
            value = getattr(self, field)
            if value != defaults[field] and self.source not in sources:
                raise errors.ConfigError(
                    f"data.{field}={value!r}: data.source={self.source!r} does not use "
                    f"it; set data.source to one of {', '.join(sources)}."
                )
        for field in ("path", "validation_path", "data_dir"):
            if value := getattr(self, field):
                paths.local(value, f"data.{field}")
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


def cache_root(data_config: DataConfig) -> pathlib.Path:
    """The folder that holds every prepared data set.

    `data_config.data_dir`, else $MEMORYFORMER_DATA, else ~/.cache/memoryformer. Token
    files are memory-mapped, so it must be a local or mounted path.
    """
    root = data_config.data_dir or os.environ.get("MEMORYFORMER_DATA", "")
    name = "data.data_dir" if data_config.data_dir else "MEMORYFORMER_DATA"
    return paths.local(root or "~/.cache/memoryformer", name)
