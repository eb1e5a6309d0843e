"""The trainer of generated tasks: restarts bit for bit, and what is refused."""

import json
import os
import signal

import jax
import numpy as np
import pytest
import toy_task

from memoryformer import runs
from memoryformer.errors import ConfigError, NumericError, Preempted
from memoryformer.runs import metrics, outcome, steps
from memoryformer.tasks import base, experiment, registry, trainer


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """A made-up task is one line of the registry."""
    monkeypatch.setitem(registry.TASKS, "adding", toy_task.Adding)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 12 steps that nothing stopped."""
    workdir = tmp_path_factory.mktemp("tasks") / "straight"
    trainer.train(toy_task.config(), workdir)
    return workdir


def assert_same_run(workdir, expected):
    """State, step and rows, bit for bit, and the outcome."""
    assert metrics.read(workdir) == metrics.read(expected)
    assert outcome.read(workdir) == {"state": "done"}
    (one, two) = (runs.load(folder)[1] for folder in (workdir, expected))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    leaves = [steps.facts(folder)["leaves"] for folder in (workdir, expected)]
    assert leaves[0] == leaves[1]


def test_what_a_run_writes(straight):
    """Rows, a config that resolves, checkpoints that `runs.load` reads, the outcome.

    Mutations: 'never' as 0 / 0; held-out batches of the training split; `fixed` trained.
    """
    rows = metrics.read(straight)
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert set(rows[0]) == {"step", "weights/first"} | {
        f"{split}/{name}" for split in ("train", "val") for name in ("loss", "close")
    }
    config = json.loads((straight / "config.json").read_text(encoding="utf-8"))
    assert experiment.resolve(config) == experiment.resolve(toy_task.config())
    params = runs.load(straight)[1]
    assert float(params["frozen"]["one"]) == 1
    assert float(params["w"][0]) == rows[-1]["weights/first"]
    task = experiment.resolve(config).task
    x = np.concatenate([task.batch(i, "validation")["x"] for i in range(2)])
    error = (x @ params["w"] - x.sum(axis=1)) ** 2
    assert rows[-1]["val/loss"] == pytest.approx(error.mean(), rel=1e-5)
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]


def test_a_killed_run_goes_on_bit_for_bit(straight, tmp_path, runner):
    """Killed at step 11, when the save of step 5 is done and that of step 10 may be.

    Mutations: the moments of Adam made anew; batches counted from the restart; rows after
    the checkpoint kept.
    """
    done = runner.command(toy_task.__file__, tmp_path / "run", "11")
    assert done.code == -signal.SIGKILL, done
    assert outcome.read(tmp_path / "run") is None
    assert steps.facts(tmp_path / "run")["step"] in (5, 10)
    trainer.train(toy_task.config(), tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


def test_a_stopped_run_is_saved(straight, tmp_path, monkeypatch):
    """SIGTERM in a step: `Preempted` with that step saved; then on to the same end.

    Mutation: the stop looked at before the signal's step is counted.
    """
    batch = toy_task.Adding.batch

    def stopping(task, step, split):
        if step == 6 and split == "train":
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(task, step, split)

    with monkeypatch.context() as patch:
        patch.setattr(toy_task.Adding, "batch", stopping)
        with pytest.raises(Preempted, match="SIGTERM: stopped after step 7 of 12"):
            trainer.train(toy_task.config(), tmp_path)
    assert steps.facts(tmp_path)["step"] == 7
    trainer.train(toy_task.config(), tmp_path)
    assert_same_run(tmp_path, straight)


def test_the_first_update(tmp_path):
    """One step of AdamW from w: w - lr (sign of the gradient + 0.01 w).

    Mutations: no weight decay; the gradient of the sum in the place of the mean's is the same.
    """
    config = toy_task.config(
        **{"task.num_steps": 1, "task.warmup_steps": 0, "task.eval_every": 1}
    )
    task = experiment.resolve(config).task
    first, x = np.asarray(task.init(0)["w"]), task.batch(0, "train")["x"]
    gradient = (2 * (x @ first - x.sum(axis=1))[:, None] * x).mean(axis=0)
    expected = first - 0.1 * (np.sign(gradient) + 0.01 * first)
    trainer.train(config, tmp_path)
    np.testing.assert_allclose(runs.load(tmp_path)[1]["w"], expected, atol=2e-6)


def test_another_config_is_refused(straight):
    """What changes numbers is; how often to measure is not. The run stays as it was.

    Mutations: `may_change` of all fields, or of none.
    """
    for field, value in (("task.scale", 2.0), ("model.width", 3), ("task.seed", 1)):
        with pytest.raises(ConfigError, match=field):
            trainer.train(toy_task.config(**{field: value}), straight)
    assert outcome.read(straight) == {"state": "done"}
    trainer.train(toy_task.config(**{"task.eval_every": 4}), straight)
    assert [row["step"] for row in metrics.read(straight)] == [3, 6, 9, 12]


def test_folders_of_others_are_refused(tmp_path):
    """Mutation: `refuse_foreign` that asks for no section."""
    (tmp_path / "config.json").write_text('{"model": {}, "data": {}, "train": {}}')
    with pytest.raises(ConfigError, match="is of another model"):
        trainer.train(toy_task.config(), tmp_path)


def test_numbers_that_are_not_finite(tmp_path):
    """Told in a line, with nothing saved after them.

    Mutation: the check of the loss left out (then the parameters' stops it, at the save).
    """
    config = toy_task.config(**{"task.scale": 1e30, "task.eval_every": 1})
    with pytest.raises(NumericError, match="step 1: the loss is not finite"):
        trainer.train(config, tmp_path)
    assert outcome.read(tmp_path)["exit_code"] == 44


def test_sections_and_names_are_checked():
    """Mutation: the loop over sections left out of `resolve`."""
    with pytest.raises(ConfigError, match="optimiser: unknown section"):
        experiment.resolve({"optimiser": {}})
    with pytest.raises(ConfigError, match=r"task\.name='listop': .*'listops'"):
        experiment.resolve({"task": {"name": "listop"}})
    with pytest.raises(ConfigError, match=r"task\.num_step: unknown field"):
        experiment.resolve({"task": {"name": "adding", "num_step": 1}})


@pytest.mark.parametrize("field", ["num_steps", "eval_every", "eval_batches"])
def test_a_count_below_one_is_refused(field):
    """Mutation: the field left out of the check."""
    fields = {"num_steps": 2, "batch_size": 1, "learning_rate": 0.1, "warmup_steps": 0}
    with pytest.raises(ConfigError, match=rf"task\.{field}=0: must be >= 1"):
        base.TrainerConfig(**(fields | {field: 0}))


def test_seeds_share_what_is_compiled(straight):
    """Mutation: the seed left in `program`."""
    one, two = (
        experiment.resolve(toy_task.config(**{"task.seed": seed})) for seed in (0, 1)
    )
    assert trainer.program(one) == trainer.program(two)
    other = experiment.resolve(toy_task.config(**{"task.scale": 2.0}))
    assert trainer.program(one) != trainer.program(other)
