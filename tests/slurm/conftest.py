"""One SLURM and one uninterrupted run for the tests of this folder."""

import os
import pathlib
import sys
import tempfile
import time

import pytest
import scheduler
from runner import XLA_FLAGS

ROOT = pathlib.Path(__file__).parents[2]


class Cluster:
    """A scheduler, the toy runs of `world`, and jobs of them by the scripts of launch/."""

    def __init__(self, slurm: scheduler.Scheduler, world):
        self.slurm, self.world = slurm, world
        self._python = slurm.folder / "python"
        here = pathlib.Path(__file__).parent
        self._python.write_text(
            f'#!/bin/bash\nexec "{sys.executable}" "{here}/with_fault.py" "$@"\n'
        )
        self._python.chmod(0o755)

    def submit(self, workdir, *options, fault="", fields=None, **environment) -> str:
        """sbatch launch/slurm.sh for the config of `world`; return the job's id."""
        words = [f"--config={self.world.folder / 'config.py'}", f"--workdir={workdir}"]
        words += [f"--config.{key}={value}" for key, value in (fields or {}).items()]
        return self.sbatch("slurm.sh", options, words, fault, **environment)

    def sbatch(self, script, options, words, fault="", **environment) -> str:
        """sbatch OPTIONS launch/SCRIPT WORDS, with FAULT at the first start."""
        return self.slurm.submit(
            *options,
            str(ROOT / "launch" / script),
            *words,
            folder=self.slurm.folder,
            **self.environment(fault) | environment,
        )

    def environment(self, fault="") -> dict[str, str]:
        """What a job gets beside the scheduler's variables."""
        return {
            "FAULT": fault,
            "FAULT_FOLDER": str(self.slurm.folder),
            "JAX_COMPILATION_CACHE_DIR": str(self.world.folder / "jax_cache"),
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_PLATFORMS": "cpu",
            "PYTHON": str(self._python),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", XLA_FLAGS),
        }

    def log(self, job: str) -> str:
        """What a job has printed."""
        [path] = self.slurm.folder.glob(f"*-{job}.log")
        return path.read_text()


@pytest.fixture(scope="module")
def slurm():
    """A running scheduler; the test is skipped where there is none.

    What jobs were over time is added to the file that SLURM_TRANSCRIPT names.
    """
    if lacking := scheduler.missing():
        pytest.skip(f"no {', '.join(lacking)} here: {scheduler.INSTALL}")
    with (
        # Not pytest's: the path of a socket is short.
        tempfile.TemporaryDirectory(
            prefix="slurm-", ignore_cleanup_errors=True
        ) as name,
        scheduler.Scheduler(pathlib.Path(name)) as running,
    ):
        yield running
        if path := os.environ.get("SLURM_TRANSCRIPT"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(running.transcript())


@pytest.fixture
def cluster(slurm, world, request):
    """A scheduler and the straight run; the test's name heads its part of the transcript."""
    made = Cluster(slurm, world)
    slurm.history.append((time.time(), "", request.node.name))
    for name in ("asked", "saving", "go"):
        (slurm.folder / name).unlink(missing_ok=True)
    yield made
    slurm.command("scancel", "--me")
