"""Standard output and error of work that must not end because nobody reads them.

`train.py ... | head`, a log reader that dies, a terminal that is gone: what is printed is
lost then, and the run goes on; metrics.jsonl is the truth. Start at `unbroken`.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Let nothing inside fail on printing: where that cannot be, it prints nowhere."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Unbroken, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def silence(stream: TextIO) -> None:
    """Send what is still to be printed nowhere: Python would fail on it at its exit."""
    with contextlib.suppress(OSError, ValueError):  # no file, or a closed one
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Unbroken:
    """A stream, but for the errors of writing to it; None, a closed one, is silent."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, name: str, *arguments: str) -> None:
        try:
            if self._stream is not None:
                getattr(self._stream, name)(*arguments)
        except (OSError, ValueError):  # ValueError: closed, or not of its encoding
            silence(self._stream)
