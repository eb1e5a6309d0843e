"""The digests that a point's directory had before fields became options of a choice.

Finished points of older sweeps are found under them, and under the digest of today where only
fields were added (`without_later_fields`). Start at `spellings`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from memoryformer import config as config_lib
from memoryformer.runs import old_configs
from memoryformer.training import experiment

_NESTED_FIRST = ("model.mixer", "model.recurrence")
_NESTED_LAST = "output_std"  # of projection_options
# What they were before there were such fields.
_LATER_FIELDS = {
    "train.teacher": "",
    "train.teacher_options": {},
    "train.trainable": "all",
    "model.projection_options.token_rows": False,
}


def without_later_fields(named: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out fields that older code had not, where they are as it was without them."""
    return {
        key: value
        for key, value in named.items()
        if key not in _LATER_FIELDS or value != _LATER_FIELDS[key]
    }


def last_spelling(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that name a point, of a task too, as the code of before had them."""
    option, fields = f"model.projection_options.{_NESTED_LAST}", dict(named)
    default = _field(_kinds("model.projection")["dense"], _NESTED_LAST).default
    if "model.projection" in named:
        fields[f"model.{_NESTED_LAST}"] = fields.pop(option, default)
    return fields


def spellings(named: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields that name a point, {'section.field': value}, as older code had them.

    First with the options of mixers and recurrences alone, then with none.
    """
    others = old_configs.CHOOSERS.keys() - set(_NESTED_FIRST)
    newer = _flattened(_without_later_options(named), others)
    oldest = _flattened(newer, _NESTED_FIRST)
    oldest |= dict.fromkeys((f"model.{name}" for name in old_configs.RETIRED), 0)
    return [newer, oldest]


def _without_later_options(named: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out options that older code had not, where they are as it was without them."""
    fields = dict(named)
    for key, (_, moved) in old_configs.CHOOSERS.items():
        kind = _kinds(key).get(named[key], config_lib.NoOptions)
        then = {option for _, option in moved.values()}
        for field in dataclasses.fields(config_lib.options_class(kind)):
            name = f"{key}_options.{field.name}"
            if field.name not in then and fields.get(name) == field.default:
                del fields[name]
    return fields


def _flattened(named: Mapping[str, Any], choosers: Collection[str]) -> dict[str, Any]:
    """Options of `choosers` as fields of their sections.

    Every config had those of every choice; one that its own did not read kept its default.
    """
    nested = tuple(f"{key}_options" for key in choosers)
    new = old_configs.NEW_CHOOSERS.keys() & set(choosers)
    old = {k: v for k, v in named.items() if not k.startswith(nested) and k not in new}
    for key in choosers:
        section, kinds = key.partition(".")[0], _kinds(key)
        for name, (owners, option) in old_configs.CHOOSERS[key][1].items():
            field = _field(config_lib.options_class(kinds[owners[0]]), option)
            now = f"{key}_options.{option}"
            if named[key] in owners and now in named:
                old[f"{section}.{name}"] = named[now]
            elif field.metadata["changes"] == "numbers":
                old[f"{section}.{name}"] = old_configs.PLAIN.get(name, field.default)
    return old


def _kinds(key: str) -> Mapping[str, Any]:
    """The choices of the field 'section.X' that have options."""
    section, _, chooser = key.partition(".")
    fields: Any = experiment.Experiment.__dataclass_fields__[section].type
    return fields.__dataclass_fields__[f"{chooser}_options"].metadata["options"]


def _field(cls: type, name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(cls) if field.name == name)
