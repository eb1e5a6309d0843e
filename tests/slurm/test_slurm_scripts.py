"""launch/slurm.sh under a real scheduler: who is requeued, and what a run loses by it.

Nothing depends on how fast the machine is: where a run must be interrupted it waits for that.
"""

import re

import pytest
from world import assert_close, rows, steps

pytestmark = pytest.mark.slow
# What slurm.sh asks for is claimed by the node; each test asks for as little as it can.
LIMIT = ("--time=2", "--signal=TERM@20")


def restarts(slurm, job):
    return int(slurm.facts(job)["Restarts"])


def exit_code(slurm, job):
    return int(slurm.facts(job)["ExitCode"].partition(":")[0])


def test_time_limit(cluster):
    """SIGTERM before the limit: saved, 42, requeued by the scheduler, and to the end: bit for
    bit the run that nobody stopped. The job has what slurm.sh asks for, its step too.

    Mutations: 42 left out of the `case`; no SRUN_CPUS_PER_TASK.
    """
    slurm, workdir = cluster.slurm, cluster.world.workdir()
    job = cluster.submit(workdir, *LIMIT, fault="until_asked:5")
    slurm.until(lambda: slurm.state(job) == "RUNNING")
    facts = slurm.facts(job)
    assert (facts["NumCPUs"], facts["TresPerNode"]) == ("32", "gres:gpu:8")
    slurm.until(lambda: f"StepId={job}.0" in slurm.command("scontrol", "show", "step"))
    step = slurm.command("scontrol", "show", "step", f"{job}.0")
    assert "TresPerStep=cpu:32" in step and "TresPerNode=gres:gpu:8" in step, step
    assert slurm.wait(job) == ["COMPLETED"], cluster.log(job)
    log = cluster.log(job)
    assert log.count("exit code 42: back into the queue") == 1, log
    assert "SIGTERM: stopping after this step" in log
    assert (restarts(slurm, job), exit_code(slurm, job)) == (1, 0)
    cluster.world.assert_straight(workdir)


def test_what_would_come_again_is_not_requeued(cluster, small_disk):
    """NaN (44) and a disk that is full (45) end the job; with space it goes on, resubmitted.

    Mutation: `44 | 45` put into the `case`.
    """
    slurm, full = cluster.slurm, small_disk / "run"
    nan = cluster.submit(cluster.world.workdir(), fault="nan:3")
    disk = cluster.submit(full, fault="fill_disk:6")
    assert slurm.wait(nan, disk) == ["FAILED", "FAILED"]
    assert [exit_code(slurm, job) for job in (nan, disk)] == [44, 45]
    assert [restarts(slurm, job) for job in (nan, disk)] == [0, 0]
    assert "back into the queue" not in cluster.log(nan) + cluster.log(disk)
    (small_disk / "ballast").unlink()
    assert slurm.wait(cluster.submit(full)) == ["COMPLETED"]
    cluster.world.assert_straight(full)


def test_two_tasks_train_one_model(cluster):
    """They find each other, share the global batch, stop together and go on together.

    Mutation: `launchers.from_slurm` takes every task for a lone one.
    """
    slurm, workdir = cluster.slurm, cluster.world.workdir()
    job = cluster.submit(
        workdir,
        "--ntasks-per-node=2",
        "--cpus-per-task=4",
        fault="until_asked:5",
        fields={"mesh": "data"},
    )
    slurm.until(lambda: slurm.state(job) == "RUNNING")
    slurm.until(lambda: "step 4/12" in cluster.log(job))
    slurm.command("scancel", "--signal=TERM", job)
    assert slurm.wait(job) == ["COMPLETED"], cluster.log(job)
    log = cluster.log(job)
    assert restarts(slurm, job) == 1 and log.count("back into the queue") == 1, log
    assert re.search(r"step 12/12 .* tok/s \S+ \(\S+/dev\)", log), log  # two devices
    assert steps(workdir)[-1] == 12
    assert_close(rows(workdir), rows(cluster.world.straight), 5e-6)


def test_a_process_that_ends_late_is_waited_for(cluster):
    """NaN in both tasks, and the second takes three seconds longer to say so: 44, and not
    the 143 of a task that srun ended, which would be requeued.

    Mutation: `--kill-on-bad-exit=1`.
    """
    slurm = cluster.slurm
    job = cluster.submit(
        cluster.world.workdir(),
        "--ntasks-per-node=2",
        "--cpus-per-task=4",
        fault="nan:3,late:3@1",
        fields={"mesh": "data"},
    )
    assert slurm.wait(job) == ["FAILED"], cluster.log(job)
    assert (restarts(slurm, job), exit_code(slurm, job)) == (0, 44)


@pytest.mark.parametrize("goes_on", (True, False))
def test_scancel_in_a_save(cluster, goes_on):
    """The save ends before SIGKILL and nothing is lost; or it does not, and the step before
    it is whole. Not requeued; submitted again, the run ends as the straight one.

    Mutation: the first SIGTERM ends the process at once.
    """
    slurm, workdir = cluster.slurm, cluster.world.workdir()
    asked, saving, go = (slurm.folder / name for name in ("asked", "saving", "go"))
    job = cluster.submit(workdir, fault="pause_in_save:8,until_asked:10")
    slurm.until(saving.exists)
    slurm.command("scancel", job)
    slurm.until(asked.exists)
    if goes_on:
        go.touch()
    assert slurm.wait(job) == ["CANCELLED"]
    assert restarts(slurm, job) == 0
    assert steps(workdir) == ([8, 11] if goes_on else [4])
    assert slurm.wait(cluster.submit(workdir)) == ["COMPLETED"]
    cluster.world.assert_straight(workdir)
