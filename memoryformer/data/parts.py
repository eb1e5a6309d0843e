"""A large corpus in parts, which are tokenised apart from one another.

Files are dealt in their order: small ones together, and a large one to several parts, each of
which reads all of it and keeps every so manyth document. What the parts are depends on
the files and `part_bytes` alone, not on who prepares them. Start at `Corpus` and `plan`.
"""

import dataclasses
from collections.abc import Callable, Iterator

from memoryformer.data import (
    blocks,
    jsonlines,
    listing,
    local_files,
    long_texts,
    names,
    options,
    text_files,
)

MOST = 256  # parts, or there would be many small files
MOST_READERS = 16  # of one file: reading is cheaper than tokenising, but not free


@dataclasses.dataclass(frozen=True)
class Unit:
    """A file, or a share of its documents; size in bytes, as it lies."""

    key: str
    path: blocks.File
    share: jsonlines.Share
    size: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Some units; split is 'train', 'validation' or '' where a document's hash decides."""

    number: int
    split: str
    units: tuple[Unit, ...]

    @property
    def size(self) -> int:
        """Bytes of the input."""
        return sum(unit.size for unit in self.units)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The files of a `text` or `c4` source, and how they become documents."""

    files: listing.Files
    held_out: listing.Files
    reading: local_files.Reading
    validation_every: int

    @classmethod
    def of(
        cls,
        data_config: options.DataConfig,
        note: Callable[[str], None] = lambda text: None,
    ) -> "Corpus":
        """Raises `DataError` or `ConfigError` for files that cannot be read."""
        settings = data_config.source_options
        separator = getattr(settings, "separator", "")  # c4 has none

        def files(path: str, field: str) -> listing.Files:
            return text_files.list_texts(
                path,
                json_only=data_config.source == "c4",
                text_field=settings.text_field,
                field=field,
                note=note,
            )

        train = files(data_config.path, "data.path")
        held_out = []
        if settings.validation_path:
            field = "data.source_options.validation_path"
            held_out = files(settings.validation_path, field)
        every = settings.validation_every
        text_files.check_separator(
            (path for _, path in train + held_out), separator, data_config.path
        )
        reading = local_files.Reading(
            settings.text_field,
            names.unescaped(separator),
            local_files.lone_text_piece(train, every),
            long=long_texts.LONG,
        )
        return cls(train, held_out, reading, every)

    def parts(self, part_bytes: int) -> list[Part]:
        """Those of the held-out files first."""
        train = plan(self.files, part_bytes)
        held_out = plan(self.held_out, part_bytes) if self.held_out else []
        split = "train" if self.held_out else ""
        both = [("validation", units) for units in held_out]
        both += [(split, units) for units in train]
        return [Part(number, *content) for number, content in enumerate(both)]

    def texts(self, unit: Unit) -> Iterator[long_texts.Text]:
        """The documents of a unit."""
        how = dataclasses.replace(self.reading, share=unit.share)
        documents = local_files.read_documents([(unit.key, unit.path)], how)
        return (text for _, text, _ in documents)


def plan(files: listing.Files, part_bytes: int) -> list[tuple[Unit, ...]]:
    """Deal files to parts of about `part_bytes`, and to `MOST` parts at most or so."""
    sizes = [path.stat().st_size for _, path in files]
    target = max(part_bytes, -(-sum(sizes) // MOST), 1)
    parts: list[tuple[Unit, ...]] = []
    units: list[Unit] = []
    held = 0
    for (key, path), size in zip(files, sizes, strict=True):
        count = min(-(-size // target) or 1, MOST_READERS)
        for number in range(count):
            share = jsonlines.Share(number, count)
            units.append(Unit(key, path, share, size // count))
            held += units[-1].size
            if held >= target:
                parts.append(tuple(units))
                units, held = [], 0
    return [*parts, tuple(units)] if units else parts
