"""R1, R3-R6, R12, R14: what is left of a run that is stopped, killed or starved."""

import os

from world import digest, expect, rows, steps

from memoryformer.cluster import watchdog
from memoryformer.runs import directory
from memoryformer.runs import manifest as manifest_lib
from memoryformer.runs import steps as run_steps


def exact_resume(world):
    """R1: killed seven times, at every kind of moment, a run ends as if it never was."""
    workdir = world.workdir()
    for fault, keep in (
        ("kill:2", 2),  # before any checkpoint
        ("kill_in_async_save:4", 2),
        ("kill_before_manifest:4", 2),
        ("kill:6", 2),  # between two checkpoints
        ("kill_in_deletion", 1),  # of step 4, when step 8 is whole
        ("kill:11", 2),  # the last step
        ("kill_before_ledger:12", 2),  # which is whole, though it is not listed
    ):
        world.run(workdir, -9, fault=fault, **{"checkpoint.keep": keep})
    world.run(workdir)
    world.assert_straight(workdir)


def preemption(world):
    """R3: a signal saves and asks to be started again, wherever it comes."""
    for fault, least, message in (
        ("term:5", 6, "SIGTERM"),
        ("int:5", 6, "SIGINT"),
        ("term_in_compile", 1, "SIGTERM"),
        ("term_in_evaluation:0", 6, "SIGTERM"),
        ("term_in_evaluation:2", 12, "SIGTERM"),
    ):
        workdir = world.workdir()
        result = world.run(workdir, 42, fault=fault)
        assert message in result.err and f"after step {least} of 12" in result.err
        assert steps(workdir)[-1] == least, fault
        if "evaluation" in fault:  # it was cut short
            assert not any(
                "val/loss" in r and r["step"] == least for r in rows(workdir)
            )
        world.run(workdir)
        world.assert_straight(workdir)


def preparation(world):
    """R3: a signal ends the preparation of data, of which nothing is left."""
    workdir, cache = world.workdir(), world.workdir()
    fields = {"data.data_dir": str(cache)}
    for question in (0, 14):  # as it reads; as it tokenises
        fault = f"term_in_preparation:{question}"
        result = world.run(workdir, 42, fault=fault, **fields)
        assert "while preparing text" in result.err
        assert [p.name[:6] for p in cache.iterdir()] == [".lock-"]
    world.run(workdir, **fields)
    world.assert_straight(workdir)


def second_signal(world):
    """R3: a second signal stops at once."""
    workdir = world.workdir()
    world.run(workdir, 143, fault="term_twice:5")
    assert steps(workdir) in ([], [4])  # the save of 4 may have been under way


def exit_codes(world):
    """R4: 0 only for a run that has ended and whose last checkpoint can be read."""
    world.run(world.workdir(), 1, fault="bug:3")
    world.run(world.workdir(), 2, **{"train.num_steps": 0})
    world.run(world.workdir(), 2, flags=["--config.train.nmu_steps=3"])
    typo = ["--config.train.nmu_steps=3", "--debug"]
    assert "Traceback" in world.runner.run(world.workdir(), flags=typo).err
    world.run(world.workdir(), 44, fault="nan:3")
    world.run(world.workdir(), 45, fault="full_disk:9")
    nothing = world.folder / "nothing"
    nothing.mkdir(exist_ok=True)
    world.run(world.workdir(), 46, **{"data.path": str(nothing)})
    workdir = world.workdir()
    world.run(workdir)
    world.run(workdir)  # once more: nothing to do
    world.assert_straight(workdir)
    with directory.only_one(workdir):
        result = world.run(workdir, 45)
    assert f"process {os.getpid()} on" in result.err


def preempted_code(world):
    """R4: a preempted run is not done."""
    world.run(world.workdir(), 42, fault="term:3")


def damage(world):
    """R5: a flipped bit, an empty directory: fall back, loudly, and end the same."""
    workdir = world.copy()
    newest = workdir / run_steps.FOLDER / "12"
    file = max(
        (p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    (workdir / run_steps.FOLDER / "13").mkdir()
    result = world.run(workdir)
    assert "checkpoint 12: skipped, damaged" in result.err
    assert "checkpoint 13: skipped, its save was never finished" in result.err
    world.assert_straight(workdir)


def lost_manifests(world):
    """R5: without any manifest the run stops: it was further than nothing."""
    workdir = world.copy()
    for manifest in workdir.glob(f"{run_steps.FOLDER}/*/{manifest_lib.MANIFEST}"):
        manifest.unlink()
    result = world.run(workdir, 45)
    assert "every checkpoint is damaged (steps 8, 12)" in result.err


def drift(world):
    """R6: another config or other data is refused with a diff, unless allowed."""
    changed = {"optimizer.learning_rate": 1e-3}
    result = world.run(world.copy(8), 2, **changed)
    assert "optimizer.learning_rate: 0.003 -> 0.001" in result.err
    assert "--allow=optimizer.learning_rate" in result.err
    world.run(world.copy(8), flags=["--allow=optimizer.learning_rate"], **changed)
    world.run(world.copy(8), 2, **{"data.source_options.max_documents": 6})
    world.run(world.copy(8), **{"train.log_every": 2})


def disk(world):
    """R12: a disk too small is refused before, a full one is told at its step."""
    workdir = world.workdir()
    result = world.run(workdir, 45, fault="no_space")
    assert "checkpoints need" in result.err and not (workdir / "metrics.jsonl").exists()
    workdir = world.workdir()
    result = world.run(workdir, 45, fault="full_disk:6")
    assert "/8: saving failed" in result.err
    assert rows(workdir)[-1]["step"] <= 9, "told late"
    assert steps(workdir) == [4] and digest(workdir, 4) == digest(world.until_4(), 4)


def hang(world):
    """R14: a stall in any phase ends with stacks and code 43; checkpoints stay."""
    for fault, phase in (
        ("hang:5", "step"),
        ("hang_in_first_step", "first_step"),
        ("hang_in_evaluation", "evaluation"),
        ("hang_in_checkpoint", "checkpoint"),
    ):
        workdir = world.workdir()
        limit = {"train.timeout_scale": 99 / watchdog.TIMEOUTS[phase]}
        started = world.start(workdir, fault=fault, **limit)
        # Under the mutation nobody would end it.
        patience = 60 if world.mutation else 600
        result = expect(world.runner.wait(started, timeout=patience), 43)
        assert "of 99 s allowed" in result.err and "train.timeout_scale" in result.err
        assert "most recent call first" in result.err and "faults.py" in result.err
        assert steps(workdir) == ([] if phase in ("first_step", "checkpoint") else [4])


CHECKS = {
    "R1 exact resume": exact_resume,
    "R3 preemption": preemption,
    "R3 preparation": preparation,
    "R3 second signal": second_signal,
    "R4 exit codes": exit_codes,
    "R4 preempted is not done": preempted_code,
    "R5 damage": damage,
    "R5 lost manifests": lost_manifests,
    "R6 drift": drift,
    "R12 disk": disk,
    "R14 hang": hang,
}
SLOW = ()
MUTANTS = {
    "R1 exact resume": (
        "replay_a_batch",
        "reshuffle_on_restart",
        "drop_optimizer_state",
        "keep_rows_of_the_lost_future",
    ),
    "R3 preemption": (
        "ignore_signals",
        "no_handler",
        "stop_without_saving",
        "evaluation_ignores_signals",
    ),
    "R3 preparation": ("preparation_ignores_signals",),
    "R3 second signal": ("ignore_the_second_signal",),
    "R4 exit codes": (
        "errors_exit_0",
        "swallow_save_errors",
        "two_runs_in_a_directory",
    ),
    "R4 preempted is not done": ("preempted_exits_0",),
    "R5 damage": (
        "hashes_are_not_compared",
        "verify_the_manifest_only",
        "start_from_scratch",
    ),
    "R5 lost manifests": ("no_ledger",),
    "R6 drift": ("config_is_not_compared", "everything_is_free"),
    "R12 disk": ("no_preflight", "look_at_saves_late"),
    "R14 hang": ("watchdog_sleeps",),
}
