"""Runs of programs, mostly train.py, in processes of their own, at the price of a fork.

A server imports jax and the package once, starts no backend, and forks for every run; the
child applies a fault and a mutation by name (`faults`, `mutations`) and executes the program
as a command would. A patch that does not work ends it with `UNBOUND` (`patching`). All that a
run can do to itself - be killed, fill a disk, exit - stays in the child.
`python tests/runner.py` is the server: requests on stdin, answers on stdout, JSON lines.
"""

import atexit
import contextlib
import gc
import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import NamedTuple

from patching import UNBOUND

ROOT = pathlib.Path(__file__).parents[1]
# Compiling is what takes the time: a third of it without LLVM's optimisations, and half of
# that with one LLVM module a program and without the MLIR of fusions.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# A later jax has no such flag, and ends at one that it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK["xla_cpu_use_fusion_emitters"] = False
XLA_FLAGS = " ".join(f"--{flag}={str(value).lower()}" for flag, value in QUICK.items())
# Tracing makes many objects and few of them are cycles: a collection at each 700 of them, as
# Python has it, is a tenth of the suite.
gc.set_threshold(100_000)


class Result(NamedTuple):
    """How a run ended: exit code (-9: killed by signal 9) and what it printed."""

    code: int
    out: str
    err: str


class HarnessError(Exception):
    """A mistake of the tests: a patch that does not work proves nothing."""


class Runner:
    """Starts runs of the config file `config`; a context manager.

    `folder` gets outputs and a compilation cache, which makes restarts cheap.
    """

    patience = 900.0  # seconds, after which a run is killed

    def __init__(self, folder: pathlib.Path, config: pathlib.Path):
        self._folder = folder
        self._config = config
        self._count = 0
        self._lock = threading.Lock()
        self.timeouts = 0  # runs that were killed because they took too long
        self.calls = folder / "calls"  # of the mutations (`patching.calls`)

    def __enter__(self) -> "Runner":
        unless_given = {
            "XLA_FLAGS": XLA_FLAGS,
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        own = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        }
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=unless_given | os.environ | own,
        )
        return self

    def __exit__(self, *unused_exception) -> None:
        self._server.stdin.close()
        self._server.wait()

    def start(
        self,
        workdir,
        *,
        program="train.py",
        config=True,
        fault="",
        mutation="",
        devices=1,
        cached=True,
        flags=(),
        **fields,
    ):
        """Start a run and return its (process id, output file); `fields` override.

        `config`: whether the program takes the config file; `cached`: whether compiled
        programs are kept and found.
        """
        argv = [
            program,
            *([f"--config={self._config}"] if config else []),
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in fields.items()),
            *flags,
        ]
        return self._send(argv, ROOT, {}, fault, mutation, devices, cached)

    def launch(self, *argv, folder=ROOT, environment=None, typed=""):
        """Start `python ARGV...` in `folder`: a script, or `-m MODULE`, as given.

        `typed` is what it reads from its standard input. Returns as `start` does.
        """
        words = [str(word) for word in argv]
        return self._send(words, folder, environment or {}, typed=typed)

    def command(self, *argv, timeout=None, **options) -> Result:
        """Run `python ARGV...` to its end; see `launch`."""
        return self.wait(self.launch(*argv, **options), timeout)

    def _send(
        self,
        argv,
        folder,
        environment,
        fault="",
        mutation="",
        devices=1,
        cached=True,
        typed="",
    ):
        with self._lock:
            self._count += 1
            output = self._folder / f"run{self._count}"
            output.with_suffix(".in").write_text(typed, encoding="utf-8")
            request = {
                "argv": argv,
                "folder": str(folder),
                "environment": environment,
                "fault": fault,
                "mutation": mutation,
                "devices": devices,
                "cached": cached,
                "output": str(output),
                "calls": str(self.calls),
            }
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            return int(self._server.stdout.readline()), output

    def wait(self, started, timeout=None) -> Result:
        """Wait for a run; kill it after `timeout` seconds, or `patience`."""
        pid, output = started
        deadline = time.monotonic() + (timeout or self.patience)
        code = output.with_suffix(".code")
        while not code.exists():
            if time.monotonic() > deadline:
                self.timeouts += 1
                os.kill(pid, signal.SIGKILL)
                deadline += 10
            time.sleep(0.02)
        texts = (output.with_suffix(s).read_text() for s in (".out", ".err"))
        result = Result(int(code.read_text()), *texts)
        if result.code == UNBOUND:
            raise HarnessError(result.err.splitlines()[-1])
        return result

    def kill(self, started, number=signal.SIGKILL) -> None:
        """Send a signal, kill -9 by default, unless the run has ended."""
        pid, output = started
        if not output.with_suffix(".code").exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait_for(self, started, line: str) -> None:
        """Wait until a line that begins so is printed, or the run has ended."""
        _, output = started
        ended, printed = (output.with_suffix(suffix) for suffix in (".code", ".out"))
        while not ended.exists():
            if printed.exists() and f"\n{line}" in f"\n{printed.read_text()}":
                return
            time.sleep(0.01)

    def run(self, workdir, **options) -> Result:
        """Start a run and wait for it; see `start`."""
        return self.wait(self.start(workdir, **options))


def _serve():
    import runpy

    import faults
    import jax
    import mutations
    import parity  # noqa: F401  (with all that a run may import)
    import patching
    import world  # noqa: F401  (what the config file imports)

    from memoryformer.training import loop  # noqa: F401

    gc.freeze()  # a child copies no page only to look at it
    patches = {"": lambda: None} | faults.FAULTS
    patches |= mutations.MUTATIONS | mutations.BROKEN

    def apply(name, calls):
        name, _, argument = name.partition(":")
        patching.calls = calls
        try:
            patches[name](*([int(argument)] if argument else []))
        except Exception as error:
            traceback.print_exc()
            print(f"{name}: {error!r}", file=sys.stderr)
            sys.exit(UNBOUND)

    def child(request):
        output = pathlib.Path(request["output"])
        for number, suffix in ((1, ".out"), (2, ".err")):
            file = os.open(output.with_suffix(suffix), os.O_CREAT | os.O_WRONLY)
            os.dup2(file, number)
        os.dup2(os.open(output.with_suffix(".in"), os.O_RDONLY), 0)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        jax.config.update("jax_num_cpu_devices", request["devices"])
        jax.config.update("jax_enable_compilation_cache", request["cached"])
        sys.argv = request["argv"]
        apply(request["mutation"], pathlib.Path(request["calls"]))
        apply(request["fault"], None)
        if sys.argv[0] != "-m":
            runpy.run_path(sys.argv[0], run_name="__main__")
            return
        del sys.argv[0]
        # As `python -m` has it: the folder, and not that of the tests.
        tests = str(pathlib.Path(__file__).parent)
        sys.path[:] = [os.getcwd(), *(p for p in sys.path if p != tests)]
        sys.modules.pop(sys.argv[0], None)  # as runpy likes it
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

    def reap(pid, output):
        _, status = os.waitpid(pid, 0)
        fresh = output.with_suffix(".code.tmp")
        fresh.write_text(str(os.waitstatus_to_exitcode(status)))
        os.replace(fresh, output.with_suffix(".code"))

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                child(request)
                code = 0
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                if jax.distributed.is_initialized():  # as at an interpreter's end
                    atexit._run_exitfuncs()
                    jax.distributed.shutdown()  # waits for the others
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        print(pid, flush=True)
        threading.Thread(
            target=reap, args=(pid, pathlib.Path(request["output"])), daemon=True
        ).start()


if __name__ == "__main__":
    _serve()
