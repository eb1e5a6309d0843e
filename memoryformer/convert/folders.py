"""Folders of models: what may be written into, and JSON that is read with its types checked.

Start at `fill` (to write one) and `read_fields` (its config.json).
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from memoryformer.errors import ConfigError, DataError
from memoryformer.files import paths

_UNFINISHED = ".unfinished"  # what a killed export leaves; the next one takes it away
_LARGEST = 1 << 31


def check_free(directory: str | os.PathLike) -> pathlib.Path:
    """Return `directory` if an export may go there: it is not there yet, or empty.

    Raises `ConfigError` for one that holds anything, such as a run or another model.
    """
    path = paths.local(directory, "TO")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; name a new folder.")
    held = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    held = [name for name in held if name != _UNFINISHED]
    if held:
        listed = ", ".join(held[:3]) + (", .." if len(held) > 3 else "")
        raise ConfigError(
            f"{path}: holds {listed}, and nothing is written over; name a new or empty "
            "folder."
        )
    return path


@contextlib.contextmanager
def fill(directory: str | os.PathLike, last: str) -> Iterator[pathlib.Path]:
    """Yield a folder to write to, whose contents then move to `directory`, `last` at last.

    A folder that holds `last` is complete; a failure leaves none of it. Raises as
    `check_free`.
    """
    path = check_free(directory)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    unfinished = path / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        yield unfinished
        written = sorted(unfinished.iterdir(), key=lambda p: p.name == last)
        for part in written:
            part.replace(path / part.name)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # not empty: moved in half
                path.rmdir()
        raise
    unfinished.rmdir()


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises `DataError` if it holds none."""
    try:
        return parse_object(path.read_text(encoding="utf-8-sig"), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}).") from error


def parse_object(text: str | bytes, source: Any) -> dict[str, Any]:
    """Return the JSON object that `text` spells; raises `DataError` if it is none."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise DataError(
            f"{source}: not JSON that can be read: nested too deep."
        ) from error
    except ValueError as error:  # neither JSON nor UTF-8
        raise DataError(f"{source}: not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise DataError(f"{source}: not a JSON object, but {type(value).__name__}.")
    return value


def read_fields(path: pathlib.Path) -> "Fields":
    """Return the JSON object in a file as `Fields`."""
    return Fields(read_object(path), path)


class Fields:
    """Named values of a file, each read as the type it must have; null is absent.

    A default of None makes a value required. All raise `DataError` naming file and field.
    """

    def __init__(self, values: Any, source: Any):
        if not isinstance(values, Mapping):
            raise DataError(f"{source}: {_shown(values)}: expected named values.")
        self.values, self.source = dict(values), source

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`, below 2^31."""
        value = self._value(name, default)
        if type(value) is not int or not least <= value < _LARGEST:
            raise self._wrong(name, value, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self._wrong(name, value, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._value(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(name, default)
        if type(value) is not str:
            raise self._wrong(name, value, "a string")
        return value

    def section(self, name: str) -> "Fields":
        """The values inside a value; none where it is absent."""
        return Fields(self._value(name, {}), f"{self.source}: {name}")

    def _value(self, name, default):
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise DataError(f"{self.source}: lacks {name}.")
        return value

    def _wrong(self, name, value, expected):
        return DataError(f"{self.source}: {name}={_shown(value)}: expected {expected}.")


def plain_name(name: Any, source: Any) -> str:
    """Return the name of a file of the folder itself; raises `DataError` for another."""
    if type(name) is not str or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise DataError(
            f"{source}: names {_shown(name)}, which is no file of its own folder."
        )
    return name


def _shown(value: Any) -> str:
    """The repr, cut short: a value may be a whole file."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: an int of too many digits
        text = f"({type(value).__name__})"
    return text if len(text) <= 60 else f"{text[:57]}..."
