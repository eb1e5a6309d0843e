"""Standard output and error of work that must not end because nobody reads them.

`train.py ... | head`, a log reader that dies, a terminal that is gone: what is printed is
lost then, and the run goes on; metrics.jsonl is the truth. Start at `unbroken`.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
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
        if self._stream is None:
            return
        try:
            getattr(self._stream, name)(*arguments)
        except (OSError, ValueError):  # ValueError: closed, or not of its encoding
            silence(self._stream)


def progress_line(
    step: int, num_steps: int, figures: Iterable[tuple[str, str]] = ()
) -> str:
    """Return the line of one log interval: the step, then each (label, text).

    `step 1200/106418 (1.1%) loss 3.412 lr 3.0e-3 tok/s 412k wall 26m00s eta 1d12h`
    """
    done = f"{step}/{num_steps} ({100 * step / max(num_steps, 1):.1f}%)"
    return " ".join(f"{label} {text}" for label, text in (("step", done), *figures))


def short_power(x: float) -> str:
    """Two digits and a power of ten: 3.0e-3."""
    mantissa, _, exponent = f"{x:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def short_number(x: float) -> str:
    """Three digits and a unit: 51.5k, 412k, 2.5M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= 0.9995 * size:
            return f"{x / size:#.3g}".rstrip(".") + unit
    return f"{x:.3g}"


def short_time(seconds: float) -> str:
    """Two units: 42s, 3m20s, 2h05m, 1d12h."""
    seconds = max(round(seconds), 0)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


class ProgressPrinter:
    """Print progress lines: one that overwrites itself on a terminal, else one per call.

    `note` prints a line that stays. silent: of several processes all but one.
    """

    def __init__(self, stream: TextIO | None = None, *, silent: bool = False):
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._open = False  # a line without its end is on the terminal
        self._silent = silent

    def update(self, line: str) -> None:
        """Show `line` in the place of the one before."""
        if self._silent:
            return
        if not self._live:
            print(line, file=self._stream, flush=True)
            return
        # One column stays free: a full line would wrap and could not be overwritten.
        width = max(shutil.get_terminal_size().columns - 1, 20)
        self._stream.write(f"\r{line[:width]}\x1b[K")
        self._stream.flush()
        self._open = True

    def note(self, line: str) -> None:
        """Print `line` so that it stays on the screen."""
        if self._silent:
            return
        start = "\r\x1b[K" if self._open else ""
        print(f"{start}{line}", file=self._stream, flush=True)
        self._open = False

    def close(self) -> None:
        """End the line that is on the terminal."""
        if self._open:
            print(file=self._stream, flush=True)
        self._open = False
