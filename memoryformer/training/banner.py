"""What a run is about to do, told at its start: its config, and what is new in it.

    model: vocab_size=4096 embed_dim=128 num_layers=3 ...
    tables: 12,976,128 entries of 12 bytes with their moments, 156 MB
    changed from configs/quickstart.py:
      train.seed: 0 -> 1
    changed since the last run in runs/mine:
      train.log_every: 10 -> 50

Start at `text`; `dump` is the form in which shipped configs are reviewed.
"""

import pathlib
import textwrap
from collections.abc import Mapping
from typing import Any

from memoryformer import accounting
from memoryformer import config as config_lib
from memoryformer.errors import ConfigError, StorageError
from memoryformer.runs import compatibility, remote
from memoryformer.training import experiment

WIDTH = 100


def text(config: Mapping[str, Any], preset: str, workdir: pathlib.Path | str) -> str:
    """Return the resolved config, and its changes from the file `preset` and in `workdir`.

    `preset` is FILE[:ARGUMENT]. Raises `ConfigError` for a config that cannot be.
    """
    run = experiment.resolve(config)
    resolved = experiment.as_dict(run)
    lines = []
    for section, fields in resolved.items():
        shown = str(fields)
        if isinstance(fields, Mapping):
            shown = " ".join(f"{key}={value!r}" for key, value in fields.items())
        lines += textwrap.wrap(
            f"{section}: {shown}", WIDTH, subsequent_indent="  ", break_long_words=False
        )
    lines += _tables(run)
    # As written: the file alone may lack what the command line must give.
    lines += _changes(config_lib.load(preset), config, f"from {preset}")
    last = _last(workdir)
    if last is not None:
        lines += _changes(last, resolved, f"since the last run in {workdir}")
    return "\n".join(lines)


def _tables(run: experiment.Experiment) -> list[str]:
    """What most of the state is."""
    entries = accounting.count(run.model).parameters.tables
    if not entries:
        return []
    each = run.optimizer.table_entry_bytes
    megabytes = entries * each / 1e6
    return [
        f"tables: {entries:,} entries of {each} bytes with their moments, {megabytes:,.0f} MB"
    ]


def dump(config: Mapping[str, Any]) -> str:
    """Return what a config sets as one sorted line per field: 'model.embed_dim = 128'."""
    flat = sorted(config_lib.flatten(config).items())
    return "".join(f"{key} = {value!r}\n" for key, value in flat if value is not None)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], whence: str) -> list[str]:
    changes = compatibility.drift(old, new)
    if not changes:
        return [f"nothing changed {whence}"]
    return [f"changed {whence}:", *compatibility.describe(changes).split("\n")]


def _last(workdir: pathlib.Path | str) -> dict[str, Any] | None:
    """The config that the last run in `workdir` left, if there is one and it is whole."""
    try:
        return experiment.complete(remote.read_config(workdir))
    except (StorageError, ConfigError):
        return None
