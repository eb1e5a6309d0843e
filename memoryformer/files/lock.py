"""A lock file: one process at a time holds it, and whoever waits is told which.

    path    the process that holds the lock, or was the last to: "4711 on node17"

The lock belongs to the open file (`flock`), not to its existence: it ends with the process,
however that ends. On NFS the server keeps it. Start at `hold`.
"""

import contextlib
import errno
import math
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator

import filelock

_PAUSE = 0.1  # seconds between two tries
# What file systems say that cannot lock: there, nobody is kept out.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class HeldError(Exception):
    """Another process holds the lock; the message is its name."""


@contextlib.contextmanager
def hold(
    path: str | os.PathLike,
    patience: float = math.inf,
    waiting: Callable[[str], None] = lambda holder: None,
) -> Iterator[bool]:
    """Hold the lock of the file `path`; yield False where the file system has no locks.

    `waiting(holder)` is called after every try in vain. Raises `HeldError` if the lock is
    still held after `patience` seconds, and `OSError` if the file cannot be written.
    """
    deadline = time.monotonic() + patience
    with pathlib.Path(path).open("a+", encoding="utf-8") as file:
        locked = True
        try:
            while not filelock.lock_descriptor(file.fileno(), blocking=False):
                file.seek(0)
                holder = file.read().strip() or "unknown"
                if time.monotonic() >= deadline:
                    raise HeldError(holder)
                waiting(holder)
                time.sleep(_PAUSE)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locked = False
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield locked
