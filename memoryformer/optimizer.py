"""AdamW with clipping, a schedule and the tables in their own parameter group.

    g  <- g * min(1, clip_norm / |g|)                       |g| over all parameters
    m  <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2     float32
    u  =  (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    p  <- p - lr(t) * scale_p * (u + weight_decay_p * p)

`scale_p` is `table_learning_rate_scale` for tables and 1 otherwise; `weight_decay_p` is 0
for what its module declares so (norms, biases, scalars), and without `decay_tables` for tables. Kingma & Ba (arXiv:1412.6980), Loshchilov &
Hutter (arXiv:1711.05101). Start at `make`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memoryformer.errors import ConfigError
from memoryformer.notation import Array, Params

SCHEDULES = ("cosine", "constant", "wsd")
GROUPS = ("tables", "decayed", "undecayed")  # of parameters


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The recipe of the paper's training runs (GPT-NeoX's AdamW with a cosine).

    `decay_steps` is the horizon of the schedule, 0 meaning `train.num_steps`. 'wsd'
    (warm up, stay, decay) falls linearly over the last `cooldown_fraction` of it.
    """

    learning_rate: float = 1e-3
    end_fraction: float = 0.1  # floor of the schedule, as a fraction of the peak
    warmup_steps: int = 0
    decay_steps: int = 0
    cooldown_fraction: float = 0.2
    schedule: str = "cosine"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    table_learning_rate_scale: float = 1.0
    decay_tables: bool = True
    clip_norm: float = 1.0  # 0 = no clipping

    def __post_init__(self):
        _require(self.learning_rate >= 0, "learning_rate", self, "at least 0")
        _require(0 <= self.end_fraction <= 1, "end_fraction", self, "in [0, 1]")
        _require(self.warmup_steps >= 0, "warmup_steps", self, "at least 0")
        _require(self.decay_steps >= 0, "decay_steps", self, "at least 0")
        _require(
            0 < self.cooldown_fraction <= 1, "cooldown_fraction", self, "in (0, 1]"
        )
        _require(self.schedule in SCHEDULES, "schedule", self, " | ".join(SCHEDULES))
        _require(0 <= self.b1 < 1, "b1", self, "in [0, 1)")
        _require(0 <= self.b2 < 1, "b2", self, "in [0, 1)")
        _require(self.eps > 0, "eps", self, "above 0")
        _require(self.weight_decay >= 0, "weight_decay", self, "at least 0")
        scale = self.table_learning_rate_scale
        _require(scale >= 0, "table_learning_rate_scale", self, "at least 0")
        _require(self.clip_norm >= 0, "clip_norm", self, "at least 0 (0 = off)")


def make(
    config: OptimizerConfig, num_steps: int, groups: Any
) -> optax.GradientTransformationExtraArgs:
    """Make the transformation of the module's equations.

    `groups` is a tree like the parameters of names of `GROUPS` (`model.param_groups`).
    `update(grads, state, params, hyperparams=None)` takes the peak learning rate and the
    weight decay as traced scalars, `hyperparams(config)`, so that a sweep over them
    compiles once. Without them the config's numbers are compiled in. They are never
    part of the state: what a checkpoint restores cannot override the config.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    shape = _shape(config, num_steps)

    def init(params):
        # Moments in float32 whatever the parameters are kept in.
        return adam.init(jax.tree.map(_float32, params))

    def update(grads, state, params, *, hyperparams=None, **unused_extra):
        hyper = hyperparams or {
            "learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
        }
        learning_rate = hyper["learning_rate"] * shape(count(state))
        updates, state = adam.update(_clipped(grads, config.clip_norm), state)

        def scale(u, p, group):
            rate = learning_rate
            if group == "tables":
                rate = rate * config.table_learning_rate_scale
            if group == "decayed" or (group == "tables" and config.decay_tables):
                u = u + hyper["weight_decay"] * p
            return (-rate * u).astype(p.dtype)

        return jax.tree.map(scale, updates, params, groups), state

    return optax.GradientTransformationExtraArgs(init, update)


def hyperparams(config: OptimizerConfig) -> dict[str, Array]:
    """Return the traced inputs of `make(...).update`: peak learning rate, weight decay."""
    return {
        "learning_rate": jnp.float32(config.learning_rate),
        "weight_decay": jnp.float32(config.weight_decay),
    }


def schedule(config: OptimizerConfig, num_steps: int) -> Callable[[Array | int], Array]:
    """Return `step -> learning rate`; step 0 is the first update.

    The warm-up is linear and reaches the peak at its last update (step
    `warmup_steps - 1`), so no update has rate 0. From the horizon on the rate stays at
    `learning_rate * end_fraction`. Raises `ConfigError` where the warm-up does not fit.
    """
    shape = _shape(config, num_steps)
    return lambda step: config.learning_rate * shape(step)


def count(opt_state: Any) -> Array:
    """Return the number of updates that `opt_state` has seen (int32 scalar)."""
    return optax.tree.get(opt_state, "count")


def _shape(config: OptimizerConfig, num_steps: int) -> Callable[[Any], Array]:
    """Return `step -> learning rate / peak`."""
    horizon = config.decay_steps or num_steps
    warmup = config.warmup_steps
    if config.schedule != "constant" and warmup >= horizon:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup}: must be below the schedule's horizon of "
            f"{horizon} steps (optimizer.decay_steps, or train.num_steps where that is 0)."
        )
    # The first step that is below the peak, and how many steps the fall takes.
    start = warmup
    if config.schedule == "wsd":
        start = max(warmup, round(horizon * (1 - config.cooldown_fraction)))
    length = max(horizon - start, 1)

    def shape(step: Any) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        done = jnp.clip((step - start) / length, 0.0, 1.0)
        if config.schedule == "constant":
            return rise
        left = 1 - done
        if config.schedule == "cosine":
            left = 0.5 * (1 + jnp.cos(jnp.pi * done))
        return rise * (config.end_fraction + (1 - config.end_fraction) * left)

    return shape


def _clipped(grads: Params, clip_norm: float) -> Params:
    # One factor for all: XLA folds a multiplication into the moments' loops, while
    # optax's `clip_by_global_norm`, with its division, costs a pass over memory.
    grads = jax.tree.map(_float32, grads)
    if not clip_norm:
        return grads
    norm = optax.tree.norm(grads)
    factor = clip_norm / jnp.maximum(norm, clip_norm)
    return jax.tree.map(lambda g: g * factor, grads)


def _float32(x: Array) -> Array:
    # `astype` on an abstract value would fail, and eval_shape calls us with those traced.
    return x if x.dtype == jnp.float32 else x.astype(jnp.float32)


def _require(holds: bool, field: str, config: OptimizerConfig, wanted: str) -> None:
    if not holds:
        value = getattr(config, field)
        raise ConfigError(f"optimizer.{field}={value!r}: must be {wanted}.")
