"""A SLURM of its own on this machine: munged, slurmctld and slurmd in a temporary folder.

It claims a node of 64 cores and 16 GPUs, so that the scripts of launch/ are submitted with
the resources that they ask for; nothing is bound to a core or a device. All daemons belong to
the user who runs the tests and are stopped by their pid files. Start at `Scheduler`.
"""

import contextlib
import getpass
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time

from world import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge"
SYSTEM = (
    "/usr/local/sbin:/usr/sbin:/sbin"  # where daemons lie, not on every user's PATH
)
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=3600
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=8000 Gres=gpu:16 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def missing() -> list[str]:
    """Programs of SLURM and munge that are not installed here."""
    return [name for name in PROGRAMS if _find(name) is None]


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:{SYSTEM}")


class Scheduler:
    """A context manager around the daemons; `submit` and `wait` are what a user does.

    `folder` takes sockets, logs and states; its path is short, as that of a socket must be.
    A requeued job waits for `cred_expire` seconds and the next round of the scheduler.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.history: list[tuple[float, str, str]] = []  # when, which job, what it was
        self._config = folder / "slurm.conf"
        # Nothing of a scheduler that the tests themselves may run under.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not re.match("(SLURM|SBATCH|SRUN|JAX|XLA)_", name)
        }
        self.environment = inherited | {"SLURM_CONF": str(self._config)}

    def __enter__(self) -> "Scheduler":
        with contextlib.ExitStack() as stack:
            stack.callback(self._stop)
            self._configure()
            self._start()
            stack.pop_all()
        return self

    def __exit__(self, *unused_exception) -> None:
        self._stop()

    def _configure(self) -> None:
        folder = self.folder
        folder.chmod(0o755)  # munged insists
        for name in ("state", "spool"):
            (folder / name).mkdir()
        for index in range(16):  # what stands for a GPU must be a device
            (folder / f"nvidia{index}").symlink_to("/dev/null")
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        host = socket.gethostname().partition(".")[0]
        facts = {"host": host, "folder": folder, "user": getpass.getuser()}
        facts |= {"controller_port": free_port(), "daemon_port": free_port()}
        self._config.write_text(CONFIG.format(**facts))
        gres = f"NodeName={host} Name=gpu File={folder}/nvidia[0-15]\n"
        (folder / "gres.conf").write_text(gres)

    def _start(self) -> None:
        files = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munged.pid",
            "seed-file": "munged.seed",
            "log-file": "munged.log",
        }
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self.command("munged", *options)
        for daemon in ("slurmctld", "slurmd"):
            self.command(daemon, "-f", str(self._config))
        self.until(lambda: "idle" in self.command("sinfo", "-h", "-o", "%t"), 60)

    def _stop(self) -> None:
        """Cancel what is left, then end the daemons, the last one first."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.command("scancel", "--signal=KILL", "--full", "--me")
            self.command("scancel", "--me")
        for daemon in ("slurmd", "slurmctld", "munged"):
            _end(self.folder / f"{daemon}.pid")

    def command(self, name: str, *arguments: str, **environment: str) -> str:
        """Run one of SLURM's programs and return what it prints."""
        done = subprocess.run(
            [_find(name) or name, *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            print(done.stdout, done.stderr)  # pytest shows it
            done.check_returncode()
        return done.stdout

    def submit(self, *words: str, folder: pathlib.Path, **environment: str) -> str:
        """sbatch WORDS... in `folder`; return the job's id."""
        done = self.command(
            "sbatch", "--parsable", "-D", str(folder), *words, **environment
        )
        return done.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What the scheduler knows of a job, or of the task `17_1` of an array."""
        text = self.command("scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self, job: str) -> str:
        """A job's state; what is new of it goes into the history."""
        facts = self.facts(job)
        line = facts["JobState"]
        if line == "PENDING" and facts["Reason"] != "None":
            line += f" ({facts['Reason']})"
        if facts["JobState"] in ENDED:
            line += f", exit code {facts['ExitCode'].partition(':')[0]}"
        if facts["Restarts"] != "0":
            log = pathlib.Path(facts["StdOut"]).read_text()
            code = re.findall(r"exit code (\d+): back into the queue", log)[-1]
            line += f"; start {int(facts['Restarts']) + 1}, {code} before"
        before = [what for _, who, what in self.history if who == job]
        if before[-1:] != [line]:
            self.history.append((time.time(), job, line))
        return facts["JobState"]

    def transcript(self) -> str:
        """The history as lines: seconds, job, what it was; titles between them."""
        lines, start = [], 0.0
        for moment, job, what in self.history:
            start = moment if not job else start  # a title's
            entry = f"{moment - start:6.0f} s  job {job:4s}  {what}"
            lines.append(entry if job else f"\n{what}")
        return "\n".join(lines) + "\n"

    def wait(self, *jobs: str, seconds: float = 900) -> list[str]:
        """Wait until jobs have ended; return their states."""
        states: list[str] = []

        def ended() -> bool:
            states[:] = [self.state(job) for job in jobs]
            return all(state in ENDED for state in states)

        self.until(ended, seconds)
        return states

    def until(self, condition, seconds: float = 900) -> None:
        """Look twice a second whether it holds; raise `TimeoutError` if it never does."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not so after {seconds} s; see {self.folder}")
            time.sleep(0.5)


def _end(path: pathlib.Path, seconds: float = 20) -> None:
    """Ask the daemon of a pid file to stop, and insist; at its end it removes the file."""
    if not path.exists():
        return
    pid = int(path.read_text())
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while path.exists():
            os.kill(pid, 0)
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.1)
