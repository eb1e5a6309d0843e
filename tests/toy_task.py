"""A task that is made up: the sum of two numbers, by a line through the origin."""

import dataclasses
import os
import signal
import sys

import jax.numpy as jnp
import numpy as np

from memoryformer.config import field
from memoryformer.tasks import base, experiment, registry, trainer


@dataclasses.dataclass(frozen=True)
class AddingModel:
    """Nothing but a width."""

    width: int = field("numbers", 2, doc="Numbers that are added.")


@dataclasses.dataclass(frozen=True)
class AddingConfig(base.TrainerConfig):
    """And where the process is killed, for tests."""

    scale: float = field("numbers", 1.0, doc="Of the numbers.")
    killed_at: int = field("nothing", -1, doc="Step that kills the process.")


class Adding(base.Task):
    """y = w . x, the squared error, and how many answers are within a tenth."""

    Options, Model = AddingConfig, AddingModel

    def init(self, seed):
        """Zeros, and a parameter that is not trained."""
        w = np.random.default_rng(seed).normal(size=self.model.width)
        return {"w": jnp.float32(w), "frozen": {"one": jnp.ones(())}}

    def groups(self, params):
        """w is decayed."""
        return {"w": "decayed", "frozen": {"one": "fixed"}}

    def batch(self, step, split):
        """Normal numbers."""
        if step == self.options.killed_at and split == "train":
            os.kill(os.getpid(), signal.SIGKILL)
        rng = base.rng(self.options.seed, step, split)
        shape = (self.options.batch_size, self.model.width)
        return {"x": self.options.scale * rng.normal(size=shape).astype(np.float32)}

    def sums(self, params, batch):
        """'close' is counted among positive sums only, 'never' never."""
        x = batch["x"]
        error = x @ params["w"] * params["frozen"]["one"] - x.sum(axis=1)
        positive = x.sum(axis=1) > 0
        return {
            "loss": (jnp.sum(error**2), jnp.float32(len(x))),
            "close": (jnp.sum(positive & (abs(error) < 0.1)), jnp.sum(positive)),
            "never": (jnp.zeros(()), jnp.zeros(())),
        }

    def figures(self, params):
        """The first weight."""
        return {"weights/first": float(params["w"][0])}


def config(**fields):
    """A config of 12 steps."""
    registry.TASKS["adding"] = Adding
    made = experiment.default_config("adding")
    values = {
        "task.num_steps": 12,
        "task.batch_size": 16,
        "task.learning_rate": 0.1,
        "task.warmup_steps": 2,
        "task.eval_every": 3,
        "task.eval_batches": 2,
        "checkpoint.every_steps": 5,
        "metrics.tensorboard": False,
    }
    made.update_from_flattened_dict(values | fields)
    return made


if __name__ == "__main__":
    trainer.train(config(**{"task.killed_at": int(sys.argv[2])}), sys.argv[1])
