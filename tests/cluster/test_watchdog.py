"""The watchdog's rule, on a clock of our own; that it ends a process is in the promises."""

import threading

import pytest

from memoryformer.cluster import watchdog


@pytest.fixture
def world(monkeypatch):
    """A watchdog that is asked by hand: its clock, and what it has given up on."""
    seconds, given_up = [100.0], []
    monkeypatch.setattr(
        watchdog.Watchdog, "_give_up", lambda self, *what: given_up.append(what)
    )
    limits = {"step": 5.0, "evaluation": 60.0, "checkpoint": 0.0}
    return watchdog.Watchdog(limits, lambda: seconds[0]), seconds, given_up


def test_each_phase_has_its_own_clock(world):
    """A phase is told once it outlasts its limit; entering starts the clock again.

    Mutations tried: `enter` keeps the time of the phase before; one limit for all; `>=`.
    """
    watch, seconds, given_up = world
    watch.look()  # before anything is entered
    for step in range(20):
        watch.enter("step", step)
        seconds[0] += 4
        watch.look()
    for phase, longest in (("evaluation", 60), ("checkpoint", 1e6), ("unknown", 1e6)):
        watch.enter(phase, 20)
        seconds[0] += longest
        watch.look()
    assert not given_up
    watch.enter("step", 21)
    seconds[0] += 5
    watch.look()
    assert not given_up
    seconds[0] += 0.5
    watch.look()
    assert given_up == [("step", 21, 5.5)]


def test_the_thread_looks(monkeypatch):
    """It asks by itself, and ends with the block. Mutation: the thread not started."""
    looked = threading.Event()
    monkeypatch.setattr(watchdog.Watchdog, "look", lambda self: looked.set())
    before = threading.active_count()
    with watchdog.Watchdog({"step": 0.01}):
        assert looked.wait(60)
    assert threading.active_count() == before


def test_no_limits_no_thread():
    """Mutation: start the thread always; its pause is then undefined."""
    before = threading.active_count()
    with watchdog.Watchdog({"step": 0.0}) as watch:
        watch.enter("step", 1)
        assert threading.active_count() == before
