"""Paths as users write them: checked before anything is made, and `~` is the home folder.

    flag or field -> `local`      any file or folder of this machine
    --workdir     -> `workdir`    a folder that a checkpoint can be written to and read from

Start at `local`; `cli.define_path_flag` is the flag of a command that holds a path.
"""

import os
import pathlib
import re

from memoryformer.errors import ConfigError

_STORE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\u0085\u2028\u2029]")
# Orbax looks for the files of a checkpoint by a pattern that begins with the path itself,
# and TensorStore takes a backslash for a slash: saved there, nothing is found again.
PATTERN = re.compile(r"[*?\[\\]")


def local(path: str | os.PathLike, name: str) -> pathlib.Path:
    """Return a path of this machine, `~` expanded; `name` is the flag or field it is from.

    Raises `ConfigError` for an empty path, a store such as gs://, an unknown `~user`, and
    characters that are not text (they break lines, or have no UTF-8).
    """
    text = os.fspath(path)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    where = f"{name}={shown(text)}"
    if not text.strip():
        raise ConfigError(f"{where}: an empty path; name a file or folder.")
    if _STORE.match(text.lstrip()):
        raise ConfigError(
            f"{where}: only folders of this machine are read and written; mount the store "
            "(gcsfuse, s3fs, ...) and give the path without its scheme."
        )
    refuse_unprintable(text, where)
    try:
        path = pathlib.Path(text)  # it drops a ./ before a ~
        return path.expanduser() if text.startswith("~") else path
    except RuntimeError as error:
        raise ConfigError(
            f"{where}: has no such home folder; write the path in full."
        ) from error


def workdir(path: str | os.PathLike, name: str = "--workdir") -> pathlib.Path:
    """Return `local(path)` if checkpoints can live there, whatever folder it is seen from.

    Raises `ConfigError` where the absolute path holds one of * ? [ \\, which stand for
    other things where checkpoints are written.
    """
    folder = local(path, name)
    pattern = PATTERN.search(str(folder.absolute()))
    if pattern:
        raise ConfigError(
            f"{name}={shown(os.fspath(path))}: {str(folder.absolute())!r} holds "
            f"{pattern[0]!r}, and what is saved below it could not be read again; name a "
            "path without * ? [ and backslash, or a link to it that has none."
        )
    return folder


def refuse_unprintable(text: str, where: str) -> None:
    """Raise `ConfigError`, which begins with `where`, for characters that are not text."""
    if _UNPRINTABLE.search(text):
        raise ConfigError(
            f"{where}: holds a character that is not text; rename it, or use a link."
        )


def shown(text: str) -> str:
    """Return a path in quotes, on one line whatever it holds."""
    return ascii(text) if _UNPRINTABLE.search(text) else repr(text)
