"""A process that trains points, one after another, so that they share what is compiled.

Reads a JSON line {"index", "config", "workdir"} for each from standard input, and answers
each with one {"index", "code", "error", "compilations", "seconds"} on standard output.
What a point prints goes to log.txt in its workdir. Start at `serve`.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pathlib
import sys
import time
import traceback
from typing import Any

COMPILATION = "/jax/core/compile/backend_compile_duration"
LOCK_SECONDS = 60.0  # what a worker that was told to stop may take to save


def serve(requests: Any, replies: Any, compiled: dict[Any, Any] | None = None) -> None:
    """Answer requests until there are no more, or until the process is told to stop.

    `compiled` is what points share, see `trainer.train`.
    """
    import jax

    compilations: list[float] = []

    def count(event, seconds, **unused_facts):
        if event == COMPILATION:
            compilations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(count)
    compiled = {} if compiled is None else compiled
    for line in requests:
        request = json.loads(line)
        compilations.clear()
        started = time.perf_counter()
        code, error = train(request["config"], request["workdir"], compiled)
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
    config: dict[str, Any], workdir: str, compiled: dict[Any, Any]
) -> tuple[int, str]:
    """Train one point; return its exit code and, unless that is 0, what went wrong."""
    from memoryformer import errors, trainer

    folder = pathlib.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _log(folder / "log.txt"), _only_one(folder / "lock"):
            try:
                trainer.train(config, folder, compiled=compiled)
            except errors.MemoryFormerError as error:
                return errors.report(error, debug=False), str(error)
            except Exception as error:
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


@contextlib.contextmanager
def _only_one(path: pathlib.Path):
    """Wait until no other process trains in this directory: one that is being stopped."""
    deadline = time.monotonic() + LOCK_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield


def main() -> None:
    """Take a share of the processor's cores, then serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cores", default="")
    cores = parser.parse_args().cores
    if cores:
        # Before jax starts its threads: one for each core that it may use.
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing but replies may go there
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
