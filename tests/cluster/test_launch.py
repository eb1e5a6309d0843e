"""The launch scripts, with what they call faked: who is started again, and which point."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import toy

from memoryformer.sweep import points

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
AGAIN, NOT_AGAIN = (42, 43, 143), (0, 1, 2, 44, 45, 46)
# Each fake writes down how it was called; its exit codes come from a file, one a line.
FAKE = """#!/bin/bash
printf '%s\\0' {name} "$@" >> {log}
printf '\\1' >> {log}
{body}
codes={codes}
code=0
if [ -s "$codes" ]; then
  code=$(head -n 1 "$codes")
  sed -i 1d "$codes"
fi
exit $code
"""


class Machine:
    """A folder that stands first in PATH, with fakes and their log."""

    def __init__(self, folder):
        self.folder = folder
        self.log = folder / "log"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log.touch()
        python = self.bin / "python"
        python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)

    def fake(self, name, codes=(), body=""):
        file = self.folder / f"{name}.codes"
        file.write_text("".join(f"{code}\n" for code in codes))
        facts = {"name": name, "log": self.log, "codes": file, "body": body}
        path = self.bin / name
        path.write_text(FAKE.format(**facts))
        path.chmod(0o755)

    def run(self, script, *arguments, **environment):
        """Run a script of launch/; return (exit code, calls of the fakes, output)."""
        done = subprocess.run(
            [ROOT / "launch" / script, *arguments],
            env=os.environ
            | {
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                "SLURM_SUBMIT_DIR": str(ROOT),
            }
            | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        calls = [c.split("\0")[:-1] for c in self.log.read_text().split("\1")[:-1]]
        return done.returncode, calls, done.stdout + done.stderr


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(path):
    """Mutation: a missing `done`."""
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(path, os.X_OK)


def test_both_scripts_of_slurm_have_the_same_settings():
    """And the same rule of who is started again: sbatch takes one file, so each has its own.

    Mutations tried: another default of MAX_RESTARTS in one; 43 left out of one `case`.
    """
    texts = [(ROOT / "launch" / n).read_text() for n in ("slurm.sh", "slurm_array.sh")]
    for begin, end in (("# Settings", "\n\n#"), ("\ncase $code", "\nesac")):
        blocks = [text.split(begin)[1].split(end)[0] for text in texts]
        whole = [re.sub(r"(scontrol requeue) .*", r"\1", block) for block in blocks]
        assert whole[0] == whole[1] and len(whole[0]) > 200


@pytest.mark.parametrize("code", AGAIN + NOT_AGAIN)
def test_slurm_requeues_by_exit_code(machine, code):
    """42, 43 and 143 go back into the queue, nothing else does; the code is passed on.

    Mutations: 43 left out of the `case`; `44` put into it; `exit 0` at the end.
    """
    machine.fake("srun", [code])
    machine.fake("scontrol")
    ended, calls, _ = machine.run(
        "slurm.sh", "--config=a b.py", "--workdir=w", SLURM_JOB_ID="17"
    )
    assert ended == code
    train = ["python", "-m", "memoryformer.training", "--config=a b.py", "--workdir=w"]
    assert calls[0] == ["srun", "--kill-on-bad-exit=0", "--wait=300", *train]
    assert calls[1:] == ([["scontrol", "requeue", "17"]] if code in AGAIN else [])


SETTINGS = {
    "PYTHON": "/a venv/bin/python",
    "PREAMBLE": "LOADED=yes; export LOADED",
    "CONTAINER": "apptainer exec image.sif",
    "SRUN_OPTIONS": "--container-image=image --label",
    "SLURM_CPUS_PER_TASK": "32",
}


def test_slurm_settings(machine):
    """Words for srun, a container and a python, after a preamble; a core for each that the
    job has; a preamble that fails ends the job before srun.

    Mutations: `$PYTHON` without its quotes; no SRUN_CPUS_PER_TASK; no `|| exit` at `eval`.
    """
    machine.fake("srun", body='echo "$LOADED $SRUN_CPUS_PER_TASK"')
    ended, [call], output = machine.run("slurm.sh", "--config=a b.py", **SETTINGS)
    container = [*SETTINGS["SRUN_OPTIONS"].split(), *SETTINGS["CONTAINER"].split()]
    train = [SETTINGS["PYTHON"], "-m", "memoryformer.training", "--config=a b.py"]
    assert call == ["srun", "--kill-on-bad-exit=0", "--wait=300", *container, *train]
    assert (ended, output) == (0, "yes 32\n")
    ended, calls, _ = machine.run("slurm.sh", PREAMBLE="module load x || false")
    assert (ended, len(calls)) == (2, 1)


def test_slurm_gives_up_after_many_restarts(machine):
    """Mutation: MAX_RESTARTS not looked at."""
    machine.fake("srun", [43])
    machine.fake("scontrol")
    facts = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}
    ended, calls, output = machine.run("slurm.sh", **facts)
    assert ended == 43 and "giving up" in output
    assert [call[0] for call in calls] == ["srun"]


def test_signals_go_to_the_steps():
    """`--signal=TERM@...` without "B:", `--requeue`, and a log that is appended to.

    Mutation: `--signal=B:TERM@300`, which a trap-less batch script would die of.
    """
    for name in ("slurm.sh", "slurm_array.sh"):
        text = (ROOT / "launch" / name).read_text()
        found = dict(re.findall(r"--([\w-]+)=(\S+)", text))
        assert found["signal"] == "TERM@300" and found["open-mode"] == "append"
        assert re.search(r"^#SBATCH .*--requeue", text, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    path = toy.config_file(folder)
    path.write_text(
        path.read_text()
        + "\n\ndef sweep_rate():\n    for rate in (1e-3, 2e-3, 3e-3):\n"
        + '        yield {"optimizer.learning_rate": rate}\n'
    )
    return folder


@pytest.mark.parametrize("code", (42, pytest.param(44, marks=pytest.mark.slow)))
def test_slurm_array_runs_its_point(machine, folder, code):
    """Index 1 is the sweep's second point; the array task, not the job, is requeued.

    Mutations: `--index=0`; `scontrol requeue $SLURM_JOB_ID`.
    """
    machine.fake("srun", [code])
    machine.fake("scontrol")
    config = str(folder / "toy_config.py")
    root = machine.folder / "runs"
    ended, calls, output = machine.run(
        "slurm_array.sh",
        f"--config={config}",
        "--sweep=rate",
        f"--root={root}",
        "--config.train.batch_size=16",
        SLURM_ARRAY_JOB_ID="17",
        SLURM_ARRAY_TASK_ID="1",
        SLURM_JOB_ID="18",
    )
    assert ended == code, output
    sweep = points.expand(config, ["rate"], root, {"train.batch_size": 16})
    wanted = points.command(sweep, sweep.points[1])
    assert calls[0] == [
        "srun",
        "--kill-on-bad-exit=0",
        "--wait=300",
        "bash",
        "-c",
        wanted,
    ]
    requeue = [["scontrol", "requeue", "17_1"]]
    assert calls[1:] == (requeue if code in AGAIN else [])


def test_slurm_array_settings(machine):
    """The point's command is asked for and run in the container, by one python; Pyxis has
    its container in steps only, so that asking is a step too.

    Mutations: `$command` as it is printed; no `$alone` before what prints it.
    """
    command = "python -m memoryformer.training --label='a b'"
    machine.fake(
        "my python", body=f'[ "$2" != memoryformer.sweep ] || echo "{command}"'
    )
    step = 'while [[ $1 == --* ]]; do shift; done; "$@"'
    machine.fake("srun", body=step)
    machine.fake("inside", body='"$@"')
    python = str(machine.bin / "my python")
    settings = {"PYTHON": python, "CONTAINER": "inside", "SRUN_OPTIONS": "--image=x"}
    ended, calls, output = machine.run(
        "slurm_array.sh", "--sweep=a b", SLURM_ARRAY_TASK_ID="1", **settings
    )
    assert ended == 0, output
    asking = ["-m", "memoryformer.sweep", "--sweep=a b", "--index=1", "--todo", "print"]
    alone = ["srun", "--nodes=1", "--ntasks=1", "--image=x", "inside", python, *asking]
    line = python.replace(" ", "\\ ") + command.removeprefix("python")
    step = ["srun", "--kill-on-bad-exit=0", "--wait=300", "--image=x"]
    train = ["my", "python", "-m", "memoryformer.training", "--label=a b"]
    assert [calls[0], calls[3]] == [alone, [*step, "inside", "bash", "-c", line]]
    assert calls[-1] == train


@pytest.mark.parametrize(
    "state", ("done", pytest.param("failed", marks=pytest.mark.slow))
)
def test_slurm_array_leaves_ended_points_alone(machine, folder, state):
    """Mutation: the script without `--todo`."""
    machine.fake("srun")
    config, root = str(folder / "toy_config.py"), machine.folder / "runs"
    sweep = points.expand(config, ["rate"], root)
    sweep.points[2].workdir.mkdir(parents=True)
    outcome = json.dumps({"state": state, "exit_code": 44, "error": "nan"})
    (sweep.points[2].workdir / "outcome.json").write_text(outcome)
    ended, calls, _ = machine.run(
        "slurm_array.sh",
        f"--config={config}",
        "--sweep=rate",
        f"--root={root}",
        SLURM_ARRAY_TASK_ID="2",
    )
    assert (ended, calls) == (0, [])


def test_slurm_array_refuses_a_wrong_sweep(machine, folder):
    """A mistake ends the task before it takes an accelerator. Mutation: no `|| exit`."""
    machine.fake("srun")
    ended, calls, output = machine.run(
        "slurm_array.sh",
        f"--config={folder / 'toy_config.py'}",
        "--sweep=rates",
        SLURM_ARRAY_TASK_ID="0",
    )
    assert ended == 2 and calls == []
    assert "did you mean 'rate'" in output


TPU = {"NAME": "mf", "ZONE": "z", "TYPE": "v6e-16", "BACKOFF_SECONDS": "0"}
GCLOUD = r"""
case "$4" in
  describe) head -n 1 {states}; sed -i 1d {states} ;;
  ssh) [[ "$*" == *memoryformer.training* ]] && {{ cat {answers} | head -n 1; sed -i 1d {answers}; }} ;;
esac
"""


def gcloud(machine, states, answers):
    """A gcloud whose VM is in `states`, and whose workers answer each run so."""
    facts = {}
    for name, lines in (("states", states), ("answers", answers)):
        facts[name] = machine.folder / name
        facts[name].write_text("".join(f"{line}\n" for line in lines))
    machine.fake("gcloud", body=GCLOUD.format(**facts))


def exit_codes(*codes):
    return " ".join(f"worker exit code {code}" for code in codes)


def words(calls, word):
    return [call for call in calls if call[4] == word]


def test_tpu_vm_goes_on_after_preemption(machine):
    """No VM: it is made; preempted: made again, with the same command; a worker that saved
    (42) or hung (43): the command again; all workers done: 0.

    Mutations: `exit 0` at the first answer; `make_vm` whatever the state.
    """
    states = ["", "PREEMPTED", "READY", "READY"]
    answers = ["", exit_codes(42, 43), exit_codes(42, 42), exit_codes(0, 0)]
    gcloud(machine, states, answers)
    ended, calls, output = machine.run("tpu_vm.sh", "--config=a b.py", **TPU)
    assert ended == 0, output
    assert len(words(calls, "create")) == 2
    trained = [c for c in words(calls, "ssh") if "memoryformer.training" in c[-2]]
    assert len(trained) == 4 and len({tuple(c) for c in trained}) == 1
    assert (
        "memoryformer.training --coordinator=auto --config=a\\ b.py" in trained[0][-2]
    )
    assert "--worker=all" in trained[0] and "--zone=z" in trained[0]


@pytest.mark.parametrize("code", (1, 2, 44, 45, 46))
def test_tpu_vm_stops_at_what_would_come_again(machine, code):
    """Mutation: 44 left out of the `case`."""
    gcloud(machine, ["READY"], [exit_codes(code, 42)])
    ended, calls, _ = machine.run("tpu_vm.sh", **TPU)
    assert ended == code
    assert (
        len([c for c in words(calls, "ssh") if "memoryformer.training" in c[-2]]) == 1
    )


GKE = {"CLUSTER": "c", "TYPE": "v6e-16", "IMAGE": "i"}


# What xpk makes of a command, in a pod: signals go to the subshell, and to nothing in it.
POD = """trap 'kill -TERM $pod' TERM
({command}) & pod=$!
while kill -0 $pod 2> /dev/null; do sleep 0.1; done
wait $pod
exit $?"""
RUN = """#!{python}
import signal, sys, time
def stop(number, frame):
    print("asked to stop", flush=True)
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit({code})
signal.signal(signal.SIGTERM, stop)
print("step 1", flush=True)
time.sleep(60)
"""


def gke_command(machine):
    """Return the command that xpk is given for a run."""
    machine.fake("xpk")
    ended, [call], _ = machine.run("gke_xpk.sh", "tiny", "--config=a b.py", **GKE)
    assert ended == 0
    assert call[1:3] == ["workload", "create"] and "--workload=tiny" in call
    assert "--tpu-type=v6e-16" in call and "--docker-image=i" in call
    assert "--termination-grace-period-seconds=300" in call
    command = call[-1].removeprefix("--command=")
    assert "\n" not in command and "$(" not in command and "$$" not in command
    return command


def in_pod(machine, command):
    """Start the command as a pod does; the fake python comes first."""
    return subprocess.Popen(
        ["bash", "-c", POD.format(command=command)],
        env=os.environ | {"PATH": f"{machine.bin}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("code, passed_on", ((0, 0), (42, 42), (43, 42), (44, 44)))
def test_gke_run(machine, code, passed_on):
    """One workload; its command turns a hang into what xpk starts again, and keeps others.

    Mutation: `exit $?` in place of the two codes.
    """
    command = gke_command(machine)
    machine.fake("python", [code])
    assert in_pod(machine, command).wait(timeout=60) == passed_on
    called = machine.log.read_text().split("\1")[-2].split("\0")[:-1]
    assert called == ["python", "-m", "memoryformer.training", "--config=a b.py"]


@pytest.mark.parametrize("code, passed_on", ((42, 42), (43, 42), (0, 0)))
def test_gke_passes_sigterm_on(machine, code, passed_on):
    """A pod that is taken away waits until the run has saved, and ends with its code.

    Mutations: the command without `trap`; `wait` once only, which the signal ends (143).
    """
    command = gke_command(machine)
    run = machine.bin / "python"
    run.write_text(RUN.format(python=sys.executable, code=code))
    pod = in_pod(machine, command)
    assert pod.stdout.readline() == "step 1\n"
    pod.terminate()
    assert pod.communicate(timeout=60)[0] == "asked to stop\nsaved\n"
    assert pod.returncode == passed_on


def test_gke_sweep(machine, folder):
    """A workload for each point. Mutation: without `</dev/null`, xpk reads the others."""
    machine.fake("xpk", body="cat > /dev/null")
    config, root = str(folder / "toy_config.py"), machine.folder / "runs"
    ended, calls, output = machine.run(
        "gke_xpk.sh",
        "rates",
        SWEEP=f"--config={config} --sweep=rate --root={root}",
        **GKE,
    )
    assert ended == 0, output
    sweep = points.expand(config, ["rate"], root)
    for index, (call, point) in enumerate(zip(calls, sweep.points, strict=True)):
        assert f"--workload=rates-{index}" in call
        line = points.command(sweep, point)
        assert f" TERM; {line} & run=$!; " in call[-1]
