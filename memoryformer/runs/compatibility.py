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

    `allow` holds the names of fields, or patterns ('optimizer.*'): those that change no
    number (`experiment.may_change`), and those that the user answers for. `train.num_steps`
    is free where no schedule hangs on it: with a horizon of its own on both sides or
    a constant schedule.
    """
    changes = drift(saved, new)
    free = tuple(allow)
    if _horizon_is_fixed(saved) and _horizon_is_fixed(new):
        free += ("train.num_steps",)
    refused = [change for change in changes if not _matches(change[0], free)]
    if refused:
        fields = ",".join(field for field, _, _ in refused)
        differences = "; ".join(f"{f}: {old!r} -> {new!r}" for f, old, new in refused)
        hint = ""
        if any(field == "train.num_steps" for field, _, _ in refused):
            hint = " (the schedule ends at num_steps: set optimizer.schedule_options.decay_steps)"
        raise ConfigError(
            f"the checkpoint was written under another config: {differences}{hint}; "
            f"start in a new --workdir, or go on regardless with --allow={fields}"
        )
    return changes


def check_facts(
    saved: Mapping[str, Any],
    new: Mapping[str, Any],
    step: int,
    allow: Collection[str] = (),
) -> Drift:
    """Compare what was written beside a step with what this run would write.

    Config, data, teacher and tokenizer; returns and raises as `check` and `check_tokenizer`.
    How an imported model is trained is free: no update was made.
    """
    check_tokenizer(saved.get("tokenizer"), new["tokenizer"], step)
    old, now = (
        {
            **facts["config"],
            "data_fingerprint": facts["data_fingerprint"],
            "teacher_fingerprint": facts.get("teacher_fingerprint", ""),
        }
        for facts in (saved, new)
    )
    if saved.get("imported"):
        allow = {*allow, "train.*", "optimizer.*", "teacher_fingerprint"}
    return check(old, now, allow)


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


def shared(config: Mapping[str, Any], local: Collection[str]) -> str:
    """Return, as text, what every process of a run must agree in: all but `local` fields."""
    flat = config_lib.flatten(plain(config))
    kept = {name: value for name, value in flat.items() if name not in local}
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
    return constant or bool(flat.get("optimizer.schedule_options.decay_steps"))
