"""All parts of a corpus, by any number of processes, in any order, killed at any moment.

    CACHE/.parts-NAME/    tokenizer.json, held_out.npy     made once, by whoever is first
                          digests-*.npy                    only where equal texts go
                          train-*.bin, parts/*.json ..     see `part_files`
    CACHE/NAME/           the same folder, renamed with its manifest when all parts are there

Who works on a part holds its lock, which ends with the process; a part is done when its
parts/NUMBER.json is there, and is never begun again. Everything written depends on the corpus
alone, so two that write the same, where there are no locks, do no harm. Start at `Job`.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator

import numpy as np

from memoryformer import errors
from memoryformer.data import (
    digests,
    long_texts,
    manifest,
    options,
    part_files,
    parts,
    text_files,
    token_files,
    tokenizer,
)
from memoryformer.data import progress as progress_lib
from memoryformer.files import atomic, lock

_TEMPORARY = ("digests-*.npy", "held_out.npy", ".lock-*", atomic.TEMPORARY)
AGAIN = "finished parts are kept; run the same command to go on"


class Job:
    """The preparation of one corpus into one directory."""

    def __init__(
        self,
        directory: pathlib.Path,
        data_config: options.DataConfig,
        progress: progress_lib.Progress,
    ):
        self.directory = directory
        self.work = directory.with_name(f".parts-{directory.name}")
        self.config = data_config
        self.progress = progress
        self._lock = directory.with_name(f".lock-{directory.name}")
        self._holders: set[str] = set()  # of locks, that were named
        self.corpus = parts.Corpus.of(data_config, progress.note)
        self.parts = self.corpus.parts(options.part_bytes(data_config))

    @property
    def finished(self) -> bool:
        """Whether the directory is there, with all parts."""
        return (self.directory / manifest.FILE).is_file()

    def missing(self) -> list[int]:
        """The numbers of the parts that are not done."""
        if self.finished:
            return []
        return [
            part.number
            for part in self.parts
            if not part_files.facts_path(self.work, part.number).is_file()
        ]

    def missing_bytes(self) -> int:
        """Bytes of input of the parts that are not done."""
        return sum(self.parts[number].size for number in self.missing())

    def run(self, mine: Callable[[int], bool], *, wait: bool) -> None:
        """Do the parts `mine` that nobody else does; with `wait`, until all of them are done."""
        if not self.missing():
            return
        with self.while_it_lasts():
            rules = self.rules()
            if self.config.source_options.deduplicate:
                for waits in (False, True):  # for what others do, at the end
                    for part in self.parts:
                        self._digest(part, waits)
            for waits in (False, True) if wait else (False,):
                for part in self.parts:
                    if mine(part.number):
                        self._part(part, rules, waits)

    def finish(self) -> None:
        """Write the manifest of all parts and rename the folder; once, whoever is first."""
        with self.while_it_lasts(), self.locked(self._lock, True):
            if self.finished:
                return
            facts = part_files.read(self.work, len(self.parts))
            deduplicated = self.config.source_options.deduplicate
            splits = {
                name: part_files.joined(name, facts, deduplicated)
                for name in manifest.SPLITS
            }
            self._check(splits)
            used = manifest.facts_of(self._tokenizer())
            whole = manifest.Manifest(
                manifest.describe(self.config),
                dataclasses.replace(used, name=self.config.tokenizer),
                token_files.dtype_for(used.vocab_size),
                splits,
            )
            self._notes(whole, sum(part["marked"] for part in facts))
            for pattern in _TEMPORARY:
                for path in self.work.rglob(pattern):
                    path.unlink(missing_ok=True)
            atomic.write_json(self.work / manifest.FILE, whole.to_json(), indent=2)
            for folder in (self.work / "parts", self.work):
                atomic.flush(folder)
            self.work.rename(self.directory)
            atomic.flush(self.directory.parent)

    def locked(
        self, path: pathlib.Path, wait: bool
    ) -> contextlib.AbstractContextManager[bool]:
        """Hold a lock; raises `lock.HeldError` at once unless `wait`."""
        patience = float("inf") if wait else 0.0
        return lock.hold(path, patience, self._waiting)

    def _waiting(self, holder: str) -> None:
        if holder not in self._holders:
            self._holders.add(holder)
            self.progress.note(f"waiting for another process ({holder})")
        self.progress.check()

    def _part(self, part: parts.Part, rules: part_files.Rules, wait: bool) -> None:
        done = part_files.facts_path(self.work, part.number)
        with self._claimed(done, f"part-{part.number:05d}", wait) as is_open:
            if is_open:
                stage = f"part {part.number + 1} of {len(self.parts)}"
                self.progress.start(stage, part.size, "B")
                folder, known = part_files.LocalFolder(self.work), None
                if self.config.source_options.deduplicate:
                    known = digests.Known(self.work, part.number)
                part_files.write(folder, part, rules, known, self.progress)
                self.progress.finish(part.size)

    def _digest(self, part: parts.Part, wait: bool) -> None:
        done, _ = digests.paths(self.work, part.number)
        with self._claimed(done, done.stem, wait) as is_open:
            if is_open:
                stage = f"hashing part {part.number + 1} of {len(self.parts)}"
                self.progress.start(stage, part.size, "B")
                units = map(self.corpus.texts, part.units)
                texts = itertools.chain.from_iterable(units)
                digests.write(self.work, part, self.progress.watched(texts))

    @contextlib.contextmanager
    def _claimed(self, done: pathlib.Path, name: str, wait: bool) -> Iterator[bool]:
        """Yield whether `done` is still to be made, holding its lock."""
        if done.is_file():
            yield False
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.locked(self.work / f".lock-{name}", wait))
                is_open = not done.is_file() and not self.finished
            except lock.HeldError:
                is_open = False
            yield is_open

    @contextlib.contextmanager
    def while_it_lasts(self) -> Iterator[None]:
        """Another process may rename the folder, with the last part: then all is done."""
        try:
            yield
        except (FileNotFoundError, errors.StorageError):
            if not self.finished:
                raise

    def rules(self) -> part_files.Rules:
        """What all parts have in common; made by the first process, read by the others."""
        with self.locked(self._lock, True):
            if self.finished:
                raise FileNotFoundError(self.work)
            held_out = self._held_out()
            self._make_tokenizer(held_out)
        return part_files.Rules(
            self.corpus,
            len(self.parts),
            self._tokenizer(),
            held_out,
        )

    def _held_out(self) -> np.ndarray:
        """Sorted digests of the held-out files' texts."""
        path = self.work / "held_out.npy"
        if not path.is_file():
            self.progress.start("hashing validation", 1, "B")
            units = (u for p in self.parts if p.split == "validation" for u in p.units)
            texts = itertools.chain.from_iterable(map(self.corpus.texts, units))
            found = {token_files.digest(t) for t in self.progress.watched(texts) if t}
            with atomic.replacing(path) as temporary, temporary.open("wb") as stream:
                np.save(stream, np.array(sorted(found), digests.DTYPE))
        return np.load(path)

    def _tokenizer(self) -> tokenizer.Tokenizer:
        return tokenizer.load(str(self.work / "tokenizer.json"), self.config.end_token)

    def _make_tokenizer(self, held_out: np.ndarray) -> None:
        path = self.work / "tokenizer.json"
        if path.is_file():
            return
        size = tokenizer.bpe_size(self.config.tokenizer)
        if not size:
            tokenizer.load(self.config.tokenizer, self.config.end_token).save(path)
            return
        sample = self._sample(held_out)
        self.progress.during(
            f"training {self.config.tokenizer}",
            lambda: tokenizer.train_bpe(sample, size),
        ).save(path)

    def _sample(self, held_out: np.ndarray) -> list[str]:
        """The first texts of every file, in proportion to its size; no held-out ones."""
        sample = []
        units = [
            u for part in self.parts if part.split != "validation" for u in part.units
        ]
        scale = tokenizer.BPE_TRAINING_BYTES / max(sum(unit.size for unit in units), 1)
        every = self.corpus.validation_every
        for unit in units:
            budget = int(unit.size * scale) + 1
            for text in self.progress.watched(self.corpus.texts(unit)):
                if self.corpus.held_out:
                    digest = np.array([token_files.digest(text)], digests.DTYPE)
                    is_held_out = bool(digests.contains(held_out, digest)[0])
                else:
                    is_held_out = not int.from_bytes(long_texts.sha256(text)) % every
                if is_held_out:
                    continue
                data = long_texts.head(text, budget)
                sample.append(data.decode("utf-8", errors="ignore"))
                budget -= len(data)
                if budget <= 0:
                    break
        return sample

    def _check(self, splits: dict[str, manifest.PartedFacts]) -> None:
        for name, facts in splits.items():
            if not facts.documents:
                raise errors.DataError(
                    f"{name}: no document holds any text; give more text, or set "
                    "data.source_options.validation_path."
                )

    def _notes(self, whole: manifest.Manifest, marked: int) -> None:
        if note := manifest.byte_note(whole):
            print(f"note: {note}", file=sys.stderr, flush=True)
        if marked and not self.corpus.reading.separator:
            self.progress.note(text_files.marker_line(marked))
