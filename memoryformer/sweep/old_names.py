"""The digest that a point's directory had before the options of mixers were nested.

Finished points of older sweeps are found under it. Start at `spelling`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from memoryformer.model import mixers, recurrence
from memoryformer.runs import old_configs

_CHOOSERS = (
    ("mixer", mixers.MIXERS, old_configs.MIXER_OPTIONS),
    ("recurrence", recurrence.KINDS, old_configs.RECURRENCE_OPTIONS),
)


def spelling(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that name a point, {'section.field': value}, as older code had them.

    Every model had the options of every mixer; one that its own did not read kept its default.
    """
    nested = ("model.mixer_options", "model.recurrence_options")
    old = {k: v for k, v in named.items() if not k.startswith(nested)}
    old |= dict.fromkeys((f"model.{name}" for name in old_configs.RETIRED), 0)
    for chooser, kinds, moved in _CHOOSERS:
        choice = named[f"model.{chooser}"]
        for name, (owners, option) in moved.items():
            field = _field(kinds[owners[0]].Options, option)
            key = f"model.{chooser}_options.{option}"
            if choice in owners and key in named:
                old[f"model.{name}"] = named[key]
            elif field.metadata["changes"] == "numbers":
                old[f"model.{name}"] = field.default
    return old


def _field(cls: type, name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(cls) if field.name == name)
