"""The one small trainer of generated tasks: AdamW on fresh batches, a row every so often.

A task brings its parameters, its batches as a function of the step, and what is minimised.
Start at `train`.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from memoryformer.errors import ConfigError
from memoryformer.files import paths
from memoryformer.notation import Array, Params

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Steps of AdamW: linear warm-up, cosine decay to 0, gradients clipped to norm 1."""

    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    seed: int = 0
    eval_every: int = 100  # steps
    eval_batches: int = 8

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "eval_every", "eval_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name}={getattr(self, name)}: must be >= 1.")
        if self.warmup_steps >= self.num_steps:
            raise ConfigError(
                f"task.warmup_steps={self.warmup_steps}: must be below "
                f"task.num_steps={self.num_steps}."
            )


def train(
    config: TrainerConfig,
    params: Params,
    loss_and_accuracy: Callable[[Params, Batch], tuple[Array, Array]],
    batch: Callable[[int, str], Batch],
    workdir: str | os.PathLike,
    figures: Callable[[Params], Mapping[str, float]] = lambda params: {},
    kinds: Any = "trained",
) -> list[dict[str, float]]:
    """Train, and write and return the rows of metrics.jsonl.

    Args:
      config: steps and rates.
      params: what to start from.
      loss_and_accuracy: means over a batch; the loss (nats) is minimised.
      batch: batch of (step, 'train' or 'validation').
      workdir: folder of metrics.jsonl.
      figures: what else a row holds, from the parameters of that step.
      kinds: 'trained' or 'fixed', for all parameters or a tree with one for each.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.num_steps
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=config.weight_decay),
    )
    tx = optax.partition({"trained": tx, "fixed": optax.set_to_zero()}, kinds)

    @jax.jit
    def train_step(params, opt_state, data):
        grad = jax.value_and_grad(loss_and_accuracy, has_aux=True)
        (loss, accuracy), grads = grad(params, data)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, accuracy

    eval_step = jax.jit(loss_and_accuracy)
    opt_state, rows = tx.init(params), []
    folder = paths.local(workdir, "--workdir")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, config.num_steps + 1):
            data = batch(step - 1, "train")
            params, opt_state, loss, accuracy = train_step(params, opt_state, data)
            if step % config.eval_every and step < config.num_steps:
                continue
            held_out = [
                eval_step(params, batch(i, "validation"))
                for i in range(config.eval_batches)
            ]
            row = {"train/loss": loss, "train/accuracy": accuracy}
            row["val/loss"], row["val/accuracy"] = np.mean(held_out, axis=0)
            row |= figures(params)
            floats = {name: float(value) for name, value in row.items()}
            rows.append({"step": step} | floats)
            print(json.dumps(rows[-1]), flush=True)
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()  # a run that is stopped keeps its rows
    return rows
