"""Train the points of a sweep on this machine, some at a time. Start at `run`."""

import json
import os
import pathlib
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from memoryformer.errors import ConfigError, Preempted
from memoryformer.runs import compatibility, console
from memoryformer.sweep import files, kinds
from memoryformer.sweep.points import Point, Sweep
from memoryformer.sweep.worker import LOCKED

WORKER = (sys.executable, "-m", "memoryformer.sweep.worker")
RESTARTED = (43,)  # exit codes after which a point is started again, once
STOPPED = (-signal.SIGTERM, -signal.SIGKILL)  # of a process that had nothing to save


def run(
    sweep: Sweep,
    *,
    parallel: int = 1,
    retry_failed: bool = False,
    stream: TextIO | None = None,
) -> int:
    """Train what is not done; return 0, or the exit code of the first point that failed.

    Points that are done are skipped, partial ones resumed, failed ones listed (with
    `retry_failed`, resumed too). `parallel` processes share the cores of the machine, and
    GPUs, if CUDA_VISIBLE_DEVICES names them; points that differ in traced inputs only are
    trained by one process as far as possible. A point that another process trains is tried
    again until it is free. Raises `Preempted` after SIGTERM or SIGINT,
    when all processes have saved.
    """
    if parallel < 1:
        raise ConfigError(f"--parallel={parallel}: must be >= 1.")
    files.write_manifest(sweep)
    table = _Table(sweep, stream or sys.stdout)
    pending = []
    for point in sweep.points:
        state = files.state(point)
        if state.name == "done":
            table.event(point, "done before")
        elif state.name == "failed" and not retry_failed:
            table.failed[point.index] = (state.exit_code, state.error)
            table.event(point, f"failed before ({state.exit_code}: {state.error})")
        else:
            pending.append(point)
    return _Runner(sweep, pending, min(parallel, len(pending)), table).run()


class _Worker:
    """One process and the point that it trains."""

    def __init__(self, environment: Mapping[str, str], arguments: Sequence[str]):
        self.point: Point | None = None
        self.program: Any = None  # of the last point
        self.process = subprocess.Popen(
            [*WORKER, f"--parent={os.getpid()}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C is for us to pass on
        )
        assert self.process.stdin and self.process.stdout  # pipes, as asked above
        self.requests, self.replies = self.process.stdin, self.process.stdout

    def give(self, point: Point) -> None:
        request = {
            "index": point.index,
            "config": compatibility.plain(kinds.as_dict(point.run)),
            "workdir": str(point.workdir),
        }
        self.point, self.program = point, kinds.program(point.run)
        print(json.dumps(request), file=self.requests, flush=True)


class _Runner:
    def __init__(
        self, sweep: Sweep, pending: list[Point], parallel: int, table: "_Table"
    ):
        self.pending, self.table = pending, table
        self.parallel = parallel
        self.environments = _shares(sweep.directory.parent / "jax_cache", parallel)
        self.workers: dict[int, _Worker] = {}  # by slot
        self.retried: set[int] = set()
        self.locked: set[int] = set()  # points that another process has or had
        self.stopping = ""

    def run(self) -> int:
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            self._loop()
        finally:
            for worker in self.workers.values():
                worker.process.kill()
                worker.process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.table.close()
        if self.stopping:
            raise Preempted(
                f"{self.stopping}: {len(self.pending)} points were not started or are "
                "partial, all states saved; run the same command to go on."
            )
        failed = sorted(self.table.failed.items())
        return failed[0][1][0] if failed else 0

    def _loop(self):
        with selectors.DefaultSelector() as selector:
            while True:
                self._fill(selector)
                if not self.workers:
                    return
                for key, _ in selector.select(timeout=1.0):
                    self._reply(selector, key.data)
                self.table.draw([w.point for w in self.workers.values() if w.point])

    def _fill(self, selector):
        """Give every free slot a point, or let its process end."""
        self._leave_out_done()
        for slot in range(self.parallel):
            worker = self.workers.get(slot)
            if worker and worker.point:
                continue
            if self.stopping or not self.pending:
                if worker:
                    self._end(selector, slot)
                continue
            if worker is None:
                worker = self.workers[slot] = _Worker(*self.environments[slot])
                selector.register(worker.replies, selectors.EVENT_READ, slot)
            point = self._choose(worker)
            self.pending.remove(point)
            if point.index not in self.locked:
                self.table.event(point, f"started as process {worker.process.pid}")
            worker.give(point)

    def _leave_out_done(self):
        """Drop what another process had, and has trained to the end."""
        for point in [p for p in self.pending if p.index in self.locked]:
            if files.state(point).name == "done":
                self.pending.remove(point)
                self.table.event(point, "done by another process")

    def _choose(self, worker):
        """A point of the program that the worker has compiled, else of no one else's."""
        pending = [p for p in self.pending if p.index not in self.locked]
        pending = pending or self.pending
        programs = [kinds.program(point.run) for point in pending]
        others = [w.program for w in self.workers.values() if w.point]
        for wanted in (
            lambda p: p == worker.program,
            lambda p: p not in others,
            lambda p: True,
        ):
            for point, program in zip(pending, programs, strict=True):
                if wanted(program):
                    return point
        raise AssertionError("there is a pending point")

    def _reply(self, selector, slot):
        worker = self.workers[slot]
        line = worker.replies.readline()
        point, worker.point = worker.point, None
        if line:
            reply = json.loads(line)
            code, error = reply["code"], reply["error"]
            facts = f"{reply['seconds']:.0f} s, {reply['compilations']} compilations"
        else:  # the process is gone
            code = worker.process.wait()
            error, facts = f"the process ended with code {code}", ""
        if not line or code == 42:
            self._end(selector, slot)
        if point is not None:
            self._ended(point, code, error, facts)

    def _ended(self, point, code, error, facts):
        if code == 0:
            self.table.event(point, f"done ({facts})")
        elif code == 42 or (self.stopping and code in STOPPED):
            self.pending.append(point)
            saved = ", state saved" if code == 42 else ""
            self.table.event(point, f"stopped{saved}")
        elif code == LOCKED:
            self.pending.append(point)
            if point.index not in self.locked:
                self.table.event(point, f"{error}; it is tried again later")
            self.locked.add(point.index)
        elif code in RESTARTED and point.index not in self.retried:
            self.retried.add(point.index)
            self.pending.append(point)
            self.table.event(point, f"{error}; starting it again")
        else:
            self.table.failed[point.index] = (max(code, 1), error)
            log = point.workdir / "log.txt"
            self.table.event(point, f"failed ({code}: {error}; see {log})")

    def _end(self, selector, slot):
        worker = self.workers.pop(slot)
        selector.unregister(worker.replies)
        worker.requests.close()
        try:
            worker.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        worker.replies.close()

    def _on_signal(self, number, unused_frame):
        again, self.stopping = bool(self.stopping), signal.Signals(number).name
        for worker in self.workers.values():
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGKILL if again else signal.SIGTERM)


class _Table:
    """A line per event; on a terminal, what is under way below them."""

    def __init__(self, sweep: Sweep, stream: TextIO):
        self._sweep, self._stream = sweep, stream
        self._live = stream.isatty()
        self._drawn = 0
        self._started = time.monotonic()
        self.failed: dict[int, tuple[int, str]] = {}

    def event(self, point: Point, text: str) -> None:
        """Print a line that stays."""
        self._erase()
        count = len(self._sweep.points)
        line = f"[{point.index + 1}/{count}] {point.workdir.name}: {text}"
        print(line, file=self._stream, flush=True)

    def draw(self, running: Sequence[Point]) -> None:
        """Redraw the live table."""
        if not self._live:
            return
        width = max(shutil.get_terminal_size().columns - 1, 20)
        states = {p.index: files.state(p) for p in self._sweep.points}
        counts = [s.name for s in states.values()]
        lines = [
            f"{counts.count('done')} done, {len(running)} running, "
            f"{counts.count('failed')} failed of {len(counts)}, "
            f"{console.short_time(time.monotonic() - self._started)}"
        ]
        for point in running:
            now, steps = states[point.index], point.run.train.num_steps
            loss = [] if now.loss is None else [("loss", f"{now.loss:.3f}")]
            line = console.progress_line(now.step, steps, loss)
            lines.append(f"  {point.workdir.name[:-9]}  {line}")
        self._erase()
        self._stream.write("".join(line[:width] + "\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        """Leave what has failed on the screen."""
        self._erase()
        for index, (code, error) in sorted(self.failed.items()):
            name = self._sweep.points[index].workdir.name
            print(f"failed: {name} ({code}: {error})", file=self._stream, flush=True)

    def _erase(self):
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}A\x1b[J")
            self._drawn = 0


def _shares(cache: pathlib.Path, parallel: int) -> list[tuple[dict, list[str]]]:
    """Environment and arguments of each process: its share of the cores and GPUs."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    shares = []
    for slot in range(parallel):
        environment = dict(os.environ)
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.absolute()))
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
        arguments = []
        if 1 < parallel <= len(cores):
            arguments = ["--cores=" + ",".join(map(str, cores[slot::parallel]))]
        if 1 < parallel <= len(gpus):
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot::parallel])
        shares.append((environment, arguments))
    return shares
