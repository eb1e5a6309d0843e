"""Who is process 0, who came, who was lost; and what is said where that cannot be known.

Processes that come, stop and are killed are in test_promises.
"""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from world import free_port

from memoryformer.cluster import launchers, lifeline, processes
from memoryformer.cluster import roll_call as roll_call_lib
from memoryformer.errors import ConfigError, HangError
from memoryformer.runs import compatibility
from memoryformer.training import experiment

ROOT = pathlib.Path(__file__).parents[2]
SLURM = {"SLURM_JOB_ID": "4100", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
POD = {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu7", "gpu7"),
        ("gpu[003-007,9],cpu1", "gpu003"),
        ("a-b[12,14]", "a-b12"),
        ("n1,n[2-3]", "n1"),
    ],
)
def test_slurm(nodes, first):
    """Mutation: take the whole list for a name; or the port from the process id."""
    found = launchers.from_slurm(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found == (f"{first}:61444", 4, 3)
    own = {"JAX_COORDINATOR_PORT": "77", "SLURM_STEP_NODELIST": nodes}
    assert launchers.from_slurm(SLURM | own) == (f"{first}:77", 4, 3)


@pytest.mark.parametrize(
    "variables, devices",
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, [5]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2"}, [5]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "3"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1"}, [5]),
        ({}, None),
    ],
)
def test_devices_of_a_slurm_task(variables, devices):
    """One GPU each where tasks share a node; all of a node that has one task.

    Mutation: leave it to jax, which gives the one task of a node its first GPU.
    """
    assert launchers.own_devices({"SLURM_LOCALID": "5"} | variables) == devices


@pytest.mark.parametrize(
    "variables, found",
    [
        ({}, ("t-0:8482", 2, 1)),
        ({"JAX_COORDINATOR_PORT": "99"}, ("t-0:99", 2, 1)),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471,c:8471"}, ("a:8482", 3, 1)),
        (
            {
                "MEGASCALE_NUM_SLICES": "4",
                "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_COORDINATOR_ADDRESS": "s-0:8080",
            },
            ("s-0:8482", 8, 5),
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": ""}, None),
    ],
)
def test_tpu_pods(variables, found):
    """Mutation: the worker's number in its slice for the process id."""
    assert launchers.from_tpu_pod(POD | variables) == found


def test_one_task_needs_no_coordinator():
    """Mutation: look at SLURM_JOB_ID alone."""
    assert launchers.from_slurm({}) is None
    assert launchers.from_slurm(SLURM) is None  # in a job, but not under srun
    alone = SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}
    assert launchers.from_slurm(alone) is None
    with roll_call_lib.start(), roll_call_lib.start("localhost:1234", 1, 0):
        assert threading.active_count() == len(
            [t for t in threading.enumerate() if t.name != "lifeline"]
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost:1234", 2, -1), "go together"),
        (("", 2, 0), "go together"),
        (("auto", 2, 0), "expected HOST:PORT"),
        (("localhost", 2, 0), "expected HOST:PORT"),
        (("localhost:99999", 2, 0), "expected HOST:PORT"),
        (("localhost:1234", 2, 2), "must be below"),
    ],
)
def test_half_a_description(arguments, message):
    """Mutation: pass what was given on to jax."""
    with pytest.raises(ConfigError, match=message):
        roll_call_lib.start(*arguments)


def test_nothing_to_find(monkeypatch):
    """Mutation: let jax's ValueError out of `_detect`."""

    def initialize(**unused):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match=r"--coordinator=auto: jax found no cluster"):
        roll_call_lib.start("auto")


def test_a_port_in_use():
    """Mutation: let the OSError through."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="cannot listen there"):
            roll_call_lib.start(f"localhost:{port}", 2, 0)


def roll_call(*answers, count=3):
    """Process 0's peers or error, and those of processes with these (id, count)s."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{found.getsockname()[1]}"
    results = [None] * (1 + len(answers))

    def run(index, function):
        try:
            results[index] = function()
        except (ConfigError, HangError) as error:
            results[index] = error

    def answer(who, number):
        return roll_call_lib._answer(where, number, who, time.monotonic() + 20, 20)

    chief = roll_call_lib._RollCall(where, count, 20.0)
    calls = [lambda: chief.peers(time.monotonic() + 20)]
    calls += [lambda a=a: answer(*a) for a in answers]
    threads = [
        threading.Thread(target=run, args=(i, call)) for i, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_come():
    """Everyone has a line to process 0, by its number.

    Mutation: close the connections when the roll has been called.
    """
    chief, second, first = roll_call((2, 3), (1, 3))
    assert list(chief) == [1, 2] and list(first) == list(second) == [0]
    assert first[0].tell(1, 42, "here") and second[0].tell(2, 7, "there")
    assert chief[1].news() == [(1, 42, "here")]
    assert chief[2].news() == [(2, 7, "there")]


@pytest.mark.parametrize(
    "answers, message",
    [
        (((1, 3), (1, 3)), r"two processes .* were started with --process_id=1"),
        (((1, 4),), r"process 1 .* --num_processes=4, process 0 with 3"),
    ],
)
def test_two_that_contradict(answers, message):
    """Both sides say the same. Mutation: `discard` the id and go on."""
    results = roll_call(*answers)
    assert isinstance(results[0], HangError)
    for result in results:
        if isinstance(result, HangError):
            with pytest.raises(HangError, match=message):
                raise result
    assert any(isinstance(r, HangError) for r in results[1:])


def test_another_program_answers():
    """Mutation: print whatever it says as the reason."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.closing(server.accept()[0]) as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        threading.Thread(target=serve, daemon=True).start()
        where = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match="another program answers there"):
            roll_call_lib.start(where, 2, 1, 60)


PERMUTED = """
import sys
import jax, numpy as np
from memoryformer import sharding
port, process = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
batch = {"x": np.arange(64).reshape(8, 8)}
for order in ((0, 2, 1, 3), (0, 2, 3, 1)):
    devices = [jax.devices()[i] for i in order]
    for mesh in ("data", "fsdp:sequence=2", "tensor:model=2"):
        made = sharding.make(mesh, devices)
        rows = made.local_rows(8)
        if mesh == "data":
            own = [i for i, d in enumerate(devices) if d.process_index == int(process)]
            assert list(rows) == [r for i in own for r in (2 * i, 2 * i + 1)], rows
        placed = made.put_batch({"x": batch["x"][rows]})["x"]
        with made.activate():
            whole = jax.jit(lambda x: x, out_shardings=jax.P())(placed)
        np.testing.assert_array_equal(np.asarray(whole), batch["x"])
print("same")
"""


def test_processes_whose_rows_are_no_neighbours():
    """Two processes of two devices in other orders, as on a torus of TPUs: the batch that
    the devices hold together is the global one, each row once.

    Mutation: `local_rows` from the first row to the last.
    """
    port = str(free_port())
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PERMUTED, port, process],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in "01"
    ]
    for one in started:
        out, err = one.communicate(timeout=120)
        assert out.endswith("same\n"), err[-2000:]


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


@pytest.mark.parametrize(
    "end, code, line",
    [
        (None, 43, "error: process 2 (far) was lost"),
        (46, 46, "error: process 2 (far) ended with exit code 46"),
        (42, None, ""),
    ],
)
def test_bad_news_reach_everyone(monkeypatch, capsys, end, code, line):
    """From process 2 through process 0 to process 1; a good end is no news.

    Mutations: do not relay; take every closed connection for a loss.
    """
    left = []

    def leave(code):
        left.append(code)
        raise SystemExit

    monkeypatch.setattr(lifeline, "_leave", leave)
    monkeypatch.setattr(lifeline, "GRACE", 0.01)
    monkeypatch.setattr(lifeline.sys, "__stderr__", lifeline.sys.stderr)
    pairs = {who: tcp_pair() for who in (1, 2)}
    chief = lifeline.Lifeline(
        0, {w: lifeline.Peer(p[0], "far") for w, p in pairs.items()}
    )
    first = lifeline.Lifeline(1, {0: lifeline.Peer(pairs[1][1], "near")})
    if end is not None:
        pairs[2][1].sendall(f"2 {end} far\n".encode())
    pairs[2][1].close()
    if code is None:
        pairs[1][1].sendall(b"1 0 near\n")
        pairs[1][1].shutdown(socket.SHUT_WR)
    with contextlib.suppress(SystemExit):
        chief._listen()
    if code is None:
        assert not left
        return
    with contextlib.suppress(SystemExit):
        first._listen()
    assert left == [code, code]
    assert capsys.readouterr().err.count(line) == 2


def test_an_end_is_told():
    """Mutation: tell of good ends only."""
    ours, theirs = tcp_pair()
    line = lifeline.Lifeline(3, {0: lifeline.Peer(ours, "x")})
    line.__exit__(None, None, None)
    with contextlib.suppress(SystemExit):
        line.__exit__(SystemExit, SystemExit(0), None)
    told = lifeline.Peer(theirs, "y").news()
    assert [(who, code) for who, code, _ in told] == [(3, 0), (3, 0)]


def test_processes_that_are_not_joined(monkeypatch):
    """Mutation: `mesh=single` in every process, each training and saving by itself."""
    processes.check_joined("single")
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match="4 processes, which have not been joined"):
        processes.check_joined("data")
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    processes.check_joined("data")
    with pytest.raises(ConfigError, match="there are 4 processes; use mesh=data"):
        processes.check_joined("single")


def test_processes_that_differ_are_named(monkeypatch):
    """Mutation: compare with this process's own value."""
    processes.agree("the config", "a")

    def gather(digest):
        return np.stack([digest, digest, digest + 1, digest])

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    utils = types.SimpleNamespace(process_allgather=gather)
    monkeypatch.setattr(processes, "multihost_utils", utils)
    with pytest.raises(ConfigError, match="the data: process 2 of 4 was given another"):
        processes.agree("the data", "a")


def test_what_processes_may_differ_in():
    """Where a host keeps its data is its own. Mutation: `local` ignored."""
    config = {"data": {"path": "a", "data_dir": "b", "source": "c"}, "mesh": "data"}
    other = {"data": {"path": "x", "data_dir": "y", "source": "c"}, "mesh": "data"}
    local = experiment.may_differ()
    assert compatibility.shared(config, local) == compatibility.shared(other, local)
    assert compatibility.shared(config, local) != compatibility.shared(
        config | {"mesh": "fsdp"}, local
    )
