"""The watchdog's clock; that it ends a process is in test_promises."""

import threading
import time

from memoryformer import watchdog


def test_each_phase_has_its_own_clock(monkeypatch):
    """A phase is told once it outlasts its limit; entering starts the clock again.

    Mutation: `enter` keeps the time of the phase before; or one limit for all.
    """
    told = []
    monkeypatch.setattr(
        watchdog.Watchdog, "_give_up", lambda self, *what: told.append(what[:2])
    )
    with watchdog.Watchdog({"step": 0.8, "evaluation": 60, "checkpoint": 0}) as watch:
        for step in range(20):
            watch.enter("step", step)
            time.sleep(0.06)
        for phase in ("evaluation", "checkpoint"):
            watch.enter(phase, 20)
            time.sleep(1)
        assert not told
        watch.enter("step", 21)
        time.sleep(1.2)
    assert set(told) == {("step", 21)}


def test_no_limits_no_thread():
    """Mutation: start the thread always; its pause is then undefined."""
    before = threading.active_count()
    with watchdog.Watchdog({"step": 0.0}) as watch:
        watch.enter("step", 1)
        assert threading.active_count() == before
