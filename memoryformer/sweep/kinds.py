"""The two kinds of runs that a sweep is of: language models, and generated tasks.

A config with a section `task` is of a task. Both kinds of resolved runs have `model` and
`train`, with `num_steps`, `batch_size` and `seed`; what else differs is here.
"""

from collections.abc import Mapping
from typing import Any

import jax

from memoryformer import accounting
from memoryformer.model import ModelConfig
from memoryformer.tasks import experiment as task_experiment
from memoryformer.tasks import trainer
from memoryformer.training import experiment, loop, programs

Run = Any  # experiment.Experiment | task_experiment.Run
SEEDS = ("train.seed", "task.seed")


def is_task(run: Run) -> bool:
    """Whether a resolved run is of a generated task."""
    return isinstance(run, task_experiment.Run)


def resolve(config: Mapping[str, Any]) -> Run:
    """Check a whole config and freeze it; raises `ConfigError`."""
    return (task_experiment if "task" in config else experiment).resolve(config)


def as_dict(run: Run) -> dict[str, Any]:
    """Return the resolved config as plain values."""
    return task_experiment.as_dict(run) if is_task(run) else experiment.as_dict(run)


def program(run: Run) -> Any:
    """Return what a run's compiled functions depend on: equal for runs that share them."""
    return trainer.program(run) if is_task(run) else programs.program(run)


def cost(run: Run, step: int) -> dict[str, int]:
    """Count a run's parameters and, of a model that `accounting` knows, its work so far."""
    if not isinstance(run.model, ModelConfig):
        params = jax.eval_shape(lambda: run.task.init(0))
        return {"parameters": sum(x.size for x in jax.tree.leaves(params))}
    counted = accounting.count(run.model)
    tokens = step * run.train.batch_size * run.model.seq_len
    return {
        "tokens": tokens,
        "parameters": counted.parameters.total,
        "training_flops": counted.training_flops_per_token * tokens,
    }


def learning_rate(run: Run) -> str:
    """Return the field of the peak learning rate."""
    return "task.learning_rate" if is_task(run) else "optimizer.learning_rate"


def command(run: Run) -> str:
    """Return the module that trains one run."""
    return f"memoryformer.{'tasks' if is_task(run) else 'training'}"


def train(
    config: Mapping[str, Any], workdir: Any, shared: Any, patience: float
) -> None:
    """Train one run; `shared` is a `programs.Cache`, for language models."""
    if "task" in config:
        trainer.train(config, workdir, patience=patience)
    else:
        loop.train(config, workdir, programs=shared, patience=patience)
