"""R7-R11, R13, R16: the numbers of a run, whatever computes them."""

import json
import shutil

import numpy as np
import toy
from world import (
    FIELDS,
    assert_close,
    assert_same_state,
    digest,
    expect,
    rows,
    state,
    steps,
)

from memoryformer import data
from memoryformer.training import experiment


def other_devices(world):
    """R7: a run goes on elsewhere with the same arrays and the same batches."""
    first = world.workdir()
    world.run(first, 42, devices=4, fault="term:7", mesh="fsdp")
    assert steps(first)[-1] == 8
    written = state(first, 8)
    for devices, mesh in ((1, "single"), (4, "fsdp_tensor:model=2"), (2, "tensor")):
        workdir = world.workdir()
        shutil.copytree(first, workdir)
        world.run(workdir, devices=devices, fault="tell_restored", mesh=mesh)
        with np.load(workdir / "restored8.npz") as restored:
            assert set(restored) == written.keys() | {"['step']"}
            for path, leaf in written.items():
                np.testing.assert_array_equal(restored[path], leaf, err_msg=path)
        assert_close(rows(workdir), rows(world.straight), 5e-6)
        assert_same_state(workdir, world.straight, 1e-5)


def run_to_run(world):
    """R8: two runs of one config are equal bit for bit, compiled anew or found compiled."""
    workdir = world.workdir()
    world.run(workdir, cached=False)
    world.assert_straight(workdir)


def implementations(world):
    """R8: the fast lookup agrees with the reference within rounding."""
    fast, reference = world.workdir(), world.workdir()
    world.run(fast)
    world.run(reference, **{"model.lookup": "reference"})
    assert_close(rows(fast), rows(reference), 5e-6)


def accumulation(world):
    """R9: uneven weights in two microbatches, or in two processes' two: one batch."""
    one, two = world.workdir(), world.workdir()
    world.run(one, fault="ragged")
    world.run(two, fault="ragged", **{"train.num_microbatches": 2})
    assert_close(rows(one), rows(two), 5e-6)
    both = world.workdir()
    halves = {"train.num_microbatches": 2}
    for result in world.run_together(both, 2, {0: "ragged", 1: "ragged"}, **halves):
        expect(result, 0)
    assert_close(rows(one), rows(both), 5e-6)


def nonfinite(world):
    """R10: numbers that are not finite reach neither parameters nor checkpoints."""
    workdir = world.workdir()
    result = world.run(workdir, 44, fault="nan:5")
    assert "step 6: loss nan" in result.err
    assert steps(workdir) == [4] and digest(workdir, 4) == digest(world.until_4(), 4)
    workdir = world.workdir()
    skip = {"train.max_skipped": 10}
    result = world.run(workdir, fault="nan:5", **skip)
    assert "step 6: loss nan" in result.out and rows(workdir)[-2]["train/skipped"] == 1
    assert all(np.isfinite(leaf).all() for leaf in state(workdir).values())
    limit = {"train.max_skipped": 3}
    world.run(world.workdir(), 44, fault="nan_always", **limit)


def spike(world):
    """R11: an outlier is skipped on request, and a restart judges like the run."""
    fields = {"train.spikes": "skip", "train.spikes_options.sigmas": 12.0}
    fields |= {"train.spikes_options.window": 4}
    straight = world.workdir()
    result = world.run(straight, fault="outlier:8", **fields)
    assert "step 9: " in result.out and "update skipped" in result.out
    assert [r["train/skipped"] for r in rows(straight) if "train/skipped" in r] == (
        [0] * 8 + [1] * 4
    )
    workdir = world.workdir()
    world.run(workdir, -9, fault="kill_before_manifest:12", **fields)
    assert rows(workdir)[-2]["train/skipped"] == 0  # nothing leaps by itself
    shutil.rmtree(workdir)
    world.run(workdir, 42, fault="term:7", **fields)
    world.run(workdir, fault="outlier:8", **fields)
    assert rows(workdir) == rows(straight) and digest(workdir) == digest(straight)


def token_ids(world):
    """R13: ids and vocabularies that the model cannot hold are refused."""
    world.run(world.workdir(), 2, **{"model.vocab_size": 100})
    config = toy.run_config(world.folder, **FIELDS)
    prepared = data.prepare(experiment.resolve(config).data)
    broken = world.workdir()
    shutil.copytree(prepared, broken)
    file = next(p for p in broken.iterdir() if "train" in p.name)
    np.memmap(file, "<u2", "r+")[:] = 60000
    fields = {"data.source": "prepared", "data.path": str(broken)}
    world.run(world.workdir(), 46, **fields)


def same_numbers(world):
    """R16: batched, cached and exported, a model says the same; see `parity`."""
    workdir = world.straight
    result = world.run(workdir, program="tests/parity.py", config=False)
    found = json.loads(result.out.splitlines()[-1])
    first, *others = found["losses"].values()
    for other in others:
        assert abs(other / first - 1) < 1e-7, found["losses"]
    assert len(set(found["counts"])) == 1, found["counts"]
    for name, (error, agree) in found["logits"].items():
        assert error <= 1e-5 and agree, (name, error, agree)
    for name, (ours, full) in found["greedy"].items():
        assert ours == full, (name, ours, full)


CHECKS = {
    "R7 other devices": other_devices,
    "R8 run to run": run_to_run,
    "R8 implementations": implementations,
    "R9 accumulation": accumulation,
    "R10 not finite": nonfinite,
    "R11 spikes": spike,
    "R13 token ids": token_ids,
    "R16 same numbers": same_numbers,
}
SLOW = ()
MUTANTS = {
    "R7 other devices": ("order_depends_on_devices", "restore_in_half_precision"),
    "R8 run to run": ("seed_from_the_clock",),
    "R8 implementations": ("lookup_off_by_a_thousandth",),
    "R9 accumulation": ("mean_of_means",),
    "R10 not finite": ("take_every_update", "never_halt"),
    "R11 spikes": ("ignore_spikes", "forget_the_spike_history"),
    "R13 token ids": ("ids_are_not_checked", "vocabulary_is_not_compared"),
    "R16 same numbers": (
        "padding_counts",
        "mean_of_batches",
        "prompts_are_cut_short",
        "export_narrows_tables",
    ),
}
