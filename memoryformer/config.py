"""From a ConfigDict at the door to frozen dataclasses inside.

`build(ModelConfig, config.model, "model")` checks every key and type of a section and
reports the first mistake as one line. Nothing behind it sees a ConfigDict.
"""

import contextlib
import dataclasses
import difflib
import importlib.machinery
import importlib.util
import pathlib
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from memoryformer.errors import ConfigError
from memoryformer.files import paths

T = TypeVar("T")


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


def load(path: str, **overrides: Any) -> ml_collections.ConfigDict:
    """Load `configs/name.py[:argument]`, or a shipped `name[:argument]`, and override fields.

    The same as `--config=path --config.key=value` on a command line. Raises `ConfigError`
    for a file that is not there, cannot be run, or makes no config.
    """
    module, argument = load_module(path)
    make = getattr(module, "get_config", None)
    if not callable(make):
        raise ConfigError(f"--config={path}: defines no get_config().")
    with explained(path):
        config = make(argument) if argument else make()
    if not isinstance(config, ml_collections.ConfigDict):
        kind = type(config).__name__
        raise ConfigError(
            f"--config={path}: get_config() returns {kind}, not a ConfigDict."
        )
    override(config, overrides)
    return config


def load_module(path: str) -> tuple[types.ModuleType, str]:
    """Import a config FILE[:ARGUMENT] or NAME[:ARGUMENT]: (module, argument).

    NAME is one of `shipped`; a file of that name comes first. Raises `ConfigError`.
    """
    file, colon, argument = str(path).partition(":")
    where = paths.local(file, "--config")
    if not where.is_file() and file in shipped():
        where = shipped()[file]
    if not where.is_file():
        hint = " (it is a folder)" if where.is_dir() else ""
        if file.isidentifier():
            hint += (
                f" and no shipped config of that name; there are {', '.join(shipped())}"
            )
        hint += "; what follows a colon is the config's argument" if colon else ""
        raise ConfigError(f"--config={path}: there is no file {file!r}{hint}.")
    loader = importlib.machinery.SourceFileLoader("memoryformer_config", str(where))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # where dataclasses look for their module
    with explained(path):
        loader.exec_module(module)
    return module, argument


def shipped() -> dict[str, pathlib.Path]:
    """Return {name: file} of the configs that come with the package."""
    package = pathlib.Path(__file__).parent
    folder = package / "configs"  # where a wheel has them
    if not folder.is_dir():
        folder = package.parent / "configs"  # and a checkout
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Tell of what a config file raises in one line, with the line of the file."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        file = str(path).partition(":")[0]
        reason = " ".join(str(error).split())
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if pathlib.Path(frame.filename).stem == pathlib.Path(file).stem
        ]
        line = f", line {lines[-1]}" if lines else ""
        raise ConfigError(
            f"--config={path}: {file}{line}: {type(error).__name__}: {reason}."
        ) from error


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {'section.key': value} of a nested config; an empty section is a value."""
    flat = {}
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


def defaults(cls: type) -> ml_collections.ConfigDict:
    """Return a section with every field of the dataclass `cls`, so that all can be set.

    A required field is a placeholder: `build` asks for it.
    """
    kinds = typing.get_type_hints(cls)
    section = ml_collections.ConfigDict()
    for field in dataclasses.fields(cls):
        if choices := field.metadata.get("options"):
            section[field.name] = _no_options(choices)
            continue
        missing = field.default is dataclasses.MISSING
        kind = kinds[field.name]
        section[field.name] = (
            config_dict.placeholder(kind) if missing else field.default
        )
    return section


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


CHANGES = ("nothing", "rounding", "numbers")


def field(
    changes: str,
    default: Any = dataclasses.MISSING,
    *,
    doc: str = "",
    local: bool = False,
    options: Mapping[str, type] | None = None,
):
    """Make a dataclass field that says what it means and what a change of it changes.

    local: the processes of one run may differ in it. options: the field holds the options of
    one of these classes, its `Options`; which one, another field says (`options`).
    """
    if changes not in CHANGES:
        raise ValueError(f"changes={changes!r}: one of {', '.join(CHANGES)}.")
    metadata = {"changes": changes, "local": local, "doc": doc, "options": options}
    return dataclasses.field(default=default, metadata=metadata)


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
        sections = [item.type] if dataclasses.is_dataclass(item.type) else []
        if kinds := item.metadata.get("options"):
            sections = [kind.Options for kind in kinds.values()]
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


def options(kinds: Mapping[str, type], choice: str, values: Any, name: str) -> Any:
    """Freeze the options `name` of the class that `choice` names: its `Options`.

    `values` is a mapping, where None is not set, or the dataclass itself. Raises
    `ConfigError` for an option that the class has not.
    """
    cls = kinds[choice].Options if choice in kinds else NoOptions
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
            near = suggest(key, known) if known else "; it has none"
            owners = [k for k in kinds if key in kinds[k].Options.__dataclass_fields__]
            of = f" (an option of {', '.join(owners)})" if owners else ""
            raise ConfigError(
                f"{name}.{key}: {chooser}={choice!r} has no such option{of}{near}."
            )
    return build(cls, section, name)


def _no_options(kinds: Mapping[str, type]) -> ml_collections.ConfigDict:
    """A section in which the options of every class can be set, and none is.

    ml_collections sets only what is there, and in which order it comes to a choice and to its
    options is the command line's affair.
    """
    section = ml_collections.ConfigDict()
    for kind in kinds.values():
        for name, type_ in typing.get_type_hints(kind.Options).items():
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
