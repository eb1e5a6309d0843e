"""A sweep as an array under a real scheduler: submitted, watched, stopped and ended."""

import subprocess
import sys

import pytest
import world as world_lib

pytestmark = pytest.mark.slow
SWEEP = """

def sweep_seed():
    for seed in range(3):
        yield {"train.seed": seed}
"""


@pytest.fixture
def sweep(cluster):
    """`sweep(WORD, *flags)` runs a command of three points, the first of them `straight`."""
    config = cluster.slurm.folder / "swept.py"
    text = world_lib.CONFIG.format(folder=str(cluster.world.folder))
    config.write_text(text + SWEEP)

    def command(word, *flags, fault=""):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "memoryformer.sweep", f"--config={config}"),
                *("--sweep=seed", "--root=sweeps", *flags, word),
            ],
            cwd=cluster.slurm.folder,
            env=cluster.slurm.environment | cluster.environment(fault),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return command


def test_an_array_ends_with_every_point_done(cluster, sweep):
    """Two tasks at a time; both are stopped, requeued alone, and end as if nothing had been;
    `status` tells queued, running and done apart on the way, `submit` starts nothing twice.

    Its mutations are tried where SLURM's words are faked, in sweep/test_launchers.py and
    cluster/test_launch.py.
    """
    slurm, flags = cluster.slurm, ("--launcher=slurm", "--parallel=2")
    out = sweep("submit", *flags, fault="until_asked:5#0,until_asked:5#1")
    job = out.partition("job ")[2].partition(":")[0]
    assert out == f"submitted as job {job}: 3 points; no others\n"
    tasks = [f"{job}_{index}" for index in range(3)]
    folders = slurm.folder / "sweeps" / "swept" / "seed"

    def step_4(index):
        [folder] = folders.glob(f"*seed={index}-*")
        return any(row["step"] == 4 for row in world_lib.rows(folder))

    slurm.until(lambda: len(list(folders.glob("*/metrics.jsonl"))) == 2)
    slurm.until(lambda: step_4(0) and step_4(1))
    known = "2 running, 1 queued, 0 done, 0 failed, 0 partial, 0 new\n"
    told = sweep("status")
    assert told.endswith(known) and f"job {job}_2: PENDING" in told, told
    assert sweep("submit", *flags) == f"nothing to submit: {known}"
    for task in tasks[:2]:
        slurm.command("scancel", "--signal=TERM", task)
    assert slurm.wait(*tasks) == ["COMPLETED"] * 3
    assert [slurm.facts(task)["Restarts"] for task in tasks] == ["1", "1", "0"]
    assert sweep("status").endswith("3 done, 0 failed, 0 partial, 0 new\n")
    cluster.world.assert_straight(next(folders.glob("*seed=0-*")))
    losses = [world_lib.rows(f)[-1]["val/loss"] for f in folders.glob("*seed=*")]
    assert len(set(losses)) == 3


def test_failed_points_are_told_and_left_alone(cluster, sweep):
    """One that is cancelled is to do again; NaN is failed, and submitted again if asked.

    Its mutations are tried where SLURM's words are faked.
    """
    slurm, flags = cluster.slurm, ("--launcher=slurm", "--root=others")
    out = sweep("submit", *flags, fault="nan:3#0,until_asked:5#1")
    job = out.partition("job ")[2].partition(":")[0]
    assert slurm.wait(f"{job}_0", f"{job}_2") == ["FAILED", "COMPLETED"]
    slurm.command("scancel", job)
    slurm.wait(f"{job}_1")
    told = sweep("status", "--root=others")
    assert "44: step 4" in told, told
    assert told.endswith("1 done, 1 failed, 1 partial, 0 new\n")
    again = sweep("submit", *flags, "--retry_failed")
    assert again.endswith("2 points; 1 done, 0 failed, 0 partial, 0 new\n"), again
    job = again.partition("job ")[2].partition(":")[0]
    assert slurm.wait(f"{job}_0", f"{job}_1") == ["COMPLETED"] * 2
    told = sweep("status", "--root=others")
    assert told.endswith("3 done, 0 failed, 0 partial, 0 new\n"), told
