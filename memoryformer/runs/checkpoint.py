"""Checkpoints: Orbax writes them in the background, a manifest makes them trustworthy.

    workdir/checkpoints/<step>/state/...   Orbax (v0), any number of devices and processes
    workdir/checkpoints/<step>/MANIFEST    SHA-256 of every file above, shape and dtype of
                                           every leaf, config, data fingerprint, versions
    workdir/checkpoints/LEDGER             the steps that had a manifest and were not deleted

A manifest is written once a leaf of every kind was read back through Orbax. A step counts
once its manifest is there, and is restored only if every file still agrees with it; one that
the ledger lists and that has none is damaged. Orbax alone restores most flipped bits without
a word, reports a save that failed on a full disk as done, and forgets a save that was not
waited for.

Start at `Checkpointer` (training) or `load` (everything else).
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from memoryformer.cluster import processes
from memoryformer.errors import StorageError, first_line
from memoryformer.files import paths
from memoryformer.notation import Params
from memoryformer.runs import (
    compatibility,
    manifest,
    orbax_files,
    retention,
    state_spec,
)
from memoryformer.runs import folder as folder_lib
from memoryformer.runs import steps as run_steps
from memoryformer.runs.retention import CheckpointConfig


class Checkpointer:
    """Save and restore the training state of one run; a context manager.

    `run_config`, the fingerprints and `tokenizer` are stored with every step, and a step
    written under others is refused unless `allow` names the fields that differ (see
    `compatibility`). `complete` adds to a stored config the fields that are younger than it;
    `absent_params` returns the parameters that a step was written without, by what its
    manifest says. `folder` is told of what is whole, and asked for what is to be read, where
    `workdir` stands for a store. Every process makes a checkpointer and calls the same
    methods at the same steps; process 0 writes manifests and deletes.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: CheckpointConfig,
        *,
        run_config: Mapping[str, Any],
        data_fingerprint: str,
        teacher_fingerprint: str = "",
        tokenizer: Mapping[str, str] | None = None,
        allow: Collection[str] = (),
        complete: Callable[[dict], dict] = dict,
        absent_params: Callable[[dict], Params] = lambda facts: {},
        folder: folder_lib.Folder | None = None,
    ):
        self.directory = paths.workdir(workdir).absolute() / run_steps.FOLDER
        self._folder = folder or folder_lib.Folder(self.directory.parent)
        self._config = config
        self._facts = {
            "config": compatibility.plain(run_config),
            "data_fingerprint": data_fingerprint,
            "teacher_fingerprint": teacher_fingerprint,
            "tokenizer": tokenizer,
            "versions": manifest.versions(),
        }
        self._allow = allow
        self._complete = complete
        self._absent_params = absent_params
        self._chief = processes.is_chief()
        self._damaged: set[int] = set()
        self._current: int | None = None  # the step whose state this run holds on disk
        self._finaliser: threading.Thread | None = None
        self._failure: StorageError | None = None
        self._last_save = time.monotonic()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self._chief:
                retention.remove_debris(self.directory)
            processes.barrier("checkpoints")  # every process must see the same steps
            self._manager = orbax_files.manager(self.directory)
        except OSError as error:
            raise StorageError(
                f"{self.directory}: cannot be written: {first_line(error)}."
            ) from error

    def steps(self) -> list[int]:
        """Return the steps that have a manifest, ascending."""
        return run_steps.finished(self.directory)

    def facts(self, step: int) -> dict[str, Any]:
        """Return what the manifest of `step` says: config, data_fingerprint, leaves, ..."""
        return manifest.facts(self.directory / str(step))

    def amend(self, step: int, **facts: Any) -> None:
        """Change facts of a step that is whole; process 0 writes them."""
        if self._chief:
            manifest.amend(self.directory / str(step), **facts)
            self._folder.publish()

    def should_save(self, step: int) -> bool:
        """Whether it is time, by steps or by minutes; never for the step already saved."""
        return step != self._current and retention.is_due(
            self._config, step, self._last_save
        )

    def preflight(self, state: Any) -> None:
        """Raise `StorageError` if the disk cannot hold what `retention` keeps."""
        if self._chief:
            one = state_spec.total_bytes(state)
            retention.check_space(self.directory, self._config, one)

    def save(
        self, step: int, state: Any, *, wait: bool = False, evaluated: bool = True
    ) -> bool:
        """Start saving `state` as `step`; return False if it is there already.

        `evaluated`: whether the evaluation that was due at this step was done.

        Blocks for the copy to the host, and for the save before if that still runs. What
        an earlier run left under the same step (damaged, or of a future given up by
        restoring an older step) is replaced. Raises `StorageError`.
        """
        self.wait()
        if step == self._current:
            return False
        target = self.directory / str(step)
        facts = self._facts | {
            "step": step,
            "leaves": state_spec.describe(state),
            "evaluated": evaluated,
        }
        try:
            if self._chief and target.exists():
                retention.remove(self.directory, step)
                self._folder.publish()  # the old one goes before a file of the new comes
            self._damaged.discard(step)
            processes.barrier(f"replace {step}")
            orbax_files.start_save(self._manager, step, state)
        except Exception as error:
            self._failure = self._failed(step, error)
            raise self._failure from error
        self._finaliser = threading.Thread(
            target=self._finalise,
            args=(step, facts, orbax_files.samples(state)),
            name=f"checkpoint-{step}",
        )
        self._finaliser.start()
        self._current = step
        self._last_save = time.monotonic()
        if wait:
            self.wait()
        return True

    def check(self) -> None:
        """Raise `StorageError` if a save has failed. Costs nothing: call it every step."""
        if self._finaliser is not None and not self._finaliser.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in progress. Raises `StorageError` if it failed."""
        if self._finaliser is not None:
            self._finaliser.join()
            self._finaliser = None
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait, then read the last step again: success only if it is whole on disk."""
        try:
            self.wait()
        finally:
            # Orbax raises the error of a failed save once more; `wait` has told it.
            with (
                contextlib.suppress(*([Exception] if self._failure else [])),
                orbax_files.no_dumps(),
            ):
                self._manager.close()
        if self._chief and self._current is not None:
            manifest.verify(self.directory / str(self._current))

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, exception: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except StorageError as error:
            if exception is None:
                raise
            if error is not exception:  # never hide what ended the run
                processes.say(f"error: {error}")

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any] | None:
        """Restore the newest whole step: (step, state), or None where nothing was saved.

        Damaged and unfinished steps are skipped with one line each on standard error.
        Raises `StorageError` if there are finished steps and all are damaged.
        """
        damaged = []
        known = run_steps.known(self.directory)
        for step in sorted(known.union(run_steps.numbered(self.directory)))[::-1]:
            if step not in known:
                processes.say(
                    f"checkpoint {step}: skipped, its save was never finished."
                )
                continue
            try:
                return step, self.restore(step, abstract_state)
            except manifest.DamagedError as error:
                damaged.append(step)
                processes.say(f"checkpoint {step}: skipped, damaged: {error}")
        if damaged:
            raise StorageError(
                f"{self.directory}: every checkpoint is damaged (steps "
                f"{run_steps.joined(damaged)}); restore a copy, or delete the directory "
                "to start from scratch."
            )
        return None

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Restore one step with the shapes, dtypes and shardings of `abstract_state`.

        Leaves are `jax.ShapeDtypeStruct`s (with a sharding, for more than one device) or
        arrays. Raises `ConfigError` naming what differs in config, data or leaves,
        `DamagedError`, or `StorageError` if the step is not there.
        """
        target = run_steps.existing(self.directory, step)
        self._folder.fetch(step)
        problem = ""
        if self._chief:
            try:
                manifest.verify(target)
            except manifest.DamagedError as error:
                problem = str(error)
        if processes.from_chief(bool(problem)):
            self._damaged.add(step)
            raise manifest.DamagedError(problem or f"{target}: found by process 0.")
        facts = self.facts(step)
        absent = self._absent_params(facts)
        saved_state = state_spec.without(abstract_state, absent)
        self._compare(step, saved_state)
        if facts.get("imported"):
            params = run_steps.read_params(target, facts)
            state = state_spec.begun(saved_state, params)
        else:
            state = orbax_files.restore(self._manager, step, saved_state)
        self._current = step
        return state_spec.filled(state, absent, abstract_state)

    def _finalise(self, step: int, facts: dict[str, Any], samples: Any) -> None:
        """In a thread: wait for Orbax's commit, write the manifest, delete what is old."""
        try:
            with orbax_files.no_dumps():
                self._manager.wait_until_finished()
            if self._chief:
                # Whole files are not enough: Orbax must find what it wrote.
                orbax_files.read(self.directory / str(step), samples)
                manifest.write(self.directory / str(step), facts)
                retention.keep(self.directory, self._config, step, self._damaged)
                self._folder.publish()
        except BaseException as error:
            self._failure = self._failed(step, error)

    def _failed(self, step: int, error: BaseException) -> StorageError:
        """Tidy up after a failed save, which would keep a full disk full."""
        if self._chief:
            retention.remove_unfinished(self.directory, step)
        failure = StorageError(
            f"{self.directory / str(step)}: saving failed: {first_line(error)}."
        )
        failure.__cause__ = error
        return failure

    def _compare(self, step: int, abstract_state: Any) -> None:
        """Raise `ConfigError` if `step` is of another config, data, tokenizer or model."""
        facts = self.facts(step)
        saved = facts | {"config": self._complete(facts["config"])}
        changes = compatibility.check_facts(saved, self._facts, step, self._allow)
        if changes:
            processes.say(f"checkpoint {step}: going on under a changed config:")
            processes.say(compatibility.describe(changes))
        leaves, wanted = facts["leaves"], state_spec.describe(abstract_state)
        if facts.get("imported"):
            leaves, wanted = (state_spec.of_params(x) for x in (leaves, wanted))
        state_spec.compare(leaves, wanted, step)
