"""What an update is computed with beside arrays: rates, decays, factors. Start at `scalars`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import optax

from memoryformer.notation import Array
from memoryformer.training import schedules

if TYPE_CHECKING:
    from memoryformer.training.optimizer import OptimizerConfig


class Scalars(NamedTuple):
    """Of one update; traced, float32 but for `number`."""

    learning_rate: Array  # lr(t)
    weight_decay: Array | float
    number: Array  # t, int32
    unbias: tuple[Array, Array]  # 1 - b1^t, 1 - b2^t


def scalars(
    config: "OptimizerConfig",
    relative_rate: schedules.RelativeRate,
    count: Array,
    hyperparams: Mapping[str, Any] | None = None,
) -> Scalars:
    """Return those of the update after `count`; `hyperparams` as in `optimizer.make`."""
    hyper = hyperparams or {
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
    }
    number = optax.safe_increment(count)
    return Scalars(
        hyper["learning_rate"] * relative_rate(count),
        hyper["weight_decay"],
        number,
        (1 - config.b1**number, 1 - config.b2**number),
    )


def relative(config: "OptimizerConfig", num_steps: int) -> schedules.RelativeRate:
    """Return step -> lr over its peak; raises `ConfigError` where the warm-up does not fit."""
    return schedules.relative_rate(
        config.schedule_options, config.warmup_steps, num_steps
    )


def rate_and_decay(
    config: "OptimizerConfig", group: str, now: Scalars
) -> tuple[Array, Array | float | None]:
    """Return the learning rate of a parameter's group, and its decay or None."""
    rate, tables = now.learning_rate, group == "tables"
    if tables:
        rate = rate * config.table_learning_rate_scale
    decayed = group == "decayed" or (tables and config.decay_tables)
    return rate, now.weight_decay if decayed else None


def clip_factor(config: "OptimizerConfig", norm: Array) -> Array | float:
    """Return what gradients of this global norm are multiplied by."""
    if not config.clip_norm:
        return 1.0
    return config.clip_norm / jnp.maximum(norm, config.clip_norm)
