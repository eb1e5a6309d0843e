"""What a change of a config's field does to a run that goes on: said once, at the field.

    nothing    not a bit of what is trained: when to save, where to log, where text lies
    rounding   the same sums in other pieces, or by another implementation
    numbers    another run; what a field is that says nothing

A section may say it for all of its fields. Start at `field`; readers ask
`experiment.may_change`.
"""

import dataclasses
from typing import Any

CHANGES = ("nothing", "rounding", "numbers")


def field(changes: str, default: Any = dataclasses.MISSING, *, local: bool = False):
    """Make a dataclass field that says so; `local`: the processes of a run may differ in it."""
    if changes not in CHANGES:
        raise ValueError(f"changes={changes!r}: one of {', '.join(CHANGES)}.")
    metadata = {"changes": changes, "local": local}
    return dataclasses.field(default=default, metadata=metadata)


def described(cls: type) -> dict[str, tuple[str, bool]]:
    """Return {'section.field': (changes, local)} of a dataclass of dataclasses."""
    found = {}
    for item in dataclasses.fields(cls):
        own = (
            item.metadata.get("changes", "numbers"),
            item.metadata.get("local", False),
        )
        if not dataclasses.is_dataclass(item.type):
            found[item.name] = own
            continue
        for name, inner in described(item.type).items():
            found[f"{item.name}.{name}"] = own if item.metadata else inner
    return found
