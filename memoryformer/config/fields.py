"""What a field of a config says of itself, and options that hang on another field.

`source_options: Any = field(.., options=SOURCES)` holds the options of what `source` names.
`SOURCES` maps each choice to a frozen dataclass, or to a class that has one as `Options`. Where
`source` is any text, a name of a file say, `ANY` stands for all but its default.
Start at `field` and `freeze`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from memoryformer.config import sections
from memoryformer.errors import ConfigError

ANY = "*"


def defaults(cls: type, *, hidden: bool = False) -> ml_collections.ConfigDict:
    """Return a section with every field of the dataclass `cls`, so that all can be set.

    A required field is a placeholder: `build` asks for it. hidden: with those that are no keys.
    """
    kinds = typing.get_type_hints(cls)
    section = ml_collections.ConfigDict()
    for field in dataclasses.fields(cls):
        if not field.metadata.get("key", True) and not hidden:
            continue
        if choices := field.metadata.get("options"):
            section[field.name] = _no_options(choices)
            continue
        missing = field.default is dataclasses.MISSING
        kind = kinds[field.name]
        section[field.name] = (
            config_dict.placeholder(kind) if missing else field.default
        )
    return section


CHANGES = ("nothing", "rounding", "numbers")


def field(
    changes: str,
    default: Any = dataclasses.MISSING,
    *,
    doc: str = "",
    local: bool = False,
    key: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Make a dataclass field that says what it means and what a change of it changes.

    local: the processes of one run may differ in it. key: configs have it from the start (see
    `defaults`). options: the field, `X_options`, holds the options of one of these choices;
    which one, the field `X` says (`freeze`).
    """
    if changes not in CHANGES:
        raise ValueError(f"changes={changes!r}: one of {', '.join(CHANGES)}.")
    metadata = {"changes": changes, "local": local, "doc": doc, "options": options}
    return dataclasses.field(default=default, metadata=metadata | {"key": key})


def described(cls: type) -> dict[str, tuple[str, bool]]:
    """Return {'section.field': (changes, local)} of a dataclass of dataclasses.

    Options are there as those of every class that the field may be about.
    """
    flat = {}
    for item in dataclasses.fields(cls):
        itself = (
            item.metadata.get("changes", "numbers"),
            item.metadata.get("local", False),
        )
        sections: list[Any] = [item.type] if dataclasses.is_dataclass(item.type) else []
        if kinds := item.metadata.get("options"):
            sections = [options_class(kind) for kind in kinds.values()]
        elif not sections:
            flat[item.name] = itself
        for section in sections:
            for name, inner in described(section).items():
                whole = item.metadata and not kinds
                flat[f"{item.name}.{name}"] = itself if whole else inner
    return flat


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """There is nothing to set."""


def options_class(kind: Any) -> Any:
    """Return the dataclass of options of a choice: its `Options`, or itself."""
    return getattr(kind, "Options", kind)


def freeze(section: Any, name: str) -> None:
    """Check every field `X` of a section `name` that has `X_options`, and freeze these.

    To be called by `__post_init__`. The default of `X` may be a choice without options.
    Raises `ConfigError` for a choice that there is not, or an option that it has not.
    """
    fields = {item.name: item for item in dataclasses.fields(section)}
    for item in fields.values():
        if kinds := item.metadata.get("options"):
            chooser = item.name.removesuffix("_options")
            choice, default = getattr(section, chooser), fields[chooser].default
            if ANY not in kinds:
                known = dict.fromkeys((default, *kinds))
                sections.choose(choice, known, f"{name}.{chooser}")
            elif choice != default:
                kinds = {**kinds, choice: kinds[ANY]}
            values = getattr(section, item.name)
            frozen = _frozen(kinds, choice, values, f"{name}.{item.name}")
            object.__setattr__(section, item.name, frozen)


def _frozen(kinds: Mapping[str, Any], choice: str, values: Any, name: str) -> Any:
    """Make the options `name` of a choice.

    `values` is a mapping, where None is not set, or the dataclass itself.
    """
    cls = options_class(kinds[choice]) if choice in kinds else NoOptions
    if type(values) is cls:
        return values
    chooser = name.rpartition(".")[2].removesuffix("_options")
    if dataclasses.is_dataclass(values):
        raise ConfigError(
            f"{name}={values!r}: not the options of {chooser}={choice!r}; give a mapping."
        )
    values = {} if values is None else values
    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f"{name}={values!r}: expected a section with fields.")
    section = {k: v for k, v in dict(values).items() if v is not None}
    known = [item.name for item in dataclasses.fields(cls)]
    for key in section:
        if key not in known:
            near = sections.suggest(key, known) if known else "; it has none"
            having = {k: vars(options_class(kinds[k])) for k in kinds}
            owners = [k for k in kinds if key in having[k]["__dataclass_fields__"]]
            owners = [f"any {chooser}" if k == ANY else k for k in owners]
            of = f" (an option of {', '.join(owners)})" if owners else ""
            raise ConfigError(
                f"{name}.{key}: {chooser}={choice!r} has no such option{of}{near}."
            )
    return sections.build(cls, section, name)


def _no_options(kinds: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A section in which the options of every class can be set, and none is.

    ml_collections sets only what is there, and in which order it comes to a choice and to its
    options is the command line's affair.
    """
    section = ml_collections.ConfigDict()
    for kind in kinds.values():
        for name, type_ in typing.get_type_hints(options_class(kind)).items():
            section[name] = config_dict.placeholder(type_)
    return section


def override(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    """Set dotted fields of a config, as a command line does: see `forget_options`."""
    forget_options(config, values)
    with config.unlocked():
        config.update_from_flattened_dict(dict(values))


def forget_options(
    config: ml_collections.ConfigDict, values: Mapping[str, Any]
) -> None:
    """Clear the options `X_options` of a config if `values` choose another `X`.

    What a file sets for one mixer is not meant for another, which takes its defaults.
    """
    for key, value in values.items():
        *parents, chooser = key.split(".")
        section: Any = config
        for parent in parents:
            section = section.get(parent) if hasattr(section, "get") else None
        if not hasattr(section, "get") or section.get(chooser) == value:
            continue
        stale = section.get(f"{chooser}_options")
        for name in stale or ():
            with config.unlocked():
                kind = stale.get_type(name)
                del stale[name]
                stale[name] = config_dict.placeholder(kind)
