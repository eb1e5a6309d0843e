"""Config files: FILE.py[:ARGUMENT], or the name of a shipped one. Start at `load`."""

import contextlib
import importlib.machinery
import importlib.util
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

import ml_collections

from memoryformer.config import fields
from memoryformer.errors import ConfigError
from memoryformer.files import paths


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
    fields.override(config, overrides)
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
    assert spec is not None  # there is a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # where dataclasses look for their module
    with explained(path):
        loader.exec_module(module)
    return module, argument


def shipped() -> dict[str, pathlib.Path]:
    """Return {name: file} of the configs that come with the package."""
    package = pathlib.Path(__file__).parents[1]
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
