"""A process that trains points, one after another, so that they share what is compiled.

Reads a JSON line {"index", "config", "workdir"} for each from standard input, and answers
each with one {"index", "code", "error", "compilations", "seconds"} on standard output.
What a point prints goes to log.txt in its workdir. When the process that asks is gone, killed
perhaps, this one saves and ends too. Start at `serve`.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from typing import Any

COMPILATION = "/jax/core/compile/backend_compile_duration"
LOCK_SECONDS = 10.0  # to wait for a worker that was told to stop and saves
LOCKED = -1  # in the place of an exit code: another process trains the point
PARENT_SECONDS = 1.0  # between looks at whether the parent is there


def serve(requests: Any, replies: Any, programs: Any = None) -> None:
    """Answer requests until there are no more, or until the process is told to stop.

    `programs`, a `training.programs.Cache`, is what points share.
    """
    import jax

    from memoryformer.training import programs as programs_lib

    compilations: list[float] = []

    def count(event: str, duration_secs: float, **unused_facts: str | int) -> None:
        if event == COMPILATION:
            compilations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(count)
    programs = programs or programs_lib.Cache()
    for line in requests:
        request = json.loads(line)
        compilations.clear()
        started = time.perf_counter()
        code, error = train(request["config"], request["workdir"], programs)
        reply = {
            "index": request["index"],
            "code": code,
            "error": error,
            "compilations": len(compilations),
            "seconds": time.perf_counter() - started,
        }
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if code == 42:
            return


def train(
    config: dict[str, Any], workdir: str, programs: Any = None
) -> tuple[int, str]:
    """Train one point; return its exit code, or `LOCKED`, and what went wrong, if not 0."""
    from memoryformer import cli, errors
    from memoryformer.runs import directory
    from memoryformer.sweep import kinds

    folder = pathlib.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _log(folder / "log.txt"):
            try:
                kinds.train(config, folder, programs, LOCK_SECONDS)
            except directory.OccupiedError:
                return LOCKED, "another process trains it"
            except Exception as error:
                ours = errors.as_ours(error)
                if ours:
                    return cli.report(ours, debug=False), str(ours)
                traceback.print_exc()
                return 1, f"{type(error).__name__}: {error}"
    except OSError as error:
        return errors.StorageError.exit_code, f"{workdir}: {error}"
    return 0, ""


@contextlib.contextmanager
def _log(path: pathlib.Path):
    """Send what the block and its libraries print to the end of a file."""
    kept = os.dup(1), os.dup(2)
    file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    try:
        os.dup2(file, 1)
        os.dup2(file, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in enumerate(kept, start=1):
            os.dup2(old, number)
            os.close(old)
        os.close(file)


def end_with(parent: int) -> None:
    """Send this process SIGTERM, save and leave, as soon as `parent` is not its parent."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Take a share of the processor's cores, then serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cores", default="")
    parser.add_argument("--parent", type=int, required=True)  # may be gone by now
    arguments = parser.parse_args()
    if arguments.cores:
        # Before jax starts its threads: one for each core that it may use.
        cores = {int(core) for core in arguments.cores.split(",")}
        os.sched_setaffinity(0, cores)
    threading.Thread(target=end_with, args=(arguments.parent,), daemon=True).start()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing but replies may go there
    try:
        serve(sys.stdin, replies)
    except BrokenPipeError:
        # Nobody is there to be told; the point is saved. Python's own exit would try again.
        os._exit(42)


if __name__ == "__main__":
    main()
