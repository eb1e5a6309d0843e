"""What launchers say in the environment: which process this is, of how many, and where 0 is.

Start at `from_slurm` and `from_tpu_pod`.
"""

import re
from collections.abc import Mapping

from memoryformer.errors import ConfigError

_TPU_PORT = 8482  # jax's own choice
_INTERACTIVE = str(0xFFFFFFFA)  # SLURM's id of the step that is the shell of `salloc`


def from_slurm(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Return (coordinator, number of processes, process id) of a SLURM step, or None.

    The port depends on the job's id alone, as jax does it, so that all agree on it. Raises
    `ConfigError` for variables that do not fit together.
    """
    if not environment.get("SLURM_STEP_NODELIST"):
        return None  # not started by srun
    # The step's own number: in the shell of `salloc` SLURM_NTASKS is that of steps to come.
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", default=0)
    tasks = tasks or _number(environment, "SLURM_NTASKS", default=1)
    if tasks < 2 or environment.get("SLURM_STEP_ID") == _INTERACTIVE:
        return None
    # 'gpu[003-007,9],cpu1' -> 'gpu003'
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.match(r"([^,\[\]]+)(?:\[([^,\-\]]+))?", nodes)
    if first is None:
        raise _unfit("SLURM_STEP_NODELIST", nodes, "is no list of hosts")
    host = first[1] + (first[2] or "")
    port = _number(environment, "SLURM_JOB_ID") % 4096 + 61440
    port = _number(environment, "JAX_COORDINATOR_PORT", default=port)
    process_id = _number(environment, "SLURM_PROCID")
    if process_id >= tasks:
        raise _unfit("SLURM_PROCID", str(process_id), f"of a step of {tasks} tasks")
    return f"{host}:{port}", tasks, process_id


def from_tpu_pod(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Return the same of a TPU pod, or of several slices of TPUs, on GKE; or None."""
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    listed = next((environment[n] for n in names if environment.get(n)), "")
    hosts = [host.partition(":")[0] for host in listed.split(",")]
    slices = _number(environment, "MEGASCALE_NUM_SLICES", default=1)
    if len(hosts) * slices < 2 or not environment.get("TPU_WORKER_ID"):
        return None
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    port = _number(environment, "JAX_COORDINATOR_PORT", default=_TPU_PORT)
    before = _number(environment, "MEGASCALE_SLICE_ID", default=0) * len(hosts)
    process_id = before + _number(environment, "TPU_WORKER_ID")
    return f"{first.partition(':')[0]}:{port}", len(hosts) * slices, process_id


def own_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Return the GPU of this SLURM task if a node has several; None: all that it sees."""
    tasks = re.findall(
        r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    )
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    narrowed = visible and "," not in visible  # srun --gpus-per-task=1 has done it
    if narrowed or max(map(int, tasks), default=1) == 1:
        return None
    return [_number(environment, "SLURM_LOCALID")]


def _number(
    environment: Mapping[str, str], name: str, default: int | None = None
) -> int:
    """Return a variable's whole number; an empty one counts as not set."""
    text = environment.get(name, "")
    if text == "" and default is not None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise _unfit(name, text, "is no whole number" if text else "is not set")
    return int(text)


def _unfit(name: str, text: str, problem: str) -> ConfigError:
    return ConfigError(
        f"{name}={text!r}: {problem}, so that the processes of this run cannot be found; "
        "start it with srun, unset the launcher's variables for a lone process, or give "
        "--coordinator, --num_processes and --process_id."
    )
