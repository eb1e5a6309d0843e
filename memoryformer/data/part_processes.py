"""Several processes that prepare the parts of one corpus on this machine.

Each takes the next part that nobody works on. One that fails says why, and ends the others; one
whose parent is gone ends by itself. Start at `run`.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from memoryformer import errors
from memoryformer.data import part_runner
from memoryformer.data import progress as progress_lib

Share = tuple[int, int]  # number and count of those that parts are dealt to
_PAUSE = 0.1  # seconds between two looks
_PROGRAM = "from memoryformer.data import part_processes; part_processes.work()"


def mine(share: Share) -> Callable[[int], bool]:
    """Whether a part belongs to a share."""
    number, count = share
    return lambda part: part % count == number


def run(job: part_runner.Job, share: Share, processes: int) -> None:
    """Do the parts of `share` in so many processes. Raises what the first to fail has raised."""
    content = pickle.dumps((job.directory, job.config, share, os.getpid()))
    threads = max(1, (os.cpu_count() or 1) // processes)
    # Each encodes with its share of the cores, and reads and hashes beside it.
    environment = {"RAYON_NUM_THREADS": str(threads)} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    started: list[subprocess.Popen] = []
    try:
        for _ in range(processes):
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            started.append(process)
            assert process.stdin
            process.stdin.write(content)
            process.stdin.close()
        _watch(job, started)
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()


def _watch(job: part_runner.Job, started: list[subprocess.Popen]) -> None:
    before = job.missing_bytes()
    job.progress.start(f"{len(started)} processes", before, "B")
    running = list(started)
    while running:
        time.sleep(_PAUSE)
        job.progress.check()
        if done := before - job.missing_bytes():
            job.progress.update(done)
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            _raise_what_it_raised(process)
    job.progress.finish(before - job.missing_bytes())


def _raise_what_it_raised(process: subprocess.Popen) -> None:
    code = process.returncode
    if not code:
        return
    assert process.stdout
    said = process.stdout.read().decode("utf-8").strip()
    if said:
        told = json.loads(said.splitlines()[-1])
        kinds = {
            kind.exit_code: kind for kind in errors.MemoryFormerError.__subclasses__()
        }
        raise kinds.get(told["exit_code"], errors.MemoryFormerError)(told["message"])
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    hint = " (not enough memory?)" if code == -signal.SIGKILL else ""
    raise errors.ConfigError(
        f"--parallel: a process ended with {how}{hint}; {part_runner.AGAIN}, perhaps with "
        "fewer processes."
    )


def work() -> None:
    """What one process does: read its task from standard input and do it."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the parent hears it and ends this one
    directory, data_config, share, parent = pickle.load(sys.stdin.buffer)
    quiet = progress_lib.Progress(
        f"preparing {data_config.source}",
        enabled=False,
        stop=lambda: os.getppid() != parent,
    )
    try:
        job = part_runner.Job(directory, data_config, quiet)
        job.run(mine(share), wait=False)
    except Exception as error:
        ours = errors.as_ours(error)
        if ours is None:
            raise
        told = {"exit_code": ours.exit_code, "message": str(ours)}
        print(json.dumps(told), flush=True)
        sys.exit(ours.exit_code)
