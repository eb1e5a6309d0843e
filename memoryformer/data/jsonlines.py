"""JSON lines: one value a line, and the field of it that holds text.

Start at `values` and `text`; `Share` deals the lines of a large file.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import IO, Any

from memoryformer import errors
from memoryformer.data import blocks, long_texts
from memoryformer.data.names import shown

_MISSING = object()
_KINDS = {list: "a list", bool: "true or false", type(None): "null", dict: "an object"}
_LONE = "{}: a lone surrogate, which is not text."
_MAX_NAMED = 160  # characters of the fields that a message names


@dataclasses.dataclass(frozen=True)
class Share:
    """One of `count` shares of the rows of a file, which as many readers read."""

    number: int = 0
    count: int = 1

    def holds(self, row: int) -> bool:
        """Whether row or line `row`, counted from 1, is in the share."""
        return (row - 1) % self.count == self.number


WHOLE = Share()


class _BadLineError(errors.DataError):
    """A line that is no JSON."""


def values(
    path: blocks.File, share: Share = WHOLE, long: int = 1 << 62
) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of every line of `share` that is not blank.

    The long strings of a line of more than `long` bytes are `LongText`. Raises `DataError`
    naming file and line.
    """
    lines = blocks.lines_or_files(path, long, share.holds)
    for number, (line, file) in enumerate(lines, start=1):
        if share.holds(number) and (file or line.strip()):
            yield number, _parsed(line, f"{shown(path)}:{number}", file)


def text(value: Any, field: str, where: str, fix: str) -> long_texts.Text:
    """The text in a field of one line's value; `meta.title` looks inside `meta`.

    A field of exactly this name comes first. Raises `DataError`, which ends with `fix`.
    """
    if not isinstance(value, dict):
        raise errors.DataError(
            f"{where}: {_kind(value)}, not an object; write one object a line."
        )
    inside = _inside(value, field)
    if inside is _MISSING:
        known = ", ".join(shown(name) for name in _text_fields(value)) or "none"
        if len(known) > _MAX_NAMED:
            known = known[:_MAX_NAMED] + ".."
        raise errors.DataError(
            f"{where}: no text in field {field!r} (found: {known}); {fix}."
        )
    if isinstance(inside, long_texts.LongText):
        if not inside.is_text:
            raise errors.DataError(_LONE.format(where))
        return inside
    if not isinstance(inside, str):
        raise errors.DataError(
            f"{where}: no text in field {field!r} (it holds {_kind(inside)}); leave "
            f"such lines out, or {fix}."
        )
    try:
        inside.encode("utf-8")
    except UnicodeEncodeError:
        raise errors.DataError(_LONE.format(where)) from None
    return inside


def is_other_json(path: blocks.File, field: str) -> bool:
    """Whether a .json file is settings or a table, such as package.json, not JSON lines.

    It is if its first line is not one whole object, or is all there is and lacks the
    text. A first line that breaks off behind the field's name is a damaged shard.
    """
    lines = (line for line in blocks.lines(path) if line.strip())
    try:
        first, is_alone = next(lines, b""), next(lines, None) is None
        if not first:
            return False
        value = _parsed(first, "")
    except _BadLineError:
        return json.dumps(field.split(".")[0]).encode() not in first
    except errors.DataError:
        return False  # a damaged file; reading it says how
    if not isinstance(value, dict):
        return True
    return is_alone and _inside(value, field) is _MISSING


def _parsed(line: bytes, where: str, file: IO[bytes] | None = None) -> Any:
    try:
        if file:
            return long_texts.value(long_texts.decoded(file))
        return json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise _BadLineError(f"{where}: not UTF-8; convert the file.") from error
    except RecursionError as error:
        raise _BadLineError(f"{where}: JSON that is nested too deep.") from error
    except ValueError as error:
        reason = getattr(error, "msg", error)
        raise _BadLineError(f"{where}: not a JSON line ({reason}).") from error


def _inside(value: dict, field: str) -> Any:
    if field in value:
        return value[field]
    inside: Any = value
    for name in field.split("."):
        if not isinstance(inside, dict) or name not in inside:
            return _MISSING
        inside = inside[name]
    return inside


def _text_fields(value: dict) -> list[str]:
    """Names of what is in an object, those inside of its objects too."""
    names = []
    for name, inner in value.items():
        deeper = isinstance(inner, dict) and inner
        names += [f"{name}.{key}" for key in inner] if deeper else [name]
    return names


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "text" if isinstance(value, str) else "a number")
