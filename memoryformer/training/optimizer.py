"""AdamW with clipping, a schedule and the tables in their own parameter group.

    g  <- g * min(1, clip_norm / |g|)                       |g| over all parameters
    m  <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2     float32
    u  =  (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    p  <- p - lr(t) * scale_p * (u + weight_decay_p * p)

`scale_p` is `table_learning_rate_scale` for tables and 1 otherwise; `weight_decay_p` is 0
for what its module declares so (norms, biases, scalars), and without `decay_tables` for
tables. Kingma & Ba (arXiv:1412.6980), Loshchilov & Hutter (arXiv:1711.05101).

Tables are nearly all of a model, and `table_state='lean'` keeps less for them:

    second_moment   full: v as above      row: one v a row, of the mean of g^2 over F
    moment_dtype    float32 | bfloat16 | none: u = g / (sqrt(..) + eps)
    dtype           float32 | bfloat16: p itself, rounded after each update
    rounding        nearest | stochastic: up with the probability that keeps the mean

    bytes an entry = p (4 or 2) + m (4, 2 or 0) + v (4 or 4 / F)

Start at `make`; what `update` returns is added by `table_storage.apply`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.notation import Array, Params
from memoryformer.training import rates, schedules

_LEAN = {
    "second_moment": ("full", "row"),
    "moment_dtype": ("float32", "bfloat16", "none"),
    "dtype": ("float32", "bfloat16"),
    "rounding": ("nearest", "stochastic"),
}
GROUPS = ("tables", "decayed", "undecayed")  # of parameters


@dataclasses.dataclass(frozen=True)
class FullTables:
    """Tables are stored and moved as other parameters."""

    second_moment, moment_dtype, dtype, rounding = (
        "full",
        "float32",
        "float32",
        "nearest",
    )


@dataclasses.dataclass(frozen=True)
class LeanTables:
    """Fewer bytes an entry."""

    second_moment: str = field(
        "numbers", "row", doc="full | row: one of each entry, or of each row."
    )
    moment_dtype: str = field(
        "numbers", "bfloat16", doc="float32 | bfloat16 | none: first moment."
    )
    dtype: str = field(
        "numbers", "float32", doc="float32 | bfloat16: in which tables are stored."
    )
    rounding: str = field(
        "numbers",
        "nearest",
        doc="nearest | stochastic: how an update rounds to dtype='bfloat16'.",
    )

    def __post_init__(self):
        name = "optimizer.table_state_options"
        for key, choices in _LEAN.items():
            config_lib.choose(getattr(self, key), choices, f"{name}.{key}")
        if self.rounding == "stochastic" and self.dtype == "float32":
            raise ConfigError(
                f"{name}.rounding='stochastic': rounds to {name}.dtype='bfloat16', not to "
                "float32; set both."
            )


TABLE_STATES = {"full": FullTables, "lean": LeanTables}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The recipe of the paper's training runs (GPT-NeoX's AdamW with a cosine)."""

    learning_rate: float = field("numbers", 1e-3, doc="Peak of the schedule.")
    warmup_steps: int = field("numbers", 0, doc="Steps of linear warm-up.")
    schedule: str = field(
        "numbers", "cosine", doc="cosine | constant | wsd (warm up, stay, decay)."
    )
    schedule_options: Any = field(
        "numbers", None, doc="Where it ends.", options=schedules.SCHEDULES
    )
    b1: float = field("numbers", 0.9, doc="Decay of the first moment.")
    b2: float = field("numbers", 0.95, doc="Decay of the second moment.")
    eps: float = field("numbers", 1e-8, doc="Added to the root of the second moment.")
    weight_decay: float = field("numbers", 0.1, doc="AdamW's decay, times the rate.")
    table_learning_rate_scale: float = field(
        "numbers", 1.0, doc="Learning rate of tables over that of other parameters."
    )
    decay_tables: bool = field(
        "numbers", True, doc="Whether weight_decay is for tables."
    )
    clip_norm: float = field(
        "numbers", 1.0, doc="Largest global norm of the gradient; 0: no clipping."
    )
    table_state: str = field(
        "numbers", "full", doc="full | lean: how tables and their moments are kept."
    )
    table_state_options: Any = field(
        "numbers", None, doc="What is leaner.", options=TABLE_STATES
    )

    def __post_init__(self):
        config_lib.freeze(self, "optimizer")
        rates = ("learning_rate", "weight_decay", "table_learning_rate_scale")
        others = ("warmup_steps", "clip_norm")
        config_lib.at_least(self, "optimizer", 0, *rates, *others)
        _require(0 <= self.b1 < 1, "b1", self, "in [0, 1)")
        _require(0 <= self.b2 < 1, "b2", self, "in [0, 1)")
        _require(self.eps > 0, "eps", self, "above 0")

    @property
    def table_entry_bytes(self) -> int:
        """Bytes that one entry of a table and its moments take; 4 / F more for 'row'."""
        tables = self.table_state_options
        moment = {"float32": 4, "bfloat16": 2, "none": 0}[tables.moment_dtype]
        second = 4 if tables.second_moment == "full" else 0
        return jnp.dtype(tables.dtype).itemsize + moment + second


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
    relative_rate = rates.relative(config, num_steps)

    def init(params):
        moments = jax.tree.map(
            lambda p, group: _no_moments(config.table_state_options, group, p),
            params,
            groups,
        )
        first, second = _unzipped(moments, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), first, second)

    def update(grads, state, params, *, hyperparams=None, **unused_extra):
        now = rates.scalars(config, relative_rate, count(state), hyperparams)

        def step(g, m, v, p, group):
            u, m, v = _adam(config, g, m, v, now.unbias)
            rate, decay = rates.rate_and_decay(config, group, now)
            if decay is not None:
                u = u + decay * p
            return -rate * u, m, v

        grads = _clipped(config, grads)
        stepped = jax.tree.map(step, grads, state.mu, state.nu, params, groups)
        updates, first, second = _unzipped(stepped, params)
        return updates, optax.ScaleByAdamState(now.number, first, second)

    return optax.GradientTransformationExtraArgs(init, update)


def state_specs(state: Any, params: Params, specs: Any) -> Any:
    """PartitionSpecs of `init(params)`: a moment lies as its parameter does.

    `specs` are the parameters'; an axis that a moment has summed up is not split.
    """

    def moment(p, m, spec):
        axes = zip(p.shape, m.shape, (*spec, *(None,) * p.ndim), strict=False)
        return P(*(axis if size == kept else None for size, kept, axis in axes))

    first, second = (
        jax.tree.map(moment, params, moments, specs) for moments in (state.mu, state.nu)
    )
    return optax.ScaleByAdamState(P(), first, second)


def norm(grads: Params) -> Array:
    """The Euclidean norm over all leaves, in float32 whatever they are kept in."""
    return optax.tree.norm(jax.tree.map(_float32, grads))


def _unzipped(tuples, params):
    """A tree of tuples in the place of parameters -> a tuple of trees."""
    return jax.tree.transpose(jax.tree.structure(params), None, tuples)


def _no_moments(tables, group, p):
    """(m, v) of a parameter that has seen no gradient."""
    first, second = p.shape, p.shape
    dtype = "float32"
    if group == "tables":
        dtype = tables.moment_dtype
        if dtype == "none":
            first, dtype = (1,) * p.ndim, "float32"
        if tables.second_moment == "row":
            second = (*p.shape[:-1], 1)
    return jnp.zeros(first, dtype), jnp.zeros(second, jnp.float32)


def _adam(config, g, m, v, unbias):
    """(u, m, v) of one parameter, with m and v in the shapes and types that they came in."""
    squares = jnp.square(g)
    if v.shape != g.shape:
        squares = jnp.mean(squares, axis=-1, keepdims=True)
    v = (1 - config.b2) * squares + config.b2 * v
    root = jnp.sqrt(v / unbias[1]) + config.eps
    if m.shape != g.shape:
        return g / root, m, v
    new = (1 - config.b1) * g + config.b1 * m.astype(jnp.float32)
    return (new / unbias[0]) / root, new.astype(m.dtype), v


def hyperparams(config: OptimizerConfig) -> dict[str, Array]:
    """Return the traced inputs of `make(...).update`: peak learning rate, weight decay."""
    return {
        "learning_rate": jnp.float32(config.learning_rate),
        "weight_decay": jnp.float32(config.weight_decay),
    }


def schedule(config: OptimizerConfig, num_steps: int) -> Callable[[Array | int], Array]:
    """Return `step -> learning rate`; step 0 is the first update.

    See `schedules`. Raises `ConfigError` where the warm-up does not fit.
    """
    relative_rate = rates.relative(config, num_steps)
    return lambda step: config.learning_rate * relative_rate(step)


def count(opt_state: Any) -> Array:
    """Return the number of updates that `opt_state` has seen (int32 scalar)."""
    return optax.tree.get(opt_state, "count")


def _clipped(config: OptimizerConfig, grads: Params) -> Params:
    # One factor for all: XLA folds a multiplication into the moments' loops, while
    # optax's `clip_by_global_norm`, with its division, costs a pass over memory.
    grads = jax.tree.map(_float32, grads)
    if not config.clip_norm:
        return grads
    factor = rates.clip_factor(config, norm(grads))
    return jax.tree.map(lambda g: g * factor, grads)


def _float32(x: Array) -> Array:
    # `astype` on an abstract value would fail, and eval_shape calls us with those traced.
    return x if x.dtype == jnp.float32 else x.astype(jnp.float32)


def _require(holds: bool, field: str, config: OptimizerConfig, wanted: str) -> None:
    if not holds:
        value = getattr(config, field)
        raise ConfigError(f"optimizer.{field}={value!r}: must be {wanted}.")
