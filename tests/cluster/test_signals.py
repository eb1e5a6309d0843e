"""Signals that ask a run to stop."""

import os
import signal

import pytest

from memoryformer.cluster import signals

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("number", HEARD, ids=lambda n: n.name)
def test_a_signal_is_heard_once(number):
    """A closed terminal (SIGHUP) asks as a launcher does; what was there before comes back.

    Mutations: SIGHUP left out; no `signal.signal` in `__exit__`.
    """
    assert number in signals.SIGNALS  # or it would end these tests
    before = signal.signal(number, signal.default_int_handler)  # of tests under nohup
    try:
        with signals.StopRequest() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop and stop.name == number.name
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_nohup_is_respected():
    """A signal that is ignored already stays so. Mutation: every signal heard."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)
