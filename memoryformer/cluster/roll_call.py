"""Start one run in several processes: a roll call, then `jax.distributed`.

jax aborts the process with a page of C++ when a peer does not come. Here process 0 listens
on the coordinator's address first, and counts: everyone learns who is missing, in a line.
The same connections then tell who is lost during the run (`lifeline`). Nothing is listened
to where there is one process. Start at `start`.
"""

import contextlib
import os
import re
import socket
import time
from collections.abc import Mapping

import jax

from memoryformer.cluster.lifeline import Lifeline, Peer
from memoryformer.errors import ConfigError, HangError

_LONGEST = 1_000_000  # seconds, of what a socket takes for a time limit
_READY, _REFUSED = "all are here", "not all are here: "
_TPU_PORT = 8482  # jax's own choice
_INTERACTIVE = str(0xFFFFFFFA)  # SLURM's id of the step that is the shell of `salloc`


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
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if coordinator == "auto" and not any(given[1:]):
        _detect(timeout)
        return Lifeline()
    if not any(given):
        found = from_slurm(os.environ) or from_tpu_pod(os.environ)
        if found is None:
            return Lifeline()
        coordinator, num_processes, process_id = found
    elif not all(given):
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
        local_device_ids=_own_devices(os.environ),
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(deadline - time.monotonic()), 30),
    )
    return Lifeline(process_id, peers)


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    try:
        host.encode("idna")  # as it will be, to ask for its address
        right = bool(host) and port.isascii() and port.isdecimal() and "\0" not in host
        right = right and 0 < int(port) < 65536
    except (UnicodeError, ValueError):
        right = False
    if not right:
        raise ConfigError(f"--coordinator={coordinator!r}: expected HOST:PORT.")


def from_slurm(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Return (coordinator, number of processes, process id) of a SLURM step, or None.

    The port depends on the job's id alone, as jax does it, so that all agree on it. Raises
    `ConfigError` for variables that do not fit together.
    """
    if not environment.get("SLURM_STEP_NODELIST"):
        return None  # not started by srun
    # The step's own number: in the shell of `salloc` SLURM_NTASKS is that of steps to come.
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", default=0)
    tasks = tasks or _number(environment, "SLURM_NTASKS", default=1)
    if tasks < 2 or environment.get("SLURM_STEP_ID") == _INTERACTIVE:
        return None
    # 'gpu[003-007,9],cpu1' -> 'gpu003'
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.match(r"([^,\[\]]+)(?:\[([^,\-\]]+))?", nodes)
    if first is None:
        raise _unfit("SLURM_STEP_NODELIST", nodes, "is no list of hosts")
    host = first[1] + (first[2] or "")
    port = _number(environment, "SLURM_JOB_ID") % 4096 + 61440
    port = _number(environment, "JAX_COORDINATOR_PORT", default=port)
    process_id = _number(environment, "SLURM_PROCID")
    if process_id >= tasks:
        raise _unfit("SLURM_PROCID", str(process_id), f"of a step of {tasks} tasks")
    return f"{host}:{port}", tasks, process_id


def from_tpu_pod(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Return the same of a TPU pod, or of several slices of TPUs, on GKE; or None."""
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    listed = next((environment[n] for n in names if environment.get(n)), "")
    hosts = [host.partition(":")[0] for host in listed.split(",")]
    slices = _number(environment, "MEGASCALE_NUM_SLICES", default=1)
    if len(hosts) * slices < 2 or not environment.get("TPU_WORKER_ID"):
        return None
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    port = _number(environment, "JAX_COORDINATOR_PORT", default=_TPU_PORT)
    before = _number(environment, "MEGASCALE_SLICE_ID", default=0) * len(hosts)
    process_id = before + _number(environment, "TPU_WORKER_ID")
    return f"{first.partition(':')[0]}:{port}", len(hosts) * slices, process_id


def _own_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Return the GPU of this SLURM task if a node has several; None: all that it sees."""
    tasks = re.findall(
        r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    )
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    narrowed = visible and "," not in visible  # srun --gpus-per-task=1 has done it
    if narrowed or max(map(int, tasks), default=1) == 1:
        return None
    return [_number(environment, "SLURM_LOCALID")]


def _number(
    environment: Mapping[str, str], name: str, default: int | None = None
) -> int:
    """Return a variable's whole number; an empty one counts as not set."""
    text = environment.get(name, "")
    if text == "" and default is not None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise _unfit(name, text, "is no whole number" if text else "is not set")
    return int(text)


def _unfit(name: str, text: str, problem: str) -> ConfigError:
    return ConfigError(
        f"{name}={text!r}: {problem}, so that the processes of this run cannot be found; "
        "start it with srun, unset the launcher's variables for a lone process, or give "
        "--coordinator, --num_processes and --process_id."
    )


def _detect(timeout: float) -> None:
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
        self._came: dict[int, tuple[socket.socket, str]] = {}
        self._callers: list[
            socket.socket
        ] = []  # also of those who should not have come

    def peers(self, deadline: float) -> dict[int, Peer]:
        """Return a connection to every other process; raise where some are missing."""
        problem = ""
        with contextlib.closing(self._listen()) as listener:
            while not problem and len(self._came) + 1 < self._num_processes:
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
        return {who: Peer(*found) for who, found in sorted(self._came.items())}

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
        who, count, host = _line(connection).split()
        who, count = int(who), int(count)
        self._callers.append(connection)
        if count != self._num_processes:
            return (
                f"coordinator {self._coordinator}: process {who} ({host}) was started with "
                f"--num_processes={count}, process 0 with {self._num_processes}."
            )
        before = self._came.get(who)
        if before and not _has_gone(before[0]):
            return (
                f"coordinator {self._coordinator}: two processes (on {before[1]} "
                f"and {host}) were started with --process_id={who}."
            )
        self._came[who] = (connection, host)
        return ""

    def _missing(self) -> str:
        missing = sorted(set(range(1, self._num_processes)) - self._came.keys())
        return (
            f"coordinator {self._coordinator}: {len(self._came) + 1} of "
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


def _answer(coordinator, num_processes, process_id, deadline, timeout):
    """Any other process: say who it is, and wait for what process 0 has to tell."""
    host, _, port = coordinator.rpartition(":")
    me = f"{process_id} {num_processes} {socket.gethostname()}\n".encode()
    while (left := deadline - time.monotonic()) > 0:
        verdict = ""
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            address = host, int(port)  # process 0 may not be there yet
            connection = socket.create_connection(address, timeout=left)
            stack.enter_context(connection)
            connection.sendall(me)
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
