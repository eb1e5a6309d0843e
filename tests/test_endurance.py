"""Many random kills of one run, and a file system that is full to the last byte."""

import random
import re
import shutil
import time

import pytest
from world import digest, expect, rows, steps

KILLS = 50
FIELDS = {  # half of a run's time is steps with saves and deletions between them
    "train.num_steps": 20,
    "eval.every_steps": 10,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 1,
}


@pytest.mark.slow
def test_fifty_random_kills(world):
    """kill -9 at any moment: the run that goes on ends equal bit for bit.

    Mutation: `mutations.MUTATIONS['keep_rows_of_the_lost_future']` or 'replay_a_batch'.
    """
    seed = time.time_ns()  # other moments each time
    rng = random.Random(seed)
    run = {"fault": "slow:30"} | FIELDS
    straight = world.workdir()
    world.run(straight, **run)  # compiles
    began = time.monotonic()
    world.run(world.workdir(), **run)
    longest = time.monotonic() - began
    expected = (rows(straight), digest(straight, 20))
    kills = finished = 0
    workdir = world.workdir()
    while kills < KILLS or not finished:
        started = world.runner.start(workdir, **run)
        if kills < KILLS:
            time.sleep(rng.uniform(0, longest))
            world.runner.kill(started)
        result = world.runner.wait(started)
        kills += result.code == -9
        if result.code == -9:
            continue
        expect(result, 0)
        found = (rows(workdir), digest(workdir, 20))
        assert found == expected, (seed, kills)
        finished += 1
        shutil.rmtree(workdir)
    print(f"{kills} kills, {finished} runs ended, each equal")


def test_full_disk(world, small_disk):
    """Exit code 45 at that step, the earlier checkpoint whole; with space, it goes on.

    Mutation: `mutations.MUTATIONS['swallow_save_errors']`; or `MetricsWriter.write` lets
    the OSError through.
    """
    workdir = small_disk / "run"
    result = world.run(workdir, 45, fault="fill_disk:6")
    # The last page of a file may hold another row.
    message = r"step [78]: cannot be written|/8: saving failed"
    assert re.search(message, result.err), result.err
    assert steps(workdir) == [4]
    (small_disk / "ballast").unlink()
    world.run(workdir)
    world.assert_straight(workdir)
