"""SLURM: a job array with one task for each point, by `launch/slurm_array.sh`.

The task's number is the point's index. What has become of it is what `squeue` says, which
forgets a job some minutes after its end (SLURM's MinJobAge); the point's files say the rest.
"""

import pathlib
import subprocess
from collections.abc import Mapping, Sequence

from memoryformer.errors import ConfigError
from memoryformer.sweep.launchers.base import (
    ENDED,
    FAILED,
    QUEUED,
    RUNNING,
    Launcher,
    Request,
    Seen,
    Submitted,
)

SCRIPT = pathlib.Path(__file__).parents[3] / "launch" / "slurm_array.sh"
SECONDS = 60.0  # that a scheduler may take to answer
# SLURM's words; those that are not here are of tasks that have ended in their own way.
STATES = {
    QUEUED: "PENDING CONFIGURING REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT SUSPENDED",
    RUNNING: "RUNNING COMPLETING SIGNALING STAGE_OUT STOPPED RESIZING",
    FAILED: "FAILED TIMEOUT OUT_OF_MEMORY NODE_FAIL BOOT_FAIL DEADLINE",
}
_STATE = {word: state for state, words in STATES.items() for word in words.split()}
_FORGOTTEN = "Invalid job id specified"


class Slurm(Launcher):
    """Asks `sbatch` and `squeue`, which must be on this machine."""

    def submit(self, request: Request) -> Submitted:
        """Submit an array of the points; its resources are those of the script."""
        script = request.script or SCRIPT
        if not script.is_file():
            raise ConfigError(
                f"--script={str(script)!r}: no such file; name the slurm_array.sh of the "
                "repository's launch/."
            )
        limit = f"%{request.parallel}" if request.parallel else ""
        array = ranges([point.index for point in request.points])
        sweep = request.sweep
        words = ["sbatch", "--parsable", f"--array={array}{limit}", *request.options]
        words += [str(script), f"--config={sweep.config}"]
        words += [f"--sweep={','.join(sweep.names)}"]
        words += [f"--root={sweep.directory.parents[1]}"]
        words += [f"--config.{key}={value}" for key, value in sweep.base.items()]
        words += ["--retry_failed"] if request.retry_failed else []
        job = _ask(words).strip().partition(";")[0]  # 'job;cluster'
        if not job.isdecimal():
            raise ConfigError(
                f"--launcher=slurm: sbatch answered {job!r}, no job's id."
            )
        return Submitted(job)

    def look(self, jobs: Sequence[str]) -> Mapping[tuple[str, int], Seen]:
        """Ask `squeue` for every task of the jobs that it remembers."""
        words = ["squeue", "--noheader", "--array", "--states=all"]
        words += [f"--jobs={','.join(jobs)}", "--format=%F|%K|%T|%r"]
        seen = {}
        for line in _ask(words, forgotten=_FORGOTTEN).splitlines():
            job, index, state, reason = line.strip().split("|", 3)
            if index.isdecimal():
                text = f"job {job}_{index}: {state}"
                text += f" ({reason})" if reason not in ("None", "") else ""
                seen[job, int(index)] = Seen(_STATE.get(state, ENDED), text)
        return seen


def ranges(numbers: Sequence[int]) -> str:
    """Write numbers as SLURM does: [0, 1, 2, 5] -> '0-2,5'."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _ask(words: Sequence[str], forgotten: str = "") -> str:
    """Run a command of SLURM's; '' where it fails and says `forgotten`."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"--launcher=slurm: {words[0]} cannot be asked ({error}); call this command "
            "on a machine where jobs are submitted."
        ) from error
    if done.returncode and not (forgotten and forgotten in done.stderr):
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"--launcher=slurm: {words[0]} refuses: {reason[:300]}.")
    return "" if done.returncode else done.stdout
