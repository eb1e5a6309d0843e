"""A section of a config -> a frozen dataclass, every key and type checked. Start at `build`."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import ml_collections

from memoryformer.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def build(cls: type[T], section: Mapping[str, Any], name: str) -> T:
    """Make the frozen dataclass `cls` from a config section.

    Fields that the section lacks take the dataclass's default. Raises `ConfigError` for
    an unknown key (naming the nearest one), a missing required key or a wrong type.
    """
    if not isinstance(section, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f"{name}={section!r}: expected a section with fields.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    kinds = typing.get_type_hints(cls)
    values = {}
    for key, value in dict(section).items():
        if key not in fields:
            raise ConfigError(f"{name}.{key}: unknown field{suggest(key, fields)}.")
        if value is not None:  # a placeholder that was not filled
            values[key] = _checked(value, kinds[key], f"{name}.{key}")
    for key, field in fields.items():
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and key not in values:
            raise ConfigError(f"{name}.{key}: missing; it has no default.")
    return cls(**values)


def suggest(key: str, known: typing.Iterable[str]) -> str:
    """'; did you mean ...?' for a near miss, else the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    section = key.rpartition(".")[0]
    close = [k for k in known if k.startswith(section)] or known
    return f"; known: {', '.join(close)}"


def choose(value: str, known: typing.Iterable[str], name: str) -> str:
    """Return `value` if it is one of `known`, else raise a one-line `ConfigError`."""
    known = list(known)
    if value not in known:
        raise ConfigError(f"{name}={value!r}: unknown choice{suggest(value, known)}.")
    return value


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {'section.key': value} of a nested config; an empty section is a value."""
    flat: dict[str, Any] = {}
    for key, value in dict(section).items():
        if isinstance(value, Mapping | ml_collections.ConfigDict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return nested


def at_least(section: Any, name: str, bound: float, *fields: str) -> None:
    """Raise `ConfigError` for a field of the section called `name` that is below `bound`."""
    for key in fields:
        if getattr(section, key) < bound:
            value = getattr(section, key)
            raise ConfigError(f"{name}.{key}={value}: must be >= {bound}.")


def _checked(value: Any, kind: Any, name: str) -> Any:
    if isinstance(value, int) and abs(value) >= 2**31:
        raise ConfigError(f"{name}={value}: must be below 2^31 in size.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, float) and not _is_float32(value):
        raise ConfigError(
            f"{name}={value}: is no number, infinite or 0 in float32, in which it is "
            "computed with."
        )
    if isinstance(value, list):
        value = tuple(value)
    origin = typing.get_origin(kind) or kind
    if origin is Any or not isinstance(origin, type):
        return value
    wrong_bool = isinstance(value, bool) and origin is not bool
    if wrong_bool or not isinstance(value, origin):
        raise ConfigError(
            f"{name}={value!r}: expected {origin.__name__}, got {type(value).__name__}."
        )
    return value


def _is_float32(value: float) -> bool:
    return value == 0 or 2**-126 <= abs(value) < 2.0**128
