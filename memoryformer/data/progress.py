"""One progress line on standard error: done, rate, time left; and where to stop on request."""

import concurrent.futures
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from memoryformer.errors import Preempted
from memoryformer.runs import console

T = TypeVar("T")


class Progress:
    """`preparing stdlib, tokenising: 61% 7.0/11.5 MB 2.3 MB/s eta 2s`.

    On a terminal the line is rewritten in place; elsewhere a new one is printed every
    few seconds, so a log stays readable. `stop` is asked at every `update`, shown or not.
    again: what a stop leaves, and how to go on.
    """

    def __init__(
        self,
        title: str,
        *,
        enabled: bool = True,
        stop: Callable[[], bool] = lambda: False,
        again: str = "nothing of it is kept; run the same command to begin again",
    ):
        self.title = title
        self.enabled = enabled
        self.again = again
        self._stop = stop
        self._stage = ""
        self._terminal = sys.stderr.isatty()
        self._every = 0.2 if self._terminal else 5.0

    def start(self, stage: str, total: float, unit: str) -> None:
        """Begin a stage of `total` units, e.g. ('tokenising', 11.5e6, 'B')."""
        self._stage, self._total, self._unit = stage, total, unit
        self._began = self._shown = time.monotonic()

    def update(self, done: float) -> None:
        """Show the line if it is due. Raises `Preempted` when asked to stop."""
        self.check()
        now = time.monotonic()
        if self.enabled and now - self._shown >= self._every:
            self._shown = now
            self._print(self._line(done, now - self._began))

    def finish(self, done: float) -> None:
        """Show the last line of a stage that took long enough to have had one."""
        seconds = time.monotonic() - self._began
        if self.enabled and (self._terminal or seconds >= 1.0):
            self._print(self._line(done, seconds), end="\n")

    def check(self) -> None:
        """Raise `Preempted` when asked to stop; for work that has no line."""
        if self._stop():
            raise Preempted(f"asked to stop while {self.title}: {self.again}.")

    def during(self, stage: str, work: Callable[[], T]) -> T:
        """Return `work()`, done beside this thread, so that signals are answered.

        Shows for how long, if `stage` has a name. Raises `Preempted` when asked to stop;
        `work` then ends with the process.
        """
        result: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                result.set_result(work())
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        began = shown = time.monotonic()
        while not concurrent.futures.wait([result], timeout=0.1).done:
            self.check()
            now = time.monotonic()
            if self.enabled and stage and now - shown >= self._every:
                shown = now
                self._print(f"{self.title}, {stage}: {console.short_time(now - began)}")
        return result.result()

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, with a `check` before each."""
        for item in items:
            self.check()
            yield item

    def note(self, text: str) -> None:
        """Show one more fact on a line of its own."""
        if self.enabled:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def _line(self, done: float, seconds: float) -> str:
        rate = done / max(seconds, 1e-9)
        left = max(self._total - done, 0) / max(rate, 1e-9)
        total = max(self._total, done, 1)
        mega = self._unit == "B"
        scale, unit = (1e6, "MB") if mega else (1, self._unit)
        digits = 1 if mega else 0
        return (
            f"{self.title}, {self._stage}: {100 * done / total:.0f}% "
            f"{done / scale:.{digits}f}/{total / scale:.{digits}f} {unit} "
            f"{rate / scale:.{digits}f} {unit}/s eta {console.short_time(left)}"
        )

    def _print(self, line: str, end: str = "") -> None:
        text = f"\r{line:<79}{end}" if self._terminal else f"{line}\n"
        print(text, end="", file=sys.stderr, flush=True)
