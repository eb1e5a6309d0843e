"""A thread that ends a process which hangs, after writing down where it hangs.

A job that waits for a lost peer or a dead disk costs as much as one that computes, and no
one is told. The loop names the phase that it enters; a phase that outlasts its limit gets
the stacks of all threads on standard error and exit code 43, which launchers start again.
The exit takes no lock and runs no handler: whatever hangs could hold it up.

Start at `Watchdog`.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from memoryformer.errors import HangError

TIMEOUTS = {  # seconds at train.timeout_scale=1
    "first_step": 7200.0,  # with its compilation
    "step": 1800.0,
    "evaluation": 3600.0,  # of a batch; the first compiles
    "checkpoint": 7200.0,
}


class Watchdog:
    """A context manager: `enter(phase)` starts that phase's clock.

    `limits` are seconds by phase; 0 or a phase without a limit is not watched. `clock` tells
    seconds, from any start.
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        clock: Callable[[], float] = lambda: time.monotonic(),  # which tests move
    ):
        self._clock = clock
        self._limits = {phase: limit for phase, limit in limits.items() if limit}
        self._now: tuple[str, int, float] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, name="watchdog", daemon=True
        )

    def enter(self, phase: str, step: int = 0) -> None:
        """Leave the phase before and start this one. Costs less than a microsecond."""
        self._now = (phase, step, self._clock())

    def again(self) -> None:
        """Start the clock of the present phase anew."""
        if self._now is not None:
            self.enter(*self._now[:2])

    def __enter__(self) -> "Watchdog":
        if self._limits:
            self._thread.start()
        return self

    def __exit__(self, *unused_exception: Any) -> None:
        self._closed.set()
        if self._limits:
            self._thread.join()

    def _watch(self) -> None:
        pause = min(1.0, min(self._limits.values()) / 10)
        while not self._closed.wait(pause):
            self.look()

    def look(self) -> None:
        """End the process if the phase has outlasted its limit."""
        if self._now is None:
            return
        phase, step, since = self._now
        seconds = self._clock() - since
        if seconds > self._limits.get(phase, float("inf")):
            self._give_up(phase, step, seconds)

    def _give_up(self, phase: str, step: int, seconds: float) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads
            stream = sys.__stderr__ or sys.stderr
            faulthandler.dump_traceback(file=stream, all_threads=True)
            print(
                f"error: step {step}: {phase.replace('_', ' ')} has taken {seconds:.0f} s, "
                f"of {self._limits[phase]:g} s allowed; the stacks are above, run the same "
                "command to go on from the last checkpoint, or raise train.timeout_scale.",
                file=sys.__stderr__,
                flush=True,
            )
        os._exit(HangError.exit_code)
