"""A line between the processes of one run: none goes on, or waits, without the others.

When a process is lost JAX raises something, waits for 100 s or aborts with a page of C++,
depending on the backend and on who was lost. Here every process keeps a connection to
process 0 (those of the roll call in `roll_call`). Who ends says so, with the exit code. A
connection that closes without that word is a lost process: all others end at once, with one
line and exit code 43 (start again). After an error in one process all end with its code.

Start at `Lifeline`.
"""

import atexit
import contextlib
import ctypes
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from memoryformer import errors

ENDED_WELL = (0, errors.Preempted.exit_code)
LOST = -1  # in the place of an exit code
PATIENCE = 10.0  # seconds for news that explain a failure of this process
GRACE = (
    5.0  # seconds for this process to tell the same error as another in its own words
)

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


class Peer:
    """The connection to another process, and the name of its machine."""

    def __init__(self, connection: socket.socket, host: str):
        self.host = host
        self._connection = connection
        self._received = b""
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that vanishes is noticed after 10 + 6 * 10 seconds.
        for name, value in (("IDLE", 10), ("INTVL", 10), ("CNT", 6)):
            option = getattr(socket, f"TCP_KEEP{name}", None)  # Linux
            if option is not None:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def fileno(self) -> int:
        """Make this something that a selector takes."""
        return self._connection.fileno()

    def tell(self, process_id: int, code: int, host: str) -> bool:
        """Send that a process has ended; False if nobody is there to hear it."""
        try:
            self._connection.sendall(f"{process_id} {code} {host}\n".encode())
        except OSError:
            return False
        return True

    def news(self) -> list[tuple[int, int, str]] | None:
        """Wait for what it tells: (process id, code, host) each; None: it is gone."""
        try:
            received = self._connection.recv(4096)
        except OSError:
            return None
        if not received:
            return None
        *lines, self._received = (self._received + received).split(b"\n")
        fields = [line.decode().split(" ") for line in lines]
        return [(int(who), int(code), host) for who, code, host in fields]


class Lifeline:
    """A context manager around a run. `peers` by process id: all others, or process 0."""

    def __init__(self, process_id: int = 0, peers: Mapping[int, Peer] | None = None):
        self._process_id = process_id
        self._peers = dict(peers or {})
        self._over = threading.Event()
        self._code = 0

    def __enter__(self) -> "Lifeline":
        if self._peers:
            threading.Thread(target=self._listen, name="lifeline", daemon=True).start()
            # Python's own handlers run after the abort. Never undone: it may come late.
            self._handler = _Handler(self._on_abort)
            ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)
            _kept.append(self)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._peers:
            return
        code = _exit_code(error)
        if code in (1, errors.StorageError.exit_code):
            # Such errors may be what a lost peer looks like from here: if it is, the
            # other thread ends the process meanwhile.
            time.sleep(PATIENCE)
        self._code = code
        self._over.set()
        for peer in self._peers.values():
            peer.tell(self._process_id, code, socket.gethostname())
        if code not in ENDED_WELL:  # jax would wait at its exit for all the others
            atexit.register(_leave, code)

    def _listen(self) -> None:
        ended = set()
        with selectors.DefaultSelector() as selector:
            for who, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, who)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = self._peers[key.data]
                    news = peer.news()
                    if news is None:
                        selector.unregister(peer)
                        if key.data not in ended:
                            self._on_end(key.data, LOST, peer.host)
                        continue
                    for who, code, host in news:
                        ended.add(who)
                        if code not in ENDED_WELL:
                            self._on_end(who, code, host)

    def _on_end(self, who: int, code: int, host: str) -> None:
        """Process `who` was lost or has failed: so must this one."""
        for other, peer in self._peers.items():
            if other != who and self._process_id == 0:
                peer.tell(who, code, host)
        if code != LOST and self._over.wait(GRACE):
            return
        if self._over.is_set():
            _leave(self._code)
        place = f"process {who} ({host})"
        line = (
            f"{place} was lost: it, its machine or its network has died; run the same "
        )
        line += "command to go on from the last checkpoint."
        if code != LOST:
            line = f"{place} ended with exit code {code}: what it printed says why."
        with contextlib.suppress(OSError, ValueError):  # nobody reads
            print(f"error: {line}", file=sys.__stderr__, flush=True)
        _leave(errors.HangError.exit_code if code == LOST else code)

    def _on_abort(self, unused_signal: int) -> None:
        """Hold C++'s abort until the other thread has ended the process in its way."""
        if self._over.is_set():
            _leave(self._code)
        time.sleep(PATIENCE)


_kept: list[Lifeline] = []  # for their handlers, which C holds


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    return getattr(error, "exit_code", 1)


def _leave(code: int) -> None:
    """End the process now: no handler, no lock, no waiting for the others."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()
    os._exit(code)
