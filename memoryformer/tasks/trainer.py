"""The one small trainer of generated tasks: AdamW on fresh batches, a row every so often.

A run's folder is that of a language model's run, written by the same modules: config.json,
metrics.jsonl, checkpoints/ and outcome.json. The same command goes on from the last checkpoint,
bit for bit. One device. Start at `train`.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memoryformer import model as model_lib
from memoryformer.cluster import signals
from memoryformer.errors import ConfigError, NumericError, Preempted
from memoryformer.files import atomic, paths
from memoryformer.notation import Array, Params
from memoryformer.runs import (
    checkpoint,
    compatibility,
    directory,
    metrics,
    outcome,
)
from memoryformer.tasks import base, experiment
from memoryformer.training import compilation_cache, optimizer
from memoryformer.training import spikes as spikes_lib


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    step: Array  # int32, updates done
    params: Params
    opt_state: Any


def train(
    config: Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    allow: Collection[str] = (),
    patience: float = 0.0,
) -> list[dict[str, Any]]:
    """Train a task's model, or go on training it; return the rows of metrics.jsonl.

    Args:
      config: a whole config, see `experiment`.
      workdir: folder of the run. If it holds a checkpoint, the run goes on from there, and its
        config must be the same but for what `experiment.may_change`.
      allow: further fields that may differ.
      patience: seconds to wait for another process that still trains in `workdir`.

    Raises `Preempted` after SIGTERM or SIGINT, with the state saved; `NumericError`,
    `StorageError` and `ConfigError` as their names say.
    """
    run = experiment.resolve(config)
    workdir = paths.workdir(workdir)
    directory.refuse_foreign(workdir, ("task", "model"))
    compilation_cache.use_cache(compilation_cache.DEFAULT)
    with (
        directory.only_one(workdir, patience),
        outcome.recorded(workdir),
        signals.StopRequest() as stop,
        checkpoint.Checkpointer(
            workdir,
            run.checkpoint,
            run_config=experiment.as_dict(run),
            data_fingerprint=f"task {run.name} {run.task.fingerprint}".strip(),
            allow={*allow, *experiment.may_change(run)},
        ) as checkpointer,
    ):
        _Loop(run, workdir, checkpointer, stop).run()
    return metrics.read(workdir)


@dataclasses.dataclass
class _Loop:
    config: experiment.Run
    workdir: pathlib.Path
    checkpointer: checkpoint.Checkpointer
    stop: signals.StopRequest

    def __post_init__(self):
        self.task, self.options = self.config.task, self.config.task.options
        self.programs = make_programs(program(self.config))

    def run(self) -> None:
        """Restore, step, measure and save, in this order, until `task.num_steps`.

        As in `training.loop`, state n is measured and saved before batch n is consumed.
        """
        state, start = self._restore()
        run_config, num_steps = experiment.as_dict(self.config), self.options.num_steps
        plain = compatibility.plain(run_config)
        atomic.write_json(self.workdir / "config.json", plain, indent=2)
        with metrics.MetricsWriter(
            self.workdir, self.config.metrics, start, run_config=plain
        ) as writer:
            for step in range(start, num_steps):
                if self.stop:
                    break
                batch = self.task.batch(step, "train")
                state, sums = self.programs.train_step(
                    state, batch, np.int32(self.options.seed)
                )
                self.checkpointer.check()
                if (step + 1) % self.options.eval_every == 0 or step + 1 == num_steps:
                    self._measure(writer, step + 1, state.params, sums)
                if self.checkpointer.should_save(step + 1):
                    self._save(step + 1, state)
            done = int(state.step)
            self._save(done, state, wait=True)
        if done < num_steps:
            raise Preempted(
                f"{self.stop.name}: stopped after step {done} of {num_steps}, state saved; "
                "run the same command to go on."
            )

    def _restore(self):
        """Return (state, step): the newest whole checkpoint, or a fresh state at 0."""
        fresh = self.programs.new_state(self.task.init(self.options.seed))
        self.checkpointer.preflight(fresh)
        restored = self.checkpointer.restore_latest(fresh)
        if restored is None:
            return fresh, 0
        step, state = restored
        if step > self.options.num_steps:
            raise ConfigError(
                f"task.num_steps={self.options.num_steps}: {self.workdir} is at step "
                f"{step}; raise it."
            )
        print(f"going on from step {step} in {self.workdir}", flush=True)
        return state, step

    def _save(self, step, state, wait=False):
        if not spikes_lib.are_finite(state.params):  # which its loss need not tell
            raise NumericError(
                f"step {step}: a parameter is not finite; lower task.learning_rate."
            )
        self.checkpointer.save(step, state, wait=wait)

    def _measure(self, writer, step, params, sums):
        """Write a row: the last batch of training, held-out ones, and the task's figures."""
        held_out = [
            self.programs.eval_step(params, self.task.batch(i, "validation"))
            for i in range(self.options.eval_batches)
        ]
        row = {f"train/{name}": x for name, x in _quotients([sums]).items()}
        row |= {f"val/{name}": x for name, x in _quotients(held_out).items()}
        row |= self.task.figures(params)
        writer.write(step, row)
        print(json.dumps({"step": step} | row), flush=True)
        if not math.isfinite(row["train/loss"]):
            raise NumericError(
                f"step {step}: the loss is not finite and nothing later is saved; lower "
                "task.learning_rate."
            )


class Programs(NamedTuple):
    """The functions of a run; jit compiles each at its first call."""

    new_state: Any  # params -> TrainState
    train_step: Any  # (state, batch, seed) -> (state, sums)
    eval_step: Any  # (params, batch) -> sums


def program(run: experiment.Run) -> base.Task:
    """Return what a run's compiled functions depend on: equal for runs that share them."""
    options = dataclasses.replace(
        run.task.options, seed=0, eval_every=1, eval_batches=1
    )
    return dataclasses.replace(run.task, options=options)


@functools.lru_cache(maxsize=4)
def make_programs(task: base.Task) -> Programs:
    """Make the functions of a task; its seed is an input.

    u = AdamW of the gradient of sum / count of 'loss', clipped to norm 1.
    """
    recipe = optimizer.OptimizerConfig(
        learning_rate=task.options.learning_rate,
        schedule_options={"end_fraction": 0.0},
        warmup_steps=task.options.warmup_steps,
        b2=0.999,
        weight_decay=task.options.weight_decay,
    )

    def parts(params):
        groups = task.groups(params)
        trained, fixed = model_lib.split_groups(groups, params)
        kinds, _ = model_lib.split_groups(groups, groups)
        tx = optimizer.make(recipe, task.options.num_steps, kinds)
        return trained, fixed, tx

    def new_state(params):
        trained, _, tx = parts(params)
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(trained))

    def train_step(state, batch, seed):
        params = task.redraw(state.params, seed, state.step)
        trained, fixed, tx = parts(params)

        def objective(trained):
            sums = task.sums(model_lib.joined(trained, fixed), batch)
            return sums["loss"][0] / sums["loss"][1], sums

        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(trained)
        updates, opt_state = tx.update(grads, state.opt_state, trained)
        params = model_lib.joined(optax.apply_updates(trained, updates), fixed)
        return TrainState(state.step + 1, params, opt_state), sums

    return Programs(jax.jit(new_state), jax.jit(train_step), jax.jit(task.sums))


def _quotients(batches):
    """{name: sum / count} over batches of sums; what was never counted is left out."""
    totals: dict[str, np.ndarray] = {}
    for sums in batches:
        for name, pair in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0) + np.asarray(pair, np.float64)
    return {name: float(x / n) for name, (x, n) in totals.items() if n}
