"""Where results go: JSON on standard output and in a file, the parts of it as they come.

Start at `Output`.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from memoryformer.errors import ConfigError
from memoryformer.files import atomic
from memoryformer.runs import directory


class Output:
    """Standard output, and the file `path` unless it is ''.

    Raises `ConfigError` where no file can be written, or one of `files` or of the runs and
    exports `folders` would be written over, before anything is computed.
    """

    def __init__(
        self,
        path: str,
        files: Iterable[str | os.PathLike] = (),
        folders: Iterable[str | os.PathLike] = (),
    ):
        self._path = pathlib.Path(path) if path else None
        self._unfinished: dict[str, Any] = {}
        if self._path is None:
            return
        parents = self._path.absolute().parents
        folder = next(parent for parent in parents if parent.exists())
        usable = folder.is_dir() and os.access(folder, os.W_OK)
        if self._path.is_dir() or not usable:
            raise ConfigError(f"--output={path}: no file can be written there.")
        directory.check_output(path, files, folders)

    def keep(self, results: dict[str, Any]) -> None:
        """Write what the harness returned so far; nothing was made of it yet."""
        self._unfinished = {"finished": False, "harness": results}
        self._write(self._unfinished)

    @contextlib.contextmanager
    def unfinished(self) -> Iterator[None]:
        """Where this ends early, print what was kept, unless a file has it."""
        try:
            yield
        except BaseException:  # an interrupt too: what was scored took its time
            if self._unfinished and self._path is None:
                print(json.dumps(self._unfinished, indent=2), flush=True)
            raise

    def give(self, result: dict[str, Any]) -> None:
        """Print the whole result and write it; neither is lost with the other."""
        try:
            print(json.dumps(result, indent=2), flush=True)
        finally:
            self._write(result)

    def _write(self, result: dict[str, Any]) -> None:
        if self._path is None:
            return
        if self._path.exists() and not self._path.is_file():  # such as a pipe
            text = json.dumps(result, indent=2) + "\n"
            self._path.write_text(text, encoding="utf-8")
        else:
            atomic.write_json(self._path, result, indent=2)
