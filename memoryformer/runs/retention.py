"""Which checkpoints stay: the newest few, and some for good; what killed runs left goes.

    kept = the newest `number` whole steps + every whole step divisible by `every`

The ledger is written before anything is deleted, so that what a kill leaves half deleted is
not taken for a damaged checkpoint. Process 0 alone calls this. Start at `keep`.
"""

import pathlib
import shutil
from collections.abc import Collection, Iterator

from memoryformer.cluster import processes
from memoryformer.errors import StorageError
from memoryformer.files import atomic
from memoryformer.runs import manifest
from memoryformer.runs import steps as run_steps


def keep(
    directory: pathlib.Path,
    *,
    newest: int,
    number: int,
    every: int,
    damaged: Collection[int],
) -> None:
    """Delete all other steps, whole or not; those after `newest` were given up."""
    finished = run_steps.finished(directory)
    whole = [step for step in finished if step <= newest and step not in damaged]
    kept = set(whole[-number:])
    if every:
        kept |= {step for step in whole if step % every == 0}
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


def check_space(directory: pathlib.Path, state_bytes: int, number: int) -> None:
    """Raise `StorageError` if the disk cannot hold `number` + 2 states.

    `number` stay, one is being written and one not yet deleted. What checkpoints take up
    already counts as free; the steps that are kept for good come on top, not counted.
    """
    need = state_bytes * (number + 2)
    free = shutil.disk_usage(directory).free + manifest.size(directory)
    if free < need:
        raise StorageError(
            f"{directory}: {free / 2**30:.2f} GiB free, checkpoints need "
            f"{need / 2**30:.2f} GiB (checkpoint.keep={number} plus 2, "
            f"{state_bytes / 2**30:.2f} GiB each); free some space or lower checkpoint.keep."
        )
