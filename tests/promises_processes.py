"""R3, R4, R7, R15: several processes of one run, that come, stop, fail and go on together."""

import shutil

import toy
from world import (
    assert_close,
    assert_same_state,
    expect,
    free_port,
    rows,
    steps,
)


def missing_peer(world):
    """R15: who waits for whom, and how many came, in one line."""
    [first] = world.run_together(world.workdir(), 2, ids=[0], wait=2)
    [second] = world.run_together(world.workdir(), 2, ids=[1], wait=2)
    told = expect(first, 43).err
    assert "1 of 2 processes came within 2 s, missing: 1" in told
    assert "process 1 of 2 is alone" in expect(second, 43).err


def wrong_port(world):
    """R15: two that wait at different ports, or count differently, end the same way."""
    workdir, results = world.workdir(), []
    for i in range(2):
        coordinator = f"--coordinator=127.0.0.1:{free_port()}"
        flags = [coordinator, "--num_processes=2", "--init_timeout=2"]
        flags += [f"--process_id={i}"]
        results.append(world.start(workdir, flags=flags, mesh="data"))
    first, second = (expect(world.runner.wait(r), 43) for r in results)
    assert "missing: 1" in first.err and "process 1 of 2 is alone" in second.err


def peers_differ(world):
    """R15: another config or other data in one process is refused by all, at once."""
    other = toy.corpus(world.workdir() / "corpus", documents=30, seed=1)
    for field, value, message in (
        ("train.seed", 5, "the config: process 1 of 2 was given another"),
        ("data.path", str(other), "the data: process 1 of 2 was given another"),
    ):
        found = world.run_together(world.workdir(), 2, own={1: {field: value}})
        for result in found:
            assert message in expect(result, 2).err


def stop_together(world):
    """R3: one process is asked to stop, in any phase; all save one step and exit 42."""
    for fault in ("term:4", "term_in_compile", "term_in_evaluation:0"):
        workdir = world.workdir()
        told = set()
        for result in world.run_together(workdir, 2, {1: fault}):
            last = expect(result, 42).err.splitlines()[-1]
            told.add(last.partition("after step ")[2].split()[0])
        assert told == {str(steps(workdir)[-1])} and told != {"12"}, (fault, told)
    world.run(workdir)
    assert_close(rows(workdir), rows(world.straight), 5e-6)


def lost_process(world):
    """R15: when a process is killed the others end, and say which one it was."""
    for victim, other in ((1, 0), (0, 1)):
        workdir = world.workdir()
        found = world.run_together(workdir, 2, {victim: "kill:5"})
        expect(found[victim], -9)
        assert found[other].code == 43, found[other]
        assert f"error: process {victim} (" in found[other].err
        assert "was lost" in found[other].err


def failed_process(world):
    """R4: when one process fails all end with its exit code."""
    found = world.run_together(world.workdir(), 2, {1: "bad_data:5"})
    assert "bad data" in expect(found[1], 46).err
    assert "process 1 (" in found[0].err and found[0].code == 46, found[0]


def other_processes(world):
    """R7: one process, then two, then one: the same batches, to rounding."""
    workdir = world.copy(8)
    often = {"checkpoint.every_steps": 2}
    found = world.run_together(workdir, 2, {0: "kill_saved:11"}, **often)
    expect(found[0], -9)
    assert "going on from step 8 " in found[0].out and steps(workdir)[-1] == 10
    result = world.run(workdir)
    assert "going on from step 10 " in result.out
    assert_close(rows(workdir), rows(world.straight), 1e-5)
    assert_same_state(workdir, world.straight, 1e-5)


def four_processes(world):
    """R7: 1 -> 2 -> 4 -> 1, each killed after a save; and four alone, evenly split."""
    workdir, start = world.workdir(), 0
    often = {"checkpoint.every_steps": 2}
    for count, kill in ((1, 3), (2, 7), (4, 9)):
        found = world.run_together(workdir, count, {0: f"kill_saved:{kill}"}, **often)
        expect(found[0], -9)
        for other in found[1:]:
            assert other.code == 43 and "error: process 0 (" in other.err, other
        assert not start or f"going on from step {start} " in found[0].out
        start = kill - 1
        assert steps(workdir)[-1] == start
    assert f"going on from step {start} " in world.run(workdir).out
    assert_close(rows(workdir), rows(world.straight), 1e-5)
    assert_same_state(workdir, world.straight, 1e-5)
    for mesh in ("data", "fsdp_tensor:model=2"):
        workdir = world.workdir()
        for result in world.run_together(workdir, 4, mesh=mesh):
            expect(result, 0)
        assert_close(rows(workdir), rows(world.straight), 1e-5)
        shutil.rmtree(workdir)


CHECKS = {
    "R3 stop together": stop_together,
    "R4 failed process": failed_process,
    "R7 other processes": other_processes,
    "R7 four processes": four_processes,
    "R15 missing peer": missing_peer,
    "R15 wrong port": wrong_port,
    "R15 peers differ": peers_differ,
    "R15 lost process": lost_process,
}
SLOW = ("R4 failed process", "R7 four processes")
MUTANTS = {
    "R3 stop together": ("stop_is_not_agreed",),
    "R4 failed process": ("no_lifeline",),
    "R7 other processes": ("same_rows_everywhere", "restore_in_half_precision"),
    "R7 four processes": ("same_rows_everywhere",),
    "R15 missing peer": ("no_roll_call",),
    "R15 wrong port": ("no_roll_call",),
    "R15 peers differ": ("data_are_not_compared",),
    "R15 lost process": ("no_lifeline",),
}
