"""When to save, and which checkpoints stay: the newest few, and some for good.

    kept = the newest `keep` whole steps + every whole step divisible by `keep_every`

The ledger is written before anything is deleted, so that what a kill leaves half deleted is
not taken for a damaged checkpoint. Process 0 alone calls this. Start at `keep`.
"""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Collection, Iterator

import jax

from memoryformer import config as config_lib
from memoryformer.cluster import processes
from memoryformer.errors import StorageError
from memoryformer.files import atomic
from memoryformer.runs import manifest
from memoryformer.runs import steps as run_steps


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
        every = ("every_steps", "every_minutes", "keep_every")
        config_lib.at_least(self, "checkpoint", 0, *every)
        config_lib.at_least(self, "checkpoint", 1, "keep")


def is_due(config: CheckpointConfig, step: int, last_save: float) -> bool:
    """Whether it is time to save, by steps or by minutes; last_save: of `time.monotonic`."""
    if config.every_steps and step % config.every_steps == 0:
        return True
    if not config.every_minutes:
        return False
    due = time.monotonic() - last_save >= 60 * config.every_minutes
    if jax.process_count() == 1:
        return due
    # Clocks differ: process 0 decides, now and then, since it costs a round trip.
    return step % 10 == 0 and processes.from_chief(due)


def keep(
    directory: pathlib.Path,
    config: CheckpointConfig,
    newest: int,
    damaged: Collection[int],
) -> None:
    """Delete all other steps, whole or not; those after `newest` were given up."""
    finished = run_steps.finished(directory)
    whole = [step for step in finished if step <= newest and step not in damaged]
    kept = set(whole[-config.keep :])
    if config.keep_every:
        kept |= {step for step in whole if step % config.keep_every == 0}
    manifest.write_ledger(directory, kept)
    for step in run_steps.numbered(directory):
        if step in kept:
            continue
        if step > newest:
            processes.say(
                f"checkpoint {step}: deleted, the run went on from an older one."
            )
        manifest.remove(directory / str(step))


def remove(directory: pathlib.Path, step: int) -> None:
    """Delete one step, which is to be written anew."""
    manifest.write_ledger(directory, run_steps.listed(directory) - {step})
    manifest.remove(directory / str(step))


def remove_debris(directory: pathlib.Path) -> None:
    """Delete what killed saves and killed deletions have left."""
    for folder in unfinished(directory):
        processes.say(
            f"checkpoint {folder.name.split('.')[0]}: unfinished save removed."
        )
        shutil.rmtree(folder)
    for file in directory.glob(atomic.TEMPORARY):
        file.unlink()
    finished, listed = run_steps.finished(directory), run_steps.listed(directory)
    for step in set(run_steps.numbered(directory)) - {*finished, *listed}:
        if finished and step < finished[-1]:
            manifest.remove(directory / str(step))
    if not listed.issuperset(finished):  # killed between manifest and ledger
        manifest.write_ledger(directory, listed.union(finished))


def unfinished(
    directory: pathlib.Path, step: int | str = "*"
) -> Iterator[pathlib.Path]:
    """Yield the folders of saves that Orbax has not finished."""
    return directory.glob(f"{step}.orbax-checkpoint-tmp*")


def remove_unfinished(directory: pathlib.Path, step: int) -> None:
    """Delete what a failed save left, which would keep a full disk full."""
    for folder in unfinished(directory, step):
        shutil.rmtree(folder, ignore_errors=True)


def check_space(
    directory: pathlib.Path, config: CheckpointConfig, state_bytes: int
) -> None:
    """Raise `StorageError` if the disk cannot hold `keep` + 2 states.

    `keep` stay, one is being written and one not yet deleted. What checkpoints take up
    already counts as free; the steps that are kept for good come on top, not counted.
    """
    need = state_bytes * (config.keep + 2)
    free = shutil.disk_usage(directory).free + manifest.size(directory)
    if free < need:
        raise StorageError(
            f"{directory}: {free / 2**30:.2f} GiB free, checkpoints need "
            f"{need / 2**30:.2f} GiB (checkpoint.keep={config.keep} plus 2, "
            f"{state_bytes / 2**30:.2f} GiB each); free some space or lower checkpoint.keep."
        )
