"""Tables as they are stored: in which type, and how an update is rounded to it.

Start at `stored` and `apply`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from memoryformer.notation import Array, Params
from memoryformer.training.optimizer import OptimizerConfig


def apply(
    config: OptimizerConfig,
    params: Params,
    updates: Params,
    groups: Any,
    seed: Array | int,
    step: Array,
) -> Params:
    """Add float32 updates, each sum in its parameter's type: p <- p + u.

    bfloat16 tables are rounded as `table_state_options.rounding` says; `seed` and `step` are all that
    stochastic rounding depends on.
    """
    if config.table_state_options.rounding == "nearest":
        return optax.apply_updates(params, updates)
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.random.split(key, len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))

    def add(p, u, group, key):
        total = p.astype(u.dtype) + u
        if group != "tables":
            return total.astype(p.dtype)
        return round_stochastically(total, jax.random.bits(key, p.shape, jnp.uint16))

    return jax.tree.map(add, params, updates, groups, keys)


def round_stochastically(x: Array, bits: Array) -> Array:
    """Round float32 to a bfloat16 neighbour, by 16 random bits: the mean is x.

    What is no number, and what has no upper neighbour, is rounded to nearest.
    """
    whole = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type(whole & jnp.uint32(0xFFFF0000), jnp.float32)
    good = jnp.isfinite(x) & jnp.isfinite(cut)
    return jnp.where(good, cut, x).astype(jnp.bfloat16)


def stored(config: OptimizerConfig, params: Params, groups: Any) -> Params:
    """Tables in the type that they are stored in, the rest as it is."""
    dtype = config.table_state_options.dtype
    return jax.tree.map(
        lambda p, group: p.astype(dtype) if group == "tables" else p, params, groups
    )
