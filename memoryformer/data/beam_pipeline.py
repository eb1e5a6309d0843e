"""The pipeline by which Apache Beam prepares parts, and their files on Beam's file systems.

    places   Create                     (url of a file, a share of it and the part that wants it)
    files    MatchAll | ReadMatches     (url, ReadableFile)
    parts    places with files, grouped (number of the part, its units in any order)
    facts    parts | ParDo(Write)       the files of a part, and what they hold

Where equal texts go, the places of all texts are grouped by digest, and all but the first of a
group are left out. All is read and written through `FileSystems`, so a worker needs no folder
of the machine that began. Importing this imports Beam. Start at `build`.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import secrets
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import IO, Any, BinaryIO

import apache_beam as beam
import numpy as np
from apache_beam.io import fileio
from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics
from apache_beam.utils import shared

from memoryformer import errors
from memoryformer.data import part_files, parts, token_files, tokenizer
from memoryformer.data import progress as progress_lib

NAMESPACE = "memoryformer"  # of the counters: documents, tokens, parts
# `blocks` decompresses: it knows more kinds, and a truncated file from a whole one.
_AS_IT_IS = CompressionTypes.UNCOMPRESSED
_MATCHED = pathlib.Path()  # in the place of a path that a worker has to match


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker must know of a job. It travels with the pipeline, so it is small.

    folder: where a worker finds tokenizer.json and held_out.npy, and writes parts.
    corpus: without its lists of files.
    """

    folder: str
    corpus: parts.Corpus
    num_parts: int
    end_token: str
    deduplicate: bool


@dataclasses.dataclass(frozen=True)
class Place:
    """A unit in its part."""

    part: int
    split: str
    order: int
    unit: parts.Unit


class Input:
    """A file that Beam has matched, as a `blocks.File`."""

    def __init__(self, file: fileio.ReadableFile):
        self._file = file
        path = pathlib.PurePosixPath(file.metadata.path)
        self.name, self.suffix, self.suffixes = path.name, path.suffix, path.suffixes

    def stat(self) -> Any:
        """What Beam knows of it."""
        known = self._file.metadata
        changed = int(known.last_updated_in_seconds * 1e9)
        return types.SimpleNamespace(st_size=known.size_in_bytes, st_mtime_ns=changed)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Its bytes as they lie."""
        return self._file.open(compression_type=_AS_IT_IS)

    def __fspath__(self) -> str:
        return self._file.metadata.path


class Folder:
    """A `part_files.Folder` on any file system of Beam.

    Each attempt writes a temporary file of its own and renames it, as `fileio.WriteToFiles`
    does. All attempts write the same bytes, so it does not matter whose stays.
    """

    def __init__(self, url: str):
        self._url = url

    def path(self, name: str) -> str:
        """The url of a file."""
        return FileSystems.join(self._url, *name.split("/"))

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[BinaryIO]:
        """See `part_files.Folder`."""
        folder, _, base = name.rpartition("/")
        temporary = f"{folder}/.{base}.{secrets.token_hex(4)}.tmp".lstrip("/")
        try:
            with FileSystems.create(
                self.path(temporary), compression_type=_AS_IT_IS
            ) as stream:
                yield stream
            self._rename(temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):  # it may not have been begun
                FileSystems.delete([self.path(temporary)])
            raise

    def remove(self, name: str) -> None:
        """See `part_files.Folder`."""
        with self._unless(lambda: not self.exists(name)):
            FileSystems.delete([self.path(name)])

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return FileSystems.exists(self.path(name))

    def read(self, name: str) -> bytes:
        """A whole file."""
        with FileSystems.open(self.path(name), compression_type=_AS_IT_IS) as stream:
            return stream.read()

    def _rename(self, temporary: str, name: str) -> None:
        # Some stores, such as HDFS, do not write over the file of another attempt.
        with self._unless(lambda: self.exists(name)):
            FileSystems.rename([self.path(temporary)], [self.path(name)])
            return
        FileSystems.delete([self.path(temporary)])

    @contextlib.contextmanager
    def _unless(self, is_done: Callable[[], bool]) -> Iterator[None]:
        """Another attempt may have done it already."""
        try:
            yield
        except BeamIOError:
            if not is_done():
                raise


class Repeats:
    """`digests.Repeats` by the numbers of the texts that repeat others."""

    def __init__(self, numbers: Iterable[int]):
        self._numbers = np.fromiter(numbers, np.int64)

    def is_new(self, digests: Sequence[bytes], start: int) -> np.ndarray:
        """See `digests.Repeats`."""
        return ~np.isin(start + np.arange(len(digests)), self._numbers)


def places(
    every_part: Sequence[parts.Part],
    wanted: Collection[int],
    url: Callable[[os.PathLike], str],
) -> list[tuple[str, Place]]:
    """What `build` reads for the parts `wanted`; `url` is what workers call a file."""
    found = []
    for part in (part for part in every_part if part.number in wanted):
        for order, unit in enumerate(part.units):
            there = dataclasses.replace(unit, path=_MATCHED)
            place = Place(part.number, part.split, order, there)
            found.append((url(unit.path), place))
    return found


def build(
    pipeline: beam.Pipeline,
    task: Task,
    places: Sequence[tuple[str, Place]],
    missing: Collection[int],
) -> None:
    """Add to `pipeline` what does the `missing` parts.

    places: of all parts where equal texts go: one that is done may hold the first of them.
    """
    wanted = frozenset(missing)
    # Beam cannot quote a sign of a pattern. Other files that then fit have no place.
    patterns = sorted({re.sub(r"[*?\[]", "?", name) for name, _ in places})
    files = (
        pipeline
        | "names" >> beam.Create(patterns)
        | "match" >> fileio.MatchAll(fileio.EmptyMatchTreatment.DISALLOW)
        | "files" >> fileio.ReadMatches(compression=_AS_IT_IS)
        | "by name" >> beam.Map(lambda file: (file.metadata.path, file))
    )
    shares = pipeline | "shares" >> beam.Create(places)
    units = (
        {"places": shares, "files": files}
        | "of files" >> beam.CoGroupByKey()
        | "by part" >> beam.FlatMapTuple(by_part)
    )
    inputs = {"places": units | beam.Filter(lambda item: item[0] in wanted)}
    if task.deduplicate:
        repeats = (
            units
            | "of parts" >> beam.GroupByKey()
            | "digests"
            >> beam.FlatMapTuple(functools.partial(texts_by_digest, task.corpus))
            | "equal texts" >> beam.GroupByKey()
            | "repeats" >> beam.FlatMapTuple(all_but_first)
        )
        inputs["repeats"] = repeats | beam.Filter(lambda item: item[0] in wanted)
    _ = inputs | "parts" >> beam.CoGroupByKey() | "tokenise" >> beam.ParDo(Write(task))


def by_part(url: str, found: dict[str, Iterable[Any]]) -> Iterator[tuple[int, Place]]:
    """Yield (number of a part, its unit in a file that was matched)."""
    files = list(found["files"])
    for place in found["places"]:
        unit = place.unit
        sizes = {file.metadata.size_in_bytes // unit.share.count for file in files}
        if sizes != {unit.size}:
            raise errors.DataError(
                f"{url}: is not the file that the parts were planned with: "
                f"{min(sizes, default=0)} bytes for a part, not {unit.size}."
            )
        unit = dataclasses.replace(unit, path=Input(files[0]))
        yield place.part, dataclasses.replace(place, unit=unit)


def texts_by_digest(
    corpus: parts.Corpus, number: int, places: Iterable[Place]
) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Yield (digest, (part, number of the text in it)) of every text of a part."""
    part = _part(number, places)
    texts = (text for unit in part.units for text in corpus.texts(unit))
    for order, text in enumerate(texts):
        # Without zeros at the end, as `digests.DTYPE` compares.
        yield token_files.digest(text).rstrip(b"\0"), (number, order)


def all_but_first(
    digest: bytes, found: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Yield (part, number of the text) for texts that repeat another."""
    first = min(found)
    return (place for place in found if place != first)


class Write(beam.DoFn):
    """Write a part, unless an earlier attempt has, and count what it holds."""

    def __init__(self, task: Task):
        self._task = task
        self._folder = Folder(task.folder)
        self._shared = shared.Shared()  # by the threads of a worker

    def setup(self) -> None:
        """Read the tokenizer and the digests of what is held out."""
        self._rules = self._shared.acquire(self._read_rules)

    def process(self, element: tuple[int, dict[str, Iterable[Any]]]) -> Iterator[int]:
        """Yield the number of the part."""
        number, found = element
        name = part_files.facts_name(number)
        if self._folder.exists(name):
            facts = json.loads(self._folder.read(name))
        else:
            known = Repeats(found["repeats"]) if self._task.deduplicate else None
            part = _part(number, found["places"])
            quiet = progress_lib.Progress("preparing", enabled=False)
            facts = part_files.write(self._folder, part, self._rules, known, quiet)
        Metrics.counter(NAMESPACE, "parts").inc()
        for split in part_files.splits(facts):
            Metrics.counter(NAMESPACE, "documents").inc(split["documents"])
            Metrics.counter(NAMESPACE, "tokens").inc(split["tokens"])
        yield number

    def _read_rules(self) -> part_files.Rules:
        task, name = self._task, "tokenizer.json"
        text = self._folder.read(name).decode("utf-8")
        return part_files.Rules(
            task.corpus,
            task.num_parts,
            tokenizer.Tokenizer(text, self._folder.path(name), task.end_token),
            np.load(io.BytesIO(self._folder.read("held_out.npy"))),
        )


def _part(number: int, places: Iterable[Place]) -> parts.Part:
    ordered = sorted(places, key=lambda place: place.order)
    return parts.Part(number, ordered[0].split, tuple(place.unit for place in ordered))
