"""Tests of a copy of the tree in a fork of this process, which has imported the libraries."""

import collections
import contextlib
import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
LONGEST = 20.0  # seconds: a test that takes longer is not a quick one
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
LIBRARIES = (
    "flax.nnx",
    "grain",
    "hypothesis.strategies",
    "jax.experimental.pallas",
    "ml_collections.config_flags",
    "optax",
    "orbax.checkpoint",
    "pytest",
    "tokenizers",
)
PASSED, FAILED, NOT_COLLECTED = 0, 1, 2  # pytest's exit codes


def import_libraries(compiled: pathlib.Path) -> None:
    """What tests import that is not ours; no backend starts. `compiled` keeps programs."""
    os.environ.update(ENVIRONMENT, JAX_COMPILATION_CACHE_DIR=str(compiled))
    for name in LIBRARIES:
        importlib.import_module(name)


class Plugin:
    """Orders tests and notes their seconds and the first failure."""

    def __init__(self, seconds, killers):
        self.seconds = collections.Counter()
        self.failure = None
        self._known, self._killers = seconds, killers

    def pytest_collection_modifyitems(self, config, items):
        """Tests that killed mutants of this module before, then file by file."""
        files = list(dict.fromkeys(item.path for item in items))

        def rank(item):
            known = self._known.get(item.nodeid, 0.0)
            return -self._killers[item.nodeid], files.index(item.path), known

        quick = [i for i in items if self._known.get(i.nodeid, 0.0) <= LONGEST]
        items[:] = sorted(quick, key=rank)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        self._note(report)

    def pytest_collectreport(self, report):
        self._note(report)

    def _note(self, report):
        if report.failed and self.failure is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = str(report.longrepr).strip().splitlines()
            place = f"{pathlib.Path(crash.path).name}:{crash.lineno} " if crash else ""
            message = crash.message if crash else lines[-1]
            self.failure = (report.nodeid, place + " ".join(message.split())[:200])


def copy_tree(folder: pathlib.Path) -> None:
    """Copy what git knows or would add, and compile it so that no stale code is read."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True)
    for name in names.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    compiled = ["compileall", "-q", "--invalidation-mode=checked-hash"]
    places = [str(folder / name) for name in ("memoryformer", "tests", "configs")]
    subprocess.run([sys.executable, "-m", *compiled, *places], check=True)


def run_tests(tree, files, seconds, killers, timeout):
    """Run `files` in a fork of this process, whose modules are none of ours.

    Returns {code, failure, seconds by test, cpu, wall}; code -9 after `timeout`.
    """
    answer = tree / "answer.json"
    answer.unlink(missing_ok=True)
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        _run_in_child(tree, files, Plugin(seconds, killers), answer)
    killed = False
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > timeout and not killed:
            os.killpg(pid, signal.SIGKILL)
            killed = True
        time.sleep(0.05)
    _, status, usage = ended
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what a failed test has left running
    found = {"failure": None, "seconds": {}}
    if answer.exists():
        found = json.loads(answer.read_text(encoding="utf-8"))
    found["code"] = -9 if killed else os.waitstatus_to_exitcode(status)
    found["cpu"] = round(usage.ru_utime + usage.ru_stime, 1)
    found["wall"] = round(time.monotonic() - began, 1)
    return found


def _run_in_child(tree, files, plugin, answer):
    code = 70
    try:
        os.setsid()
        os.chdir(tree)
        log = os.open(tree / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]
        for name in [n for n in sys.modules if n.split(".")[0] == "tests"]:
            del sys.modules[name]
        sys.dont_write_bytecode = True
        import pytest

        options = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
        code = int(pytest.main([*options, *files], plugins=[plugin]))
        told = {"failure": plugin.failure, "seconds": plugin.seconds}
        answer.write_text(json.dumps(told), encoding="utf-8")
        sys.stdout.flush()
    finally:
        os._exit(code)
