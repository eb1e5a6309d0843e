"""TFDS builders of the local corpora, without TensorFlow.

`Stdlib` is the default that downloads nothing; `TextFiles` holds local text or JSON
lines, and C4/Pile-style shards with `json_only`. Both are ordinary TFDS builders with
the features `name` and `text`:

    builder = TextFiles(config=TextConfig(name="mine", path="notes/"), data_dir=DIR)
    builder.download_and_prepare()
    source = builder.as_data_source(split="train")     # random access, bytes

A document is held out when sha256(key) mod validation_every == 0. The key is the
relative path for the standard library and the text itself elsewhere; if none is held
out, the one with the smallest remainder is, so a corpus of two documents has both splits.
"""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

# Importing this module registers the builders under their TFDS names.
import tensorflow_datasets as tfds

from memoryformer import errors
from memoryformer.data import (
    listing,
    local_files,
    names,
    options,
    records,
    text_files,
)
from memoryformer.data.records import Example


@dataclasses.dataclass
class TextConfig(tfds.core.BuilderConfig):
    """Which documents a builder reads; `options.DataConfig` and its options of a source."""

    path: str = ""
    json_only: bool = False
    text_field: str = "text"
    separator: str = ""
    validation_path: str = ""
    validation_every: int = 20
    max_documents: int = 0


class _LocalDocuments(records.RecordsBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS has no types
    """Splits documents by the hash of a key; subclasses say which files and which key."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (TextConfig(name="default", description="As configured."),)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.on_bytes: Callable[[int], None] = lambda done: None
        self.notes: list[str] = []  # what the user should know of the files
        self._lists: dict[str, listing.Files] = {}
        self._bytes_read = 0
        self._marked = 0  # documents that hold the marker

    def input_bytes(self) -> int:
        """File bytes that `download_and_prepare` reads: every split reads its files."""
        files = self._train_files()
        held_out = self.builder_config.validation_path
        files = files + (self._list(held_out) if held_out else files)
        return sum(path.stat().st_size for _, path in files)

    def marker_line(self) -> str:
        """What to do about a marker between documents that is read as text, or ''."""
        if not self._marked or self.builder_config.separator:
            return ""
        return text_files.marker_line(self._marked)

    def _split_generators(self, dl_manager) -> dict[str, Iterator[Example]]:
        if self.builder_config.validation_path:
            held_out = self._list(self.builder_config.validation_path)
            return {
                "train": self._examples(self._train_files()),
                "validation": self._examples(held_out),
            }
        chosen = self._fallback_key()
        return {
            split: self._examples(self._train_files(), split, chosen)
            for split in ("train", "validation")
        }

    def _examples(
        self, files: listing.Files, split: str = "", fallback: str = ""
    ) -> Iterator[Example]:
        every = self.builder_config.validation_every
        sizes = (path.stat().st_size for _, path in files)
        ends = list(itertools.accumulate(sizes, initial=self._bytes_read))
        for name, text, index in self._documents(files):
            # How far into its file a document is, is known by its characters only.
            read = max(self._bytes_read, ends[index]) + len(text)
            self._bytes_read = min(read, ends[index + 1])
            self.on_bytes(self._bytes_read)
            if split:
                key = self._split_key(name, text)
                held_out = local_files.in_validation(key, every) or key == fallback
                if held_out != (split == "validation"):
                    continue
            self._marked += text_files.MARKER in text
            yield name, {"name": name, "text": text}
        self._bytes_read = ends[-1]

    def _documents(self, files: listing.Files) -> Iterator[tuple[str, str, int]]:
        config = self.builder_config
        how = local_files.Reading(
            config.text_field,
            names.unescaped(config.separator),
            local_files.lone_text_piece(files, config.validation_every),
        )
        documents = local_files.read_documents(files, how)
        return itertools.islice(documents, config.max_documents or None)

    def _fallback_key(self) -> str:
        """The key to hold out when the rule holds out none, else ''."""
        every = self.builder_config.validation_every
        known: set[int] = set()  # hashes of different keys
        fallback, smallest = "", every
        seen: collections.Counter[bool] = collections.Counter()
        for name, text, _ in self._documents(self._train_files()):
            key = self._split_key(name, text)
            seen[local_files.in_validation(key, every)] += 1
            if seen[True] and seen[False]:
                return ""
            if not seen[True] and len(known) < 1000:
                digest = int(hashlib.sha256(key.encode()).hexdigest(), 16)
                known.add(digest)
                if digest % every < smallest:
                    fallback, smallest = key, digest % every
        if len(known) < 2:
            count = sum(seen.values())
            number = "1 document" if count == 1 else f"{count} documents"
            separator = self.builder_config.separator
            hint = f" (split at separator={separator!r})" if separator else ""
            raise errors.DataError(
                f"{names.shown(self.builder_config.path) or self.name}: {number}{hint} "
                "cannot be split into train and validation; give more documents or set "
                "data.source_options.validation_path."
            )
        return fallback

    def _train_files(self) -> listing.Files:
        return self._list(self.builder_config.path)

    def _list(self, path: str) -> listing.Files:
        raise NotImplementedError

    def _split_key(self, name: str, text: str) -> str:
        raise NotImplementedError


class Stdlib(_LocalDocuments):
    """The Python standard library's own `*.py` files, tests left out.

    Read where they lie and shipped nowhere; licence PSF-2.0. About 12 MB of code.
    """

    name = "memoryformer_stdlib"

    def _list(self, path: str) -> listing.Files:
        return [
            (key, file)
            for key, file in listing.stdlib_files()
            if file.stat().st_size  # an empty __init__.py is no document
        ]

    def _split_key(self, name: str, text: str) -> str:
        return name


class TextFiles(_LocalDocuments):
    """Local text or JSON-lines files: one document per text file or JSON line."""

    name = "memoryformer_text"

    def _list(self, path: str) -> listing.Files:
        """What `path` names; of several files, those that hold text."""
        if path not in self._lists:
            config = self.builder_config
            self._lists[path] = text_files.list_texts(
                path,
                json_only=config.json_only,
                text_field=config.text_field,
                note=self.notes.append,
            )
        return self._lists[path]

    def _split_generators(self, dl_manager) -> dict[str, Iterator[Example]]:
        config = self.builder_config
        paths = [path for path in (config.path, config.validation_path) if path]
        files = [file for path in paths for _, file in self._list(path)]
        text_files.check_separator(files, config.separator, config.path)
        return super()._split_generators(dl_manager)

    def _split_key(self, name: str, text: str) -> str:
        return text


def local_builder(data_config: options.DataConfig, data_dir: str) -> _LocalDocuments:
    """The builder of a `stdlib`, `text` or `c4` source."""
    known = {field.name for field in dataclasses.fields(TextConfig)}
    settings = vars(data_config.source_options).items()
    config = TextConfig(
        name="configured",
        path=data_config.path,
        json_only=data_config.source == "c4",
        **{key: value for key, value in settings if key in known},
    )
    builder = Stdlib if data_config.source == "stdlib" else TextFiles
    return builder(config=config, data_dir=data_dir)
