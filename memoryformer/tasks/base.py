"""What a generated task is: options, a model, a batch for each step, and what is minimised.

A task is a `Task` in a file of its own and a line in `registry.TASKS`. `trainer` trains it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from memoryformer import config as config_lib
from memoryformer import model as model_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.notation import Array, Params

Batch = Mapping[str, Any]
Sums = dict[str, tuple[Array, Array]]  # {name: (sum, count)}
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Steps of AdamW: linear warm-up, cosine decay to 0, gradients clipped to norm 1."""

    num_steps: int = field("numbers", doc="Optimizer steps of the whole run.")
    batch_size: int = field("numbers", doc="Examples of one batch.")
    learning_rate: float = field("numbers", doc="Peak of the schedule.")
    warmup_steps: int = field("numbers", 100, doc="Steps of linear warm-up.")
    weight_decay: float = field("numbers", 0.01, doc="AdamW's decay, times the rate.")
    seed: int = field("numbers", 0, doc="Of the parameters and of the batches.")
    eval_every: int = field("nothing", 100, doc="Steps between two rows of metrics.")
    eval_batches: int = field("nothing", 8, doc="Held-out batches of a row.")

    def __post_init__(self):
        counts = ("num_steps", "batch_size", "eval_every", "eval_batches")
        config_lib.at_least(self, "task", 1, *counts)
        config_lib.at_least(
            self, "task", 0, "learning_rate", "warmup_steps", "weight_decay", "seed"
        )
        if self.warmup_steps >= self.num_steps:
            raise ConfigError(
                f"task.warmup_steps={self.warmup_steps}: must be below "
                f"task.num_steps={self.num_steps}."
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with its model and options; equal ones share what is compiled.

    Options: frozen dataclass of `config.task`, the trainer's own among them.
    Model: frozen dataclass of `config.model`.
    """

    Options: ClassVar[type[TrainerConfig]] = TrainerConfig
    Model: ClassVar[type] = model_lib.ModelConfig

    model: Any
    options: Any

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where model and options do not fit."""

    def init(self, seed: int) -> Params:
        """Draw the parameters: a nested dict of arrays with string keys."""
        raise NotImplementedError

    def batch(self, step: int, split: str) -> dict[str, np.ndarray]:
        """Return batch `step` of a split: a pure function of (options, step, split)."""
        raise NotImplementedError

    def sums(self, params: Params, batch: Batch) -> Sums:
        """Return {name: (sum, count)} over a batch; sum / count of 'loss' is minimised."""
        raise NotImplementedError

    def groups(self, params: Params) -> Any:
        """Name each parameter's group: one of `optimizer.GROUPS`, or 'fixed' (not trained)."""
        return jax.tree.map(lambda _: "decayed", params)

    def redraw(self, params: Params, seed: Array, step: Array) -> Params:
        """Return the parameters as batch `step` needs them: random features are drawn anew."""
        return params

    def figures(self, params: Params) -> dict[str, float]:
        """Return what else a row of metrics holds, by its full name."""
        return {}


def rng(seed: int, step: int, split: str) -> np.random.Generator:
    """Return the generator of one batch; no two batches and no two splits share one."""
    return np.random.default_rng([seed, step, SPLITS.index(split)])
