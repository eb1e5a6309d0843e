"""One writer at a time below a URL: a marker that says who writes, put again and again.

    writers/5f0c2a1b    {"pid": 4711, "host": "node17", "space": .., "beat": 12}

A store has no lock that ends with a process. Whoever wants to write puts a marker of its own,
then lists: who sees no other holds the lease, so that of two that come together one at least
gives way. The holder puts its marker again every `BEAT` seconds. One that does not change for
`LEASE` seconds is of a process that is gone, and whoever waits removes it; no clock but the
waiting one's is asked. A process of this machine that has ended is known at once.

What this cannot promise: a holder that was cut off for half a lease writes no more, but a request
of its that hung in the network for as long may arrive after another has taken over. Start at
`hold`.
"""

import contextlib
import json
import os
import pathlib
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from memoryformer.errors import StorageError
from memoryformer.files.lock import HeldError
from memoryformer.files.stores import Store

FOLDER = "writers"
BEAT = 10.0  # seconds between two markers of a holder
LEASE = 60.0  # seconds without one after which it is gone


@contextlib.contextmanager
def hold(
    store: Store,
    patience: float = 0.0,
    waiting: Callable[[str], None] = lambda holder: None,
) -> Iterator["Lease"]:
    """Hold the lease of a store; `waiting(holder)` is called once for each other marker.

    Raises `HeldError` once another's marker was seen to change and `patience` seconds are
    over, `StorageError` if the store cannot be used.
    """
    lease = Lease(store)
    beating = threading.Thread(target=lease.keep, name="lease", daemon=True)
    try:
        _acquire(lease, patience, waiting)
        beating.start()
        yield lease
    finally:
        lease.ended.set()
        if beating.ident:
            beating.join()
        with contextlib.suppress(StorageError):  # it runs out by itself
            store.remove(lease.name)


class Lease:
    """What a process holds, or tries to."""

    def __init__(self, store: Store):
        self.store = store
        self.name = f"{FOLDER}/{secrets.token_hex(4)}"
        self.ended = threading.Event()
        self._turn = threading.Lock()
        self._beats = 0
        self._last = -LEASE  # when the last marker was put
        self._lost = False

    def put(self) -> None:
        """Put the marker again."""
        facts = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "space": _space(),
            "beat": self._beats,
        }
        begun = _now()
        self.store.write(self.name, json.dumps(facts).encode())
        self._beats, self._last = self._beats + 1, begun

    def others(self) -> dict[str, bytes]:
        """Return the markers of other processes; one that goes while it is read is no more."""
        names = [name for name in self.store.list(FOLDER) if name != self.name]
        read = {name: self.store.read(name) for name in names}
        return {name: content for name, content in read.items() if content is not None}

    def keep(self) -> None:
        """In a thread: put the marker until the lease has ended, or is lost."""
        while not self._lost and not self.ended.wait(BEAT):
            with contextlib.suppress(StorageError):  # the next may pass
                self._go_on()

    def check(self) -> None:
        """Raise `StorageError` if another process may hold the lease by now."""
        if self._is_late():
            self._go_on()
        if self._lost:
            raise StorageError(
                f"{self.store.url}: this run was cut off from the store, and another may "
                "have taken its place; nothing more is written there."
            )

    def _go_on(self) -> None:
        """Put the marker again, unless it was removed; late, nobody else may have come."""
        with self._turn:
            late = self._is_late()
            self._lost = self._lost or self.store.read(self.name) is None
            if not self._lost:
                self.put()
                self._lost = late and bool(self.others())

    def _is_late(self) -> bool:
        return _now() - self._last > LEASE / 2


def _acquire(lease: Lease, patience: float, waiting: Callable[[str], None]) -> None:
    deadline = _now() + patience
    seen: dict[str, tuple[bytes, float]] = {}  # marker -> content, since when
    while True:
        others = lease.others()
        if not others:
            lease.put()
            if not lease.others():
                return
            lease.store.remove(lease.name)  # two came together
            time.sleep(random.uniform(0, BEAT / 10))
            continue
        for name, content in others.items():
            if name not in seen:
                waiting(_holder(content))
            if _has_ended(content):
                lease.store.remove(name)
            elif name not in seen or content != seen[name][0]:
                if name in seen and _now() >= deadline:  # it lives
                    raise HeldError(_holder(content))
                seen[name] = content, _now()
            elif _now() - seen[name][1] > LEASE:
                lease.store.remove(name)
        time.sleep(BEAT / 10)


def _facts(content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except ValueError:
        facts = None
    return facts if isinstance(facts, dict) else {}


def _holder(content: bytes) -> str:
    facts = _facts(content)
    return f"{facts.get('pid', 'unknown')} on {facts.get('host', 'unknown')}"


def _has_ended(content: bytes) -> bool:
    """Whether the process is one of this machine that is no more."""
    facts = _facts(content)
    pid = facts.get("pid")
    if not _space() or facts.get("space") != _space() or type(pid) is not int:
        return False
    return not pathlib.Path("/proc", str(pid)).exists()


def _space() -> str:
    """What makes a process's number mean one process: this boot, and its set of numbers."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _now() -> float:
    """Seconds that go on while the machine sleeps, where it can say."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
