"""Stopping politely: SIGTERM, SIGINT and SIGHUP ask, a second one insists.

A launcher that takes a machine away sends SIGTERM and waits a while. `StopRequest` only sets
a flag; the training loop looks at it between steps (and evaluation between batches), saves
and exits. What Python runs in C, such as a compilation, ends first.
"""

import os
import signal
import sys
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A context manager inside which the first signal sets `name`, the second one exits."""

    def __init__(self):
        self.name = ""  # of the signal received

    def __bool__(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> "StopRequest":
        heard = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # nohup
        self._previous = {s: signal.signal(s, self._on_signal) for s in heard}
        return self

    def __exit__(self, *unused_exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, unused_frame: Any) -> None:
        if self:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        print(
            f"\n{self.name}: stopping after this step; send it again to stop at once.",
            file=sys.stderr,
            flush=True,
        )
