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
import dataclasses
import importlib.metadata
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from memoryformer import config as config_lib
from memoryformer.cluster import processes
from memoryformer.errors import ConfigError, StorageError, first_line
from memoryformer.files import paths
from memoryformer.runs import compatibility, manifest, state_spec
from memoryformer.runs import steps as run_steps

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep: the newest `keep`, and every `keep_every` steps."""

    every_steps: int = config_lib.field(
        "nothing", 1000, doc="Steps between two saves; 0: off."
    )
    every_minutes: float = config_lib.field(
        "nothing", 0.0, doc="Minutes between two saves; 0: off."
    )
    keep: int = config_lib.field("nothing", 2, doc="Newest checkpoints to keep.")
    keep_every: int = config_lib.field(
        "nothing",
        0,
        doc="Keep every checkpoint of a multiple of so many steps; 0: off.",
    )

    def __post_init__(self):
        least = {"every_steps": 0, "every_minutes": 0, "keep": 1, "keep_every": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value < bound:
                raise ConfigError(
                    f"checkpoint.{name}={value}: must be {bound} or more."
                )


class Checkpointer:
    """Save and restore the training state of one run; a context manager.

    `run_config` is the resolved config and `data_fingerprint` names the data; both are
    stored with every step, and a step written under others is refused (see `compatibility`)
    unless `allow` holds the fields that differ, as is one of another `tokenizer` whatever
    `allow` holds; `complete` fills a stored config in with
    the fields that it was written without. Every process makes one and calls the
    same methods at the same steps; process 0 writes manifests and deletes.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: CheckpointConfig,
        *,
        run_config: Mapping[str, Any],
        data_fingerprint: str,
        tokenizer: Mapping[str, str] | None = None,
        allow: Collection[str] = (),
        complete: Callable[[dict], dict] = dict,
    ):
        self.directory = paths.workdir(workdir).absolute() / run_steps.FOLDER
        self._config = config
        self._facts = {
            "config": compatibility.plain(run_config),
            "data_fingerprint": data_fingerprint,
            "tokenizer": tokenizer,
            "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
        }
        self._allow = allow
        self._complete = complete
        self._chief = processes.is_chief()
        self._damaged: set[int] = set()
        self._current: int | None = None  # the step whose state this run holds on disk
        self._finaliser: threading.Thread | None = None
        self._failure: StorageError | None = None
        self._last_save = time.monotonic()
        logging.getLogger("absl").addFilter(_is_not_a_dump)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self._chief:
                self._remove_debris()
            processes.barrier("checkpoints")  # every process must see the same steps
            options = ocp.CheckpointManagerOptions(save_root_metadata=False)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
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

    def should_save(self, step: int) -> bool:
        """Whether it is time, by steps or by minutes; never for the step already saved."""
        if step == self._current:
            return False
        if self._config.every_steps and step % self._config.every_steps == 0:
            return True
        if not self._config.every_minutes:
            return False
        due = time.monotonic() - self._last_save >= 60 * self._config.every_minutes
        if jax.process_count() == 1:
            return due
        # Clocks differ: process 0 decides, now and then, since it costs a round trip.
        return step % 10 == 0 and bool(processes.from_chief(due))

    def preflight(self, state: Any) -> None:
        """Raise `StorageError` if the disk cannot hold `keep` + 2 states.

        `keep` stay, one is being written and one not yet deleted. What checkpoints take
        up already counts as free; `keep_every` steps come on top and are not counted.
        """
        one = state_spec.total_bytes(state)
        need = one * (self._config.keep + 2)
        free = shutil.disk_usage(self.directory).free + manifest.size(self.directory)
        if self._chief and free < need:
            raise StorageError(
                f"{self.directory}: {free / 2**30:.2f} GiB free, checkpoints need "
                f"{need / 2**30:.2f} GiB (checkpoint.keep={self._config.keep} plus 2, "
                f"{one / 2**30:.2f} GiB each); free some space or lower checkpoint.keep."
            )

    def save(self, step: int, state: Any, *, wait: bool = False) -> bool:
        """Start saving `state` as `step`; return False if it is there already.

        Blocks for the copy to the host, and for the save before if that still runs. What
        an earlier run left under the same step (damaged, or of a future given up by
        restoring an older step) is replaced. Raises `StorageError`.
        """
        self.wait()
        if step == self._current:
            return False
        target = self.directory / str(step)
        facts = self._facts | {"step": step, "leaves": state_spec.describe(state)}
        try:
            if self._chief and target.exists():
                listed = run_steps.listed(self.directory) - {step}
                manifest.write_ledger(self.directory, listed)
                manifest.remove(target)
            self._damaged.discard(step)
            processes.barrier(f"replace {step}")
            self._manager.reload()
            # Without `force` Orbax skips a step below its newest, and says nothing.
            args = ocp.args.Composite(state=ocp.args.StandardSave(state))
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            self._failure = self._failed(step, error)
            raise self._failure from error
        self._finaliser = threading.Thread(
            target=self._finalise,
            args=(step, facts, state_spec.samples(state)),
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
            with contextlib.suppress(*([Exception] if self._failure else [])):
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
        damaged, finished = [], self.steps()
        listed = run_steps.listed(self.directory)
        for step in sorted(
            {*run_steps.numbered(self.directory), *listed}, reverse=True
        ):
            if step not in finished and step not in listed:
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
                f"{self.directory}: every checkpoint is damaged (steps {run_steps.joined(damaged)}); "
                "restore a copy, or delete the directory to start from scratch."
            )
        return None

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Restore one step with the shapes, dtypes and shardings of `abstract_state`.

        Leaves are `jax.ShapeDtypeStruct`s (with a sharding, for more than one device) or
        arrays. Raises `ConfigError` naming what differs in config, data or leaves,
        `DamagedError`, or `StorageError` if the step is not there.
        """
        target = run_steps.existing(self.directory, step)
        problem = ""
        if self._chief:
            try:
                manifest.verify(target)
            except manifest.DamagedError as error:
                problem = str(error)
        if processes.from_chief(bool(problem)):
            self._damaged.add(step)
            raise manifest.DamagedError(problem or f"{target}: found by process 0.")
        self._compare(step, abstract_state)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(
                        jax.tree.map(state_spec.abstract, abstract_state)
                    )
                ),
            )
        except Exception as error:
            raise StorageError(
                f"{target}: cannot be restored: {first_line(error)}."
            ) from error
        self._current = step
        return restored["state"]

    def _finalise(self, step: int, facts: dict[str, Any], samples: Any) -> None:
        """In a thread: wait for Orbax's commit, write the manifest, delete what is old."""
        try:
            self._manager.wait_until_finished()
            if self._chief:
                # Whole files are not enough: Orbax must find what it wrote.
                state_spec.read(self.directory / str(step), samples)
                manifest.write(self.directory / str(step), facts)
                self._retain(step)
        except BaseException as error:
            self._failure = self._failed(step, error)

    def _retain(self, newest: int) -> None:
        """Delete all but the newest `keep` and the `keep_every` ones, whole or not."""
        whole = [s for s in self.steps() if s <= newest and s not in self._damaged]
        kept = set(whole[-self._config.keep :])
        if self._config.keep_every:
            kept |= {s for s in whole if s % self._config.keep_every == 0}
        # First: what a kill leaves half deleted is not damaged.
        manifest.write_ledger(self.directory, kept)
        for step in run_steps.numbered(self.directory):
            if step in kept:
                continue
            if step > newest:
                processes.say(
                    f"checkpoint {step}: deleted, the run went on from an older one."
                )
            manifest.remove(self.directory / str(step))

    def _remove_debris(self) -> None:
        """Delete what killed saves and killed deletions have left."""
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            processes.say(
                f"checkpoint {path.name.split('.')[0]}: unfinished save removed."
            )
            shutil.rmtree(path)
        finished, listed = self.steps(), run_steps.listed(self.directory)
        for step in set(run_steps.numbered(self.directory)) - {*finished, *listed}:
            if finished and step < finished[-1]:
                manifest.remove(self.directory / str(step))
        if not listed.issuperset(finished):  # killed between manifest and ledger
            manifest.write_ledger(self.directory, listed.union(finished))

    def _failed(self, step: int, error: BaseException) -> StorageError:
        """Tidy up after a failed save, which would keep a full disk full."""
        if self._chief:
            for path in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
        failure = StorageError(
            f"{self.directory / str(step)}: saving failed: {first_line(error)}."
        )
        failure.__cause__ = error
        return failure

    def _compare(self, step: int, abstract_state: Any) -> None:
        """Raise `ConfigError` if `step` is of another config, data, tokenizer or model."""
        facts = self.facts(step)
        compatibility.check_tokenizer(
            facts.get("tokenizer"), self._facts["tokenizer"], step
        )
        saved = self._complete(facts["config"])
        saved["data_fingerprint"] = facts["data_fingerprint"]
        ours = dict(self._facts["config"])
        ours["data_fingerprint"] = self._facts["data_fingerprint"]
        changes = compatibility.check(saved, ours, self._allow)
        if changes:
            processes.say(f"checkpoint {step}: going on under a changed config:")
            processes.say(compatibility.describe(changes))
        state_spec.compare(facts["leaves"], state_spec.describe(abstract_state), step)


def _is_not_a_dump(record: logging.LogRecord) -> bool:
    # Orbax logs pages of traceback for an error that it raises and we report in a line.
    return not (record.exc_info and "orbax" in record.pathname)
