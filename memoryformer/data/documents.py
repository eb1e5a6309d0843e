"""The texts of a corpus by split, read through its TFDS builder.

Start at `read`. Importing this module imports TFDS, never TensorFlow.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import tensorflow_datasets as tfds

from memoryformer import errors
from memoryformer.data import corpora, local_files, options, tfds_catalogue
from memoryformer.data import progress as progress_lib

# Small records are read together, several times faster than one by one; large ones alone,
# for each of the reader's threads would keep the memory of the largest that it has read.
_AT_ONCE, _SMALL = 256, 1 << 16
_SLICE = 4096  # bytes of text that stand in for what lies around them
_FAIR = (0.75, 1.1)  # size of a sample of whole texts over the size it should have


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of one split, in the builder's order, as often as asked.

    `len` and `num_bytes` are of the records behind it, of which `keep` may pass only
    some; num_bytes is their size on disk, text_bytes that of their texts if known.
    """

    source: tfds_catalogue.Source
    field: str
    num_bytes: int
    text_bytes: int = 0
    limit: int = 0
    keep: Callable[[str], bool] | None = None

    def __len__(self) -> int:
        return min(self.limit or len(self.source), len(self.source))

    def __iter__(self) -> Iterator[str]:
        mean = self.num_bytes // max(len(self.source), 1) + 1
        count = _AT_ONCE if mean <= _SMALL else 1
        for start in range(0, len(self), count):
            yield from self._read(range(start, min(start + count, len(self))))

    def sample(
        self,
        budget: int,
        accept: Callable[[str], bool],
        on_bytes: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """About `budget` bytes of accepted texts, spread by bytes over all of them.

        Whole texts, one of every few records, where these are a fair sample, as they are
        of many texts of much the same size; else slices of `_SLICE` bytes, which reads
        every text and tells `on_bytes` how far it is.
        """
        whole = self._every_few(budget, accept)
        return self._slices(budget, accept, on_bytes) if whole is None else whole

    def _every_few(
        self, budget: int, accept: Callable[[str], bool]
    ) -> list[str] | None:
        """The first accepted text of every k records; None where they are not fair.

        They are not if one is over a quarter of the sample, or if together they are much
        more or less than one k-th of the corpus: some large text is in or out by chance.
        """
        stride = max(1, -(-self.num_bytes // budget))
        texts, size = [], 0
        for start in range(0, len(self), stride):
            group = range(start, min(start + stride, len(self)))
            read = (text for index in group for text in self._read([index]))
            text = next(filter(accept, read), "")
            num_bytes = len(text.encode("utf-8"))
            size += num_bytes
            texts.append(text)
            if size > _FAIR[1] * budget or (stride > 1 and num_bytes > budget / 4):
                return None
        fair = size * stride >= _FAIR[0] * (self.text_bytes or self.num_bytes)
        return _cut_to(texts, budget) if fair or stride == 1 else None

    def _slices(
        self,
        budget: int,
        accept: Callable[[str], bool],
        on_bytes: Callable[[int], None],
    ) -> list[str]:
        """Every k-th slice of the accepted texts, joined; k doubles as they add up."""
        size = max(1, min(_SLICE, budget // 64))
        slices: dict[int, list[bytes]] = {}
        stride, begin = 1, 0
        for text in filter(accept, self):
            data = text.encode("utf-8")
            end = begin + len(data)
            first = -(-(begin // size) // stride) * stride
            for number in range(first, -(-end // size), stride):
                here = number * size - begin
                piece = data[max(here, 0) : here + size]
                slices.setdefault(number, []).append(piece)
            begin = end
            on_bytes(end)
            while len(slices) * size > 2 * budget:
                stride *= 2
                slices = {n: parts for n, parts in slices.items() if n % stride == 0}
        kept = list(slices.values())
        count = min(len(kept), budget // size)
        chosen = (kept[i * len(kept) // count] for i in range(count))
        return [part.decode("utf-8", "ignore") for parts in chosen for part in parts]

    def _read(self, indices: Sequence[int]) -> Iterator[str]:
        records = self.source.__getitems__(list(indices))
        for index, record in zip(indices, records, strict=True):
            text = self._text(record[self.field], index)
            if self.keep is None or self.keep(text):
                yield text

    def _text(self, value: bytes | str, index: int) -> str:
        try:
            # Not `bytes(value)`, for which a number is so many zeros.
            return value if isinstance(value, str) else value.decode("utf-8")
        except (UnicodeDecodeError, AttributeError) as error:
            raise errors.DataError(
                f"data.source_options.text_field={self.field!r}: record {index} is not UTF-8 text."
            ) from error


def read(
    data_config: options.DataConfig,
    records_dir: pathlib.Path,
    progress: progress_lib.Progress,
) -> dict[str, Texts]:
    """Texts of 'train' and 'validation'; local corpora go through `records_dir`."""
    tfds.disable_progress_bar()
    if data_config.source == "tfds":
        return _catalogue_texts(data_config)
    with tfds_catalogue.quiet():
        builder = corpora.local_builder(data_config, str(records_dir))
        total = builder.input_bytes()
        for note in builder.notes:
            progress.note(note)
        progress.start("reading", total, "B")
        builder.on_bytes = progress.update
        builder.download_and_prepare()
    progress.finish(total)
    if marker := builder.marker_line():
        progress.note(marker)
    return {
        split: Texts(
            builder.as_data_source(split=split),
            "text",
            _num_bytes(builder, split),
            builder.text_bytes[split],
        )
        for split in ("train", "validation")
    }


def _catalogue_texts(data_config: options.DataConfig) -> dict[str, Texts]:
    builder = tfds_catalogue.builder(data_config)
    sources = tfds_catalogue.sources(builder, data_config)
    settings = data_config.source_options
    field, limit = settings.text_field, settings.max_documents
    if "validation" in sources:
        return {
            name: Texts(source, field, _num_bytes(builder, name), limit=limit)
            for name, source in sources.items()
        }

    def held_out(text: str) -> bool:
        return local_files.in_validation(text, settings.validation_every)

    train = Texts(sources["train"], field, _num_bytes(builder, "train"), limit=limit)
    return {
        "train": dataclasses.replace(train, keep=lambda text: not held_out(text)),
        "validation": dataclasses.replace(train, keep=held_out),
    }


def _num_bytes(builder: tfds.core.DatasetBuilder, split: str) -> int:
    known = builder.info.splits
    return known[split].num_bytes or 0 if split in known else 0


def _cut_to(texts: list[str], num_bytes: int) -> list[str]:
    """The texts up to this many bytes in UTF-8."""
    kept = []
    for text in texts:
        data = text.encode("utf-8")[:num_bytes]
        num_bytes -= len(data)
        kept.append(data.decode("utf-8", errors="ignore"))
        if not num_bytes:
            break
    return kept
