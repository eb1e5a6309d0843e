"""One run in several processes: who speaks, who decides, where all wait."""

import hashlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from memoryformer.errors import ConfigError


def is_chief() -> bool:
    """Whether this is process 0, the one that prints, deletes and writes logs."""
    return jax.process_index() == 0


def from_chief(value: bool) -> bool:
    """Return process 0's value in every process; free where there is only one."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def check_joined(mesh: str) -> None:
    """Raise `ConfigError` where several processes would each train a model of their own."""
    count = jax.process_count()
    if count > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"these devices belong to {count} processes, which have not been joined: start "
            "each of them with --coordinator=auto."
        )
    if count > 1 and mesh == "single":
        raise ConfigError(
            f"mesh='single': one process on one device, and there are {count} processes; "
            "use mesh=data."
        )


def agree(what: str, value: str) -> None:
    """Raise `ConfigError` in every process unless all have the same `value`.

    Processes that differ would compute different programs, or ask for different numbers of
    batches, and wait for each other for ever.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)  # [processes, 32]
    others = np.flatnonzero(np.any(digests != digests[0], axis=1))
    if len(others):
        raise ConfigError(
            f"{what}: process {', '.join(map(str, others))} of {len(digests)} was given "
            "another than process 0; start all with the same command, code and data."
        )


class SharedFlag:
    """A flag that any process may raise and all see at the same question.

    Every process asks equally often. With several, only every tenth question looks at the
    others' flags: it costs a round trip, and waits for the steps dispatched.
    """

    def __init__(self, flag: object):
        self._flag = flag
        self._asked = -1

    def __call__(self) -> bool:
        """Whether the flag is true in any process."""
        if jax.process_count() == 1:
            return bool(self._flag)
        self._asked += 1
        if self._asked % 10:
            return False
        flags = multihost_utils.process_allgather(np.asarray(bool(self._flag)))
        return bool(np.any(flags))


def barrier(name: str) -> None:
    """Wait until every process is here; free where there is only one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def say(line: str) -> None:
    """Print one line on process 0's standard error."""
    if is_chief():
        print(line, file=sys.stderr, flush=True)
