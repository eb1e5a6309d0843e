"""`python with_fault.py -m MODULE ...`: the `PYTHON` of a job, and what happens to its run.

FAULT names what happens at the job's first start, and to its training only: `name:argument`,
several with commas between them. `name:argument@N` happens in process N alone, and
`name:argument#N` in task N of an array. Names are those of `faults.FAULTS`, and of FAULTS
here, which wait for a scheduler.
"""

import os
import pathlib
import re
import runpy
import sys
import threading
import time

import faults
from patching import wrap

from memoryformer.cluster import lifeline, signals
from memoryformer.data import batches
from memoryformer.runs import manifest

FOLDER = pathlib.Path(os.environ.get("FAULT_FOLDER", "."))  # for files that tell tests


def _until_asked(at):
    """Batch `at` comes when the run has been asked to stop, and it has noted that."""
    asked = threading.Event()

    def on_signal(original, self, number, frame):
        original(self, number, frame)
        (FOLDER / "asked").touch()
        asked.set()

    def batch(original, self, step, rows=slice(None)):
        if step == at:
            asked.wait()
        return original(self, step, rows)

    wrap(signals.StopRequest, "_on_signal", on_signal)
    wrap(batches.Batches, "batch", batch)


def _pause_in_save(at):
    """The save of step `at` writes a file `saving` and waits until someone makes `go`."""

    def write(original, directory, facts):
        if facts["step"] == at:
            (FOLDER / "saving").touch()
            while not (FOLDER / "go").exists():
                time.sleep(0.1)
        original(directory, facts)

    wrap(manifest, "write", write)


def _late(seconds):
    """The process ends later than the others, as on a slower machine."""

    def leave(original, self, *error):
        time.sleep(seconds)
        original(self, *error)

    wrap(lifeline.Lifeline, "__exit__", leave)


FAULTS = {
    "late": _late,
    "pause_in_save": _pause_in_save,
    "until_asked": _until_asked,
}


def _apply(text):
    """Make one fault, if it is this process's."""
    name, argument, mark, number = re.fullmatch(
        r"(\w+):(\d+)(?:([@#])(\d+))?", text
    ).groups()
    variable = {"@": "SLURM_PROCID", "#": "SLURM_ARRAY_TASK_ID"}.get(mark)
    if variable is None or os.environ[variable] == number:
        (faults.FAULTS | FAULTS)[name](int(argument))


def main():
    """Make the faults, then run the module."""
    first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    sys.argv = sys.argv[2:]
    if first and sys.argv[0] == "memoryformer.training":
        for text in filter(None, os.environ.get("FAULT", "").split(",")):
            _apply(text)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
