"""Start one run in several processes: a roll call, then `jax.distributed`.

jax aborts the process with a page of C++ when a peer does not come. Here process 0 listens
on the coordinator's address first, and counts: everyone learns who is missing, in a line.
The same connections then tell who is lost during the run (`lifeline`). Nothing is listened
to where there is one process. Start at `start`.
"""

import contextlib
import os
import socket
import time

import jax

from memoryformer.cluster import launchers
from memoryformer.cluster.lifeline import Lifeline, Peer
from memoryformer.errors import ConfigError, HangError

_LONGEST = 1_000_000  # seconds, of what a socket takes for a time limit
_READY, _REFUSED = "all are here", "not all are here: "


def start(
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    timeout: float = 600.0,
) -> Lifeline:
    """Join the other processes of the run; at once where there are none.

    Without arguments SLURM's variables are used, if `srun` started more than one task, or
    those of a TPU pod on GKE. `coordinator` is host:port of process 0, or 'auto' for what
    jax itself finds out (TPU VMs, Open MPI, Kubernetes), without a roll call and lifeline.
    Raises `ConfigError` for half a description and `HangError` if not all have come after
    `timeout` seconds. Use what it returns as a context manager around the run.
    """
    if not 0 < timeout <= _LONGEST:
        raise ConfigError(
            f"--init_timeout={timeout}: must be above 0 and at most {_LONGEST} seconds."
        )
    flags_set = (bool(coordinator), num_processes > 0, process_id >= 0)
    if coordinator == "auto" and not any(flags_set[1:]):
        _let_jax_find_out(timeout)
        return Lifeline()
    if not any(flags_set):
        place = launchers.from_slurm(os.environ) or launchers.from_tpu_pod(os.environ)
        if place is None:
            return Lifeline()
        coordinator, num_processes, process_id = place
    elif not all(flags_set):
        raise ConfigError(
            "--coordinator, --num_processes and --process_id go together: give all three, "
            "or none (one process, SLURM, a TPU pod on GKE), or --coordinator=auto."
        )
    _check_address(coordinator)
    if process_id >= num_processes:
        raise ConfigError(
            f"--process_id={process_id}: must be below --num_processes={num_processes}."
        )
    if num_processes == 1:
        return Lifeline()
    deadline = time.monotonic() + timeout
    if process_id == 0:
        peers = _RollCall(coordinator, num_processes, timeout).peers(deadline)
    else:
        peers = _answer(coordinator, num_processes, process_id, deadline, timeout)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        local_device_ids=launchers.own_devices(os.environ),
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(deadline - time.monotonic()), 30),
    )
    return Lifeline(process_id, peers)


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    try:
        host.encode("idna")  # as it will be, to ask for its address
        valid = bool(host) and port.isascii() and port.isdecimal() and "\0" not in host
        valid = valid and 0 < int(port) < 65536
    except (UnicodeError, ValueError):
        valid = False
    if not valid:
        raise ConfigError(f"--coordinator={coordinator!r}: expected HOST:PORT.")


def _let_jax_find_out(timeout: float) -> None:
    """Let jax find the other processes."""
    try:
        jax.distributed.initialize(initialization_timeout=int(timeout))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--coordinator=auto: jax found no cluster that it knows ({reason}); give "
            "--coordinator=HOST:PORT, --num_processes and --process_id."
        ) from error


class _RollCall:
    """Process 0: wait for a line from every other process, then answer all of them."""

    def __init__(self, coordinator: str, num_processes: int, timeout: float):
        self._coordinator = coordinator
        self._num_processes = num_processes
        self._timeout = timeout
        self._present: dict[int, tuple[socket.socket, str]] = {}  # and on which host
        self._callers: list[socket.socket] = []  # who should not have come, too

    def peers(self, deadline: float) -> dict[int, Peer]:
        """Return a connection to every other process; raise where some are missing."""
        problem = ""
        with contextlib.closing(self._listen()) as listener:
            while not problem and len(self._present) + 1 < self._num_processes:
                if (left := deadline - time.monotonic()) <= 0:
                    problem = self._missing()
                    break
                listener.settimeout(left)
                with (
                    contextlib.suppress(OSError, ValueError),  # a stranger; time is up
                    contextlib.ExitStack() as stack,
                ):
                    connection = stack.enter_context(listener.accept()[0])
                    problem = self._take(connection)
                    stack.pop_all()
        verdict = _REFUSED + problem if problem else _READY
        for connection in self._callers:
            with contextlib.suppress(OSError):  # it has gone: the lifeline will say so
                connection.sendall(f"{verdict}\n".encode())
            if problem:
                connection.close()
        if problem:
            raise HangError(problem)
        return {i: Peer(*present) for i, present in sorted(self._present.items())}

    def _listen(self) -> socket.socket:
        listener = socket.socket()
        # Also for those accepted, so that jax may listen here while they stay open.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(self._coordinator.rpartition(":")[2])))
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"--coordinator={self._coordinator}: process 0 cannot listen there: "
                f"{error}."
            ) from error
        listener.listen(min(self._num_processes, socket.SOMAXCONN))
        return listener

    def _take(self, connection: socket.socket) -> str:
        """Note who has come; return what is wrong with that, or ''."""
        connection.settimeout(5)
        *numbers, host = _line(connection).split()
        index, count = map(int, numbers)
        self._callers.append(connection)
        if count != self._num_processes:
            return (
                f"coordinator {self._coordinator}: process {index} ({host}) was started with "
                f"--num_processes={count}, process 0 with {self._num_processes}."
            )
        before = self._present.get(index)
        if before and not _has_gone(before[0]):
            return (
                f"coordinator {self._coordinator}: two processes (on {before[1]} "
                f"and {host}) were started with --process_id={index}."
            )
        self._present[index] = (connection, host)
        return ""

    def _missing(self) -> str:
        missing = sorted(set(range(1, self._num_processes)) - self._present.keys())
        return (
            f"coordinator {self._coordinator}: {len(self._present) + 1} of "
            f"{self._num_processes} processes came within {self._timeout:g} s, missing: "
            f"{', '.join(map(str, missing))}; start them, or raise --init_timeout."
        )


def _line(connection: socket.socket) -> str:
    # Without a buffer: what follows the line is the lifeline's.
    with connection.makefile("rb", buffering=0) as stream:
        return stream.readline().decode(errors="replace").strip()


def _has_gone(connection: socket.socket) -> bool:
    """Whether a process that came was started anew since."""
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(5)


def _answer(
    coordinator: str,
    num_processes: int,
    process_id: int,
    deadline: float,
    timeout: float,
) -> dict[int, Peer]:
    """Any other process: say who it is, and wait for the verdict of process 0."""
    host, _, port = coordinator.rpartition(":")
    introduction = f"{process_id} {num_processes} {socket.gethostname()}\n".encode()
    while (left := deadline - time.monotonic()) > 0:
        verdict = ""
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            address = host, int(port)  # process 0 may not be there yet
            connection = socket.create_connection(address, timeout=left)
            stack.enter_context(connection)
            connection.sendall(introduction)
            connection.settimeout(left + 10)
            verdict = _line(connection)
            if verdict == _READY:
                stack.pop_all()
                return {0: Peer(connection, host)}
        if verdict.startswith(_REFUSED):
            raise HangError(verdict.removeprefix(_REFUSED))
        if verdict:
            raise ConfigError(
                f"--coordinator={coordinator}: another program answers there "
                f"({verdict[:40]!r}); is the port right, and is it free on that host?"
            )
        time.sleep(min(0.2, max(left, 0)))
    raise HangError(
        f"coordinator {coordinator}: no answer within {timeout:g} s, so process "
        f"{process_id} of {num_processes} is alone; start process 0 there, or raise "
        "--init_timeout."
    )
