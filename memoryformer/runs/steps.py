"""Which steps a run has saved, and what they hold; no manager and no device is needed.

Start at `load`.
"""

import os
import pathlib
from typing import Any

import ml_collections

from memoryformer.errors import StorageError
from memoryformer.files import paths
from memoryformer.notation import Params
from memoryformer.runs import manifest, orbax_files, state_spec

FOLDER = "checkpoints"


def load(
    workdir: str | os.PathLike, step: int | None = None
) -> tuple[ml_collections.ConfigDict, Params]:
    """Load (config, params) of a run: the newest step, or `step`.

    params is a nested dict of numpy arrays with string keys; no model, mesh or device is
    needed. What older versions did not store, the random features of a performer,
    `training.experiment.load` adds. Raises `StorageError`: no directory, no checkpoint,
    no such step, damaged.
    """
    target = existing(_folder(workdir), step)
    facts = manifest.verify(target)
    params = read_params(target, facts)
    return ml_collections.ConfigDict(_tuples(facts["config"])), params


def read_params(target: pathlib.Path, facts: dict[str, Any]) -> Params:
    """Read the parameters alone of a step's directory, as numpy arrays; facts: its manifest's."""
    abstract = state_spec.nested(facts["leaves"], "params")
    return orbax_files.read(target, abstract, partial_restore=True)["params"]


def facts(workdir: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """Return what the manifest of a step says (None: the newest); see `load`."""
    return manifest.facts(existing(_folder(workdir), step))


def _folder(workdir: str | os.PathLike) -> pathlib.Path:
    return paths.local(workdir, "--workdir").absolute() / FOLDER


def existing(directory: pathlib.Path, step: int | None) -> pathlib.Path:
    """Return the directory of a step that was finished once (None: the newest of them).

    Raises `StorageError` that says what there is.
    """
    if not directory.is_dir():
        raise StorageError(f"--workdir: there is no directory {directory}.")
    steps = sorted(known(directory))
    if not steps:
        raise StorageError(f"{directory}: holds no finished checkpoint.")
    if step is not None and step not in steps:
        raise StorageError(f"{directory}: no step {step}; there are {joined(steps)}.")
    return directory / str(steps[-1] if step is None else step)


def numbered(directory: pathlib.Path) -> list[int]:
    """Return the steps that have a folder, ascending."""
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())


def finished(directory: pathlib.Path) -> list[int]:
    """Return the steps that have a manifest, ascending."""
    return [s for s in numbered(directory) if manifest.exists(directory / str(s))]


def listed(directory: pathlib.Path) -> set[int]:
    """Return the steps that were finished: whole, or damaged since."""
    try:
        return manifest.read_ledger(directory)
    except manifest.DamagedError:  # then whatever is there may have been
        return set(numbered(directory))


def known(directory: pathlib.Path) -> set[int]:
    """Return the steps that have a manifest, or had one."""
    return {*finished(directory), *listed(directory)}


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def joined(steps: list[int]) -> str:
    """Write steps as text."""
    return ", ".join(map(str, sorted(steps)))
