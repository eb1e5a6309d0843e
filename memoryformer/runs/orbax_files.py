"""The files of a checkpoint, which Orbax writes and reads: no other module knows how.

Start at `start_save` and `restore` (training) and `read` (everything else).
"""

import contextlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from memoryformer.errors import StorageError, first_line


def manager(directory: pathlib.Path) -> ocp.CheckpointManager:
    """Return what saves in the background; which steps are kept is not its business."""
    options = ocp.CheckpointManagerOptions(save_root_metadata=False)
    return ocp.CheckpointManager(directory, options=options)


def start_save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Copy `state` to the host and begin to write it."""
    manager.reload()
    args = ocp.args.Composite(state=ocp.args.StandardSave(state))
    with no_dumps():
        # Without `force` Orbax skips a step below its newest, and says nothing.
        manager.save(step, args=args, force=True)


def restore(manager: ocp.CheckpointManager, step: int, abstract_state: Any) -> Any:
    """Read a step on all processes, in the shardings of `abstract_state`.

    Raises `StorageError`.
    """
    wanted = jax.tree.map(abstract, abstract_state)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
    try:
        with no_dumps():
            return manager.restore(step, args=args)["state"]
    except Exception as error:
        raise StorageError(
            f"{manager.directory / str(step)}: cannot be restored: {first_line(error)}."
        ) from error


def samples(state: Any) -> Any:
    """Return `state` as abstract values: of every kind one leaf, placeholders for the rest.

    A kind is what a first key holds (params, opt_state, ...); its leaf is the smallest
    array, or a scalar where there is nothing else.
    """
    chosen: dict[Any, tuple[Any, Any]] = {}
    for path, x in jax.tree.leaves_with_path(state):
        size = (x.ndim == 0, x.size)
        if path[0] not in chosen or size < chosen[path[0]][0]:
            chosen[path[0]] = size, path
    paths = [path for _, path in chosen.values()]

    def sample(path, x):
        kept = path in paths
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if kept else ocp.PLACEHOLDER

    return jax.tree.map_with_path(sample, state)


def read(target: pathlib.Path, abstract: Any, **how: Any) -> Any:
    """Read leaves of a step's directory as numpy arrays, in this process alone.

    `abstract` is nested like the state that was saved, with `samples`' placeholders, or
    (`partial_restore`) a part of it in dicts.

    Raises `StorageError` where Orbax does not find them.
    """
    restore_args = jax.tree.map(
        lambda x: ocp.RestoreArgs(restore_type=np.ndarray), abstract
    )
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"alone{process}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, **how)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            return reader.restore(target / "state", args=args)
    except Exception as error:
        raise StorageError(
            f"{target}: cannot be read again: {first_line(error)}."
        ) from error


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and sharding; without one, this process's first device."""
    sharding = getattr(x, "sharding", None)
    if sharding is None:  # or Orbax would ask for the devices it was saved on
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@contextlib.contextmanager
def no_dumps() -> Iterator[None]:
    """Keep pages of Orbax's traceback, for errors that we report in a line, off the log."""
    logger = logging.getLogger("absl")

    def is_no_dump(record: logging.LogRecord) -> bool:  # one a block: they overlap
        return not (record.exc_info and "orbax" in record.pathname)

    logger.addFilter(is_no_dump)
    try:
        yield
    finally:
        logger.removeFilter(is_no_dump)
