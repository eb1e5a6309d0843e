"""Whether a run may go on under a changed config: refuse what would change its result.

Start at `check`.
"""

import fnmatch
import json
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError

# Fields (patterns) that may change when a run is started again, because they do not
# change which numbers the run computes beyond their rounding.
FREE = (
    "checkpoint.*",  # when to save
    "eval.*",  # what is measured, not what is trained
    "metrics.*",  # where values are logged
    "train.log_every",
    "train.nonfinite",  # when to give up: the state never takes such an update
    "train.max_skipped",
    "train.*_timeout",
    "train.num_microbatches",  # the same sum in other pieces: rounding
    "mesh",  # the same sums on other devices: rounding
    "model.lookup",  # implementations of one function: rounding
    "model.remat",  # what is computed twice
    "model.scan_layers",
    "train.compilation_cache",
    "model.prefix_chunk",  # the same sum in other pieces: rounding
    "data.path",  # where the text lies: the fingerprint says whether it is the same
    "data.data_dir",
    "data.tokenizer",  # by which name it was asked for: its sha256 says whether it is the same
    "data.end_token",
)
ABSENT = "(absent)"

Drift = list[tuple[str, Any, Any]]


def drift(saved: Mapping[str, Any], new: Mapping[str, Any]) -> Drift:
    """Return (field, old, new) for every field that differs, sorted by field."""
    old, now = config_lib.flatten(plain(saved)), config_lib.flatten(plain(new))
    return [
        (field, old.get(field, ABSENT), now.get(field, ABSENT))
        for field in sorted(old.keys() | now.keys())
        if old.get(field, ABSENT) != now.get(field, ABSENT)
    ]


def describe(changes: Drift) -> str:
    """Return the changes as text, one line per field."""
    return "\n".join(f"  {field}: {old!r} -> {new!r}" for field, old, new in changes)


def check(
    saved: Mapping[str, Any], new: Mapping[str, Any], allow: Collection[str] = ()
) -> Drift:
    """Return the changes that are allowed; raise `ConfigError` on any other.

    `allow` holds field names or patterns ('optimizer.*') that the user takes the
    responsibility for. `train.num_steps` is free where no schedule hangs on it: with
    `optimizer.decay_steps` set on both sides or a constant schedule.
    """
    changes = drift(saved, new)
    free = (*FREE, *allow)
    if _horizon_is_fixed(saved) and _horizon_is_fixed(new):
        free += ("train.num_steps",)
    refused = [change for change in changes if not _matches(change[0], free)]
    if refused:
        fields = ",".join(field for field, _, _ in refused)
        differences = "; ".join(f"{f}: {old!r} -> {new!r}" for f, old, new in refused)
        hint = ""
        if any(field == "train.num_steps" for field, _, _ in refused):
            hint = " (the schedule ends at num_steps: set optimizer.decay_steps)"
        raise ConfigError(
            f"the checkpoint was written under another config: {differences}{hint}; "
            f"start in a new --workdir, or go on regardless with --allow={fields}"
        )
    return changes


def check_tokenizer(
    saved: Mapping[str, str] | None, new: Mapping[str, str] | None, step: int
) -> None:
    """Raise `ConfigError` if a step was trained with another tokenizer.

    Both are {'sha256', 'end_token'}, None where it is not known. Ids would mean other text:
    nothing allows that.
    """
    if saved and new and dict(saved) != dict(new):
        was, now = (f"{t['sha256'][:12]} ({t['end_token']})" for t in (saved, new))
        raise ConfigError(
            f"checkpoint {step} was trained with the tokenizer {was}, this data has {now}: "
            "give the text that the run began with, or name the tokenizer.json of its "
            "--workdir as data.tokenizer."
        )


def shared(config: Mapping[str, Any]) -> str:
    """Return, as text, what the config of every process of a run must agree in."""
    flat = config_lib.flatten(plain(config))
    own = ("data.path", "data.data_dir", "metrics.*")  # where a host keeps and sends it
    kept = {k: v for k, v in flat.items() if not _matches(k, own)}
    return json.dumps(kept, sort_keys=True)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as JSON reads it back; `ConfigError` where JSON cannot hold it."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    try:
        return json.loads(json.dumps(dict(config)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the config must hold JSON values only (numbers, strings, tuples): {error}."
        ) from error


def _matches(field: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns)


def _horizon_is_fixed(config: Mapping[str, Any]) -> bool:
    flat = config_lib.flatten(plain(config))
    constant = flat.get("optimizer.schedule") == "constant"
    return constant or bool(flat.get("optimizer.decay_steps"))
