"""The texts of a corpus by split, read through its TFDS builder.

Start at `read`. Importing this module imports TFDS, never TensorFlow.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import tensorflow_datasets as tfds

from memoryformer import errors
from memoryformer.data import catalogue, corpora, options
from memoryformer.data import files as files_lib
from memoryformer.data import progress as progress_lib

_AT_ONCE = 256  # records per request: several times faster than one by one


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of one split, in the builder's order, as often as asked.

    `len` and `num_bytes` are of the records behind it, of which `keep` may pass only
    some; num_bytes is their size on disk.
    """

    source: Sequence
    field: str
    num_bytes: int
    limit: int = 0
    keep: Callable[[str], bool] | None = None

    def __len__(self) -> int:
        return min(self.limit or len(self.source), len(self.source))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self._read(range(start, min(start + _AT_ONCE, len(self))))

    def sample(self, stride: int, accept: Callable[[str], bool]) -> Iterator[str]:
        """The first accepted text of every `stride` records; reads little else."""
        for start in range(0, len(self), stride):
            for index in range(start, min(start + stride, len(self))):
                text = next(self._read([index]), None)
                if text is not None and accept(text):
                    yield text
                    break

    def _read(self, indices: Sequence[int]) -> Iterator[str]:
        records = self.source.__getitems__(list(indices))
        for index, record in zip(indices, records, strict=True):
            text = self._text(record[self.field], index)
            if self.keep is None or self.keep(text):
                yield text

    def _text(self, value: bytes | str, index: int) -> str:
        try:
            return value if isinstance(value, str) else bytes(value).decode("utf-8")
        except (UnicodeDecodeError, TypeError, ValueError) as error:
            raise errors.DataError(
                f"data.text_field={self.field!r}: record {index} is not UTF-8 text."
            ) from error


def read(
    data_config: options.DataConfig,
    records_dir: pathlib.Path,
    line: progress_lib.Progress,
) -> dict[str, Texts]:
    """Texts of 'train' and 'validation'; local corpora go through `records_dir`."""
    tfds.disable_progress_bar()
    if data_config.source == "tfds":
        return _catalogue_texts(data_config)
    with catalogue.quiet():
        builder = corpora.local_builder(data_config, str(records_dir))
        total = builder.input_bytes()
        if builder.skipped:
            line.note(builder.skipped_line())
        line.start("reading", total, "B")
        builder.on_bytes = line.update
        builder.download_and_prepare()
    line.finish(total)
    return {
        split: Texts(
            builder.as_data_source(split=split), "text", _num_bytes(builder, split)
        )
        for split in ("train", "validation")
    }


def describe(data_config: options.DataConfig) -> dict[str, str]:
    """What the manifest says about the origin of the documents."""
    licences = {"stdlib": "PSF-2.0 (read locally, not shipped)"}
    return {
        "kind": data_config.source,
        "name": data_config.name,
        "path": data_config.path,
        "licence": licences.get(data_config.source, "the corpus's own"),
    }


def _catalogue_texts(data_config: options.DataConfig) -> dict[str, Texts]:
    builder = catalogue.builder(data_config)
    sources = catalogue.sources(builder, data_config)
    field, limit = data_config.text_field, data_config.max_documents
    if "validation" in sources:
        return {
            name: Texts(source, field, _num_bytes(builder, name), limit)
            for name, source in sources.items()
        }

    def held_out(text: str) -> bool:
        return files_lib.in_validation(text, data_config.validation_every)

    train, size = sources["train"], _num_bytes(builder, "train")
    return {
        "train": Texts(train, field, size, limit, lambda text: not held_out(text)),
        "validation": Texts(train, field, size, limit, held_out),
    }


def _num_bytes(builder: tfds.core.DatasetBuilder, split: str) -> int:
    known = builder.info.splits
    return known[split].num_bytes or 0 if split in known else 0
