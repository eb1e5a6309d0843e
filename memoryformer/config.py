"""From a ConfigDict at the door to frozen dataclasses inside.

`build(ModelConfig, config.model, "model")` checks every key and type of a section and
reports the first mistake as one line. Nothing behind it sees a ConfigDict.
"""

import ast
import dataclasses
import difflib
import importlib.util
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from memoryformer.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], section: Mapping[str, Any], name: str) -> T:
    """Make the frozen dataclass `cls` from a config section.

    Fields that the section lacks take the dataclass's default. Raises `ConfigError` for
    an unknown key (naming the nearest one), a missing required key or a wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    types = typing.get_type_hints(cls)
    values = {}
    for key, value in dict(section).items():
        if key not in fields:
            raise ConfigError(f"{name}.{key}: unknown field{suggest(key, fields)}.")
        if value is not None:  # a placeholder that was not filled
            values[key] = _checked(value, types[key], f"{name}.{key}")
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
    return f"; known: {', '.join(k for k in known if k.startswith(section))}"


def choose(value: str, known: typing.Iterable[str], name: str) -> str:
    """Return `value` if it is one of `known`, else raise a one-line `ConfigError`."""
    known = list(known)
    if value not in known:
        raise ConfigError(f"{name}={value!r}: unknown choice{suggest(value, known)}.")
    return value


def load(path: str, **overrides: Any) -> ml_collections.ConfigDict:
    """Load `configs/name.py[:argument][,key=value...]` and apply dotted overrides.

    The same as `--config=path --config.key=value` on a command line.
    """
    module, argument, written = load_module(path)
    config = module.get_config(argument) if argument else module.get_config()
    for key, text in written.items():
        config.update_from_flattened_dict({key: _parsed(config, key, text)})
    with config.unlocked():
        config.update_from_flattened_dict(overrides)
    return config


def load_module(path: str) -> tuple[types.ModuleType, str, dict[str, str]]:
    """Import a config file: (module, argument, overrides as written); see `split`."""
    file, argument, overrides = split(path)
    if not pathlib.Path(file).is_file():
        raise ConfigError(f"--config={path}: there is no file {file!r}.")
    spec = importlib.util.spec_from_file_location("memoryformer_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, argument, overrides


def split(path: str) -> tuple[str, str, dict[str, str]]:
    """'f.py:mini,train.seed=1' -> ('f.py', 'mini', {'train.seed': '1'}).

    After the colon, what has an equals sign is an override, the rest is the argument.
    """
    file, _, rest = str(path).partition(":")
    parts = rest.split(",") if rest else []
    overrides = dict(part.split("=", 1) for part in parts if "=" in part)
    return file, ",".join(part for part in parts if "=" not in part), overrides


def spread(argv: Sequence[str]) -> list[str]:
    """Write `--config=f.py:arg,key=value` as `--config=f.py:arg --config.key=value`."""
    words = []
    for word in argv:
        if not word.startswith("--config="):
            words.append(word)
            continue
        file, argument, overrides = split(word.removeprefix("--config="))
        words.append(f"--config={file}" + (f":{argument}" if argument else ""))
        words += [f"--config.{key}={value}" for key, value in overrides.items()]
    return words


def _parsed(config: ml_collections.ConfigDict, key: str, text: str) -> Any:
    """Read an override's text as the type of the field that it replaces."""
    known = flatten(config)
    if key not in known:
        raise ConfigError(f"{key}: the config has no such field{suggest(key, known)}.")
    section, _, name = key.rpartition(".")
    for part in filter(None, section.split(".")):
        config = config[part]
    kind = config.get_type(name)
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text.capitalize() if kind is bool else text)
    except (SyntaxError, ValueError):
        value = text
    return _checked(value, kind, key)


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {'section.key': value} of a nested config; an empty section is a value."""
    flat = {}
    for key, value in dict(section).items():
        if isinstance(value, Mapping | ml_collections.ConfigDict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def defaults(cls: type) -> ml_collections.ConfigDict:
    """Return a section with every field of the dataclass `cls`, so that all can be set.

    A required field is a placeholder: `build` asks for it.
    """
    types = typing.get_type_hints(cls)
    section = ml_collections.ConfigDict()
    for field in dataclasses.fields(cls):
        missing = field.default is dataclasses.MISSING
        kind = types[field.name]
        section[field.name] = (
            config_dict.placeholder(kind) if missing else field.default
        )
    return section


def _checked(value: Any, kind: Any, name: str) -> Any:
    if isinstance(value, int) and abs(value) >= 2**31:
        raise ConfigError(f"{name}={value}: must be below 2^31 in size.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list):
        value = tuple(value)
    origin = typing.get_origin(kind) or kind
    if not isinstance(origin, type):
        return value
    wrong_bool = isinstance(value, bool) and origin is not bool
    if wrong_bool or not isinstance(value, origin):
        raise ConfigError(
            f"{name}={value!r}: expected {origin.__name__}, got {type(value).__name__}."
        )
    return value
