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
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator

# Importing this module registers the builders under their TFDS names.
import tensorflow_datasets as tfds

from memoryformer import errors
from memoryformer.data import files as files_lib
from memoryformer.data import options

Example = tuple[str, dict[str, str]]


@dataclasses.dataclass
class TextConfig(tfds.core.BuilderConfig):
    """Which documents a builder reads; the fields of `options.DataConfig`."""

    path: str = ""
    json_only: bool = False
    text_field: str = "text"
    validation_path: str = ""
    validation_every: int = 20
    max_documents: int = 0


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Ask no bucket: these data sets exist only here."""


class _LocalDocuments(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Splits documents by the hash of a key; subclasses say which files and which key."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (TextConfig(name="default", description="As configured."),)

    def __init__(self, *, file_format: str = "array_record", **kwargs):
        # TFDS's own default, tfrecord, cannot be written without TensorFlow.
        super().__init__(file_format=file_format, **kwargs)
        self.on_bytes: Callable[[int], None] = lambda done: None
        self.skipped: dict[pathlib.Path, str] = {}  # why
        self._lists: dict[str, files_lib.Files] = {}
        self._bytes_read = 0

    def input_bytes(self) -> int:
        """File bytes that `download_and_prepare` reads: every split reads its files."""
        files = self._train_files()
        held_out = self.builder_config.validation_path
        files = files + (self._list(held_out) if held_out else files)
        return sum(path.stat().st_size for _, path in files)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"name": tfds.features.Text(), "text": tfds.features.Text()}
        )
        # Records keep the order of the files: it is the same everywhere, and windows
        # are shuffled when they are drawn.
        return _LocalInfo(
            builder=self,
            description=type(self).__doc__,
            features=features,
            disable_shuffling=True,
        )

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

    def _generate_examples(self, **kwargs) -> Iterator[Example]:
        return self._examples(**kwargs)

    def _examples(
        self, files: files_lib.Files, split: str = "", fallback: str = ""
    ) -> Iterator[Example]:
        every = self.builder_config.validation_every
        sizes = (path.stat().st_size for _, path in files)
        done = [0, *itertools.accumulate(sizes)]
        before = self._bytes_read
        for name, text, index in self._documents(files):
            self._bytes_read = before + done[index + 1]
            self.on_bytes(self._bytes_read)
            if split:
                key = self._split_key(name, text)
                held_out = files_lib.in_validation(key, every) or key == fallback
                if held_out != (split == "validation"):
                    continue
            yield name, {"name": name, "text": text}

    def _documents(self, files: files_lib.Files) -> Iterator[tuple[str, str, int]]:
        limit = self.builder_config.max_documents
        config = self.builder_config
        piece = files_lib.lone_text_piece(files, config.validation_every)
        documents = files_lib.read_documents(files, config.text_field, piece)
        for count, document in enumerate(documents):
            if limit and count == limit:
                return
            yield document

    def _fallback_key(self) -> str:
        """The key to hold out when the rule holds out none, else ''."""
        every = self.builder_config.validation_every
        remainders: dict[str, int] = {}
        seen = collections.Counter()
        for name, text, _ in self._documents(self._train_files()):
            key = self._split_key(name, text)
            seen[files_lib.in_validation(key, every)] += 1
            if seen[True] and seen[False]:
                return ""
            if not seen[True] and len(remainders) < 1000:
                digest = int(hashlib.sha256(key.encode()).hexdigest(), 16)
                remainders[key] = digest % every
        if len(remainders) < 2:
            raise errors.DataError(
                f"{self.builder_config.path or self.name}: {sum(seen.values())} "
                "documents cannot be split into train and validation; give more "
                "documents or set data.validation_path."
            )
        return min(remainders, key=remainders.get)

    def _train_files(self) -> files_lib.Files:
        return self._list(self.builder_config.path)

    def _list(self, path: str) -> files_lib.Files:
        raise NotImplementedError

    def _split_key(self, name: str, text: str) -> str:
        raise NotImplementedError


class Stdlib(_LocalDocuments):
    """The Python standard library's own `*.py` files, tests left out.

    Read where they lie and shipped nowhere; licence PSF-2.0. About 12 MB of code.
    """

    name = "memoryformer_stdlib"

    def _list(self, path: str) -> files_lib.Files:
        return [
            (key, file)
            for key, file in files_lib.stdlib_files()
            if file.stat().st_size  # an empty __init__.py is no document
        ]

    def _split_key(self, name: str, text: str) -> str:
        return name


class TextFiles(_LocalDocuments):
    """Local text or JSON-lines files: one document per text file or JSON line."""

    name = "memoryformer_text"

    def _list(self, path: str) -> files_lib.Files:
        """What `path` names; of several plain files, those that hold text."""
        if path not in self._lists:
            self._lists[path] = self._with_text(path)
        return self._lists[path]

    def _with_text(self, path: str) -> files_lib.Files:
        json_only = self.builder_config.json_only
        files = files_lib.list_files(path, json_only=json_only)
        if len(files) == 1 or json_only:  # a hollow shard is a broken download
            return files
        kinds = {file: files_lib.without_text(file) for _, file in files}
        self.skipped |= {file: kind for file, kind in kinds.items() if kind}
        found = [(key, file) for key, file in files if not kinds[file]]
        if not found:
            raise errors.DataError(
                f"{path}: holds no text: {self.skipped_line()}; give other files."
            )
        return found

    def skipped_line(self) -> str:
        """'3 files skipped: 2 empty, 1 binary (logo.png, ..)'."""
        counts = collections.Counter(sorted(self.skipped.values(), reverse=True))
        listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        first = min(self.skipped).name
        more = ", .." if len(self.skipped) > 1 else ""
        plural = "s" if len(self.skipped) > 1 else ""
        return f"{len(self.skipped)} file{plural} skipped: {listed} ({first}{more})"

    def _split_key(self, name: str, text: str) -> str:
        return text


def local_builder(
    data_config: options.DataConfig, data_dir: str
) -> tfds.core.GeneratorBasedBuilder:
    """The builder of a `stdlib`, `text` or `c4` source."""
    shared = [field.name for field in dataclasses.fields(options.DataConfig)]
    own = {field.name for field in dataclasses.fields(TextConfig)} - {"name"}
    values = {key: getattr(data_config, key) for key in shared if key in own}
    cls = Stdlib if data_config.source == "stdlib" else TextFiles
    make = functools.partial(TextConfig, json_only=data_config.source == "c4")
    return cls(config=make(name="configured", **values), data_dir=data_dir)
