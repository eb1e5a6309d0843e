"""Collectives over a named mesh axis that are the identity where that axis is not.

The model is written as one device's code. Inside `jax.shard_map` these functions talk to
the other devices of an axis; in a bare REPL, or on a mesh without that axis, they return
their argument. So nothing crosses an axis that is not written in the model.

An axis is present exactly if the surrounding `shard_map` made it manual.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memoryformer.notation import Array

# The axes of a mesh, one of which is there if its size is above 1: rows of a batch, rows again
# (where FSDP splits a second axis of each parameter), parts of each row, and the last axis of
# tables, kernels and activations.
AXES = DATA_AXIS, SHARD_AXIS, SEQUENCE_AXIS, MODEL_AXIS = (
    "data",
    "shard",
    "sequence",
    "model",
)
ROW_AXES = (DATA_AXIS, SHARD_AXIS)  # what splits the rows of a batch
TOKEN_AXES = (*ROW_AXES, SEQUENCE_AXIS)  # what splits its tokens


def axis_size(axis: str) -> int:
    """Number of devices along `axis`; 1 where there is no such axis."""
    return jax.lax.axis_size(axis) if _present(axis) else 1


def axis_index(axis: str) -> Array | int:
    """This device's place along `axis`; 0 where there is no such axis."""
    return jax.lax.axis_index(axis) if _present(axis) else 0


def psum(x: Array, axis: str | tuple[str, ...]) -> Array:
    """Sum over the devices of `axis`, or of all of several axes at once."""
    axes = (axis,) if isinstance(axis, str) else axis
    axes = tuple(filter(_present, axes))
    return jax.lax.psum(x, axes) if axes else x


def pmax(x: Array, axis: str) -> Array:
    """Maximum over the devices of `axis`; not differentiable."""
    return jax.lax.pmax(x, axis) if _present(axis) else x


def all_gather(x: Array, axis: str, dim: int) -> Array:
    """Join the devices' parts of dimension `dim`; its gradient is a reduce-scatter."""
    if not _present(axis):
        return x
    return jax.lax.all_gather(x, axis, axis=dim % x.ndim, tiled=True)


def reduce_scatter(x: Array, axis: str, dim: int) -> Array:
    """Sum over `axis`, and keep this device's part of dimension `dim`."""
    if not _present(axis):
        return x
    return jax.lax.psum_scatter(x, axis, scatter_dimension=dim % x.ndim, tiled=True)


def rotate(x: Any, axis: str) -> Any:
    """Give every array of a tree to the next device of `axis`, the last one to the first."""
    size = axis_size(axis)
    if size == 1:
        return x
    ring = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, ring), x)


def scan_before(combine: Callable[[Any, Any], Any], x: Any, axis: str) -> Any:
    """Combine the trees of all devices before this one along `axis`, in their order.

    `combine(left, right)` must be associative and have the tree of zeros, which the first
    device gets, as its neutral element. Each device sends log2 of the devices' number + 1
    trees.
    """
    size = axis_size(axis)
    if size == 1:
        return jax.tree.map(jnp.zeros_like, x)

    def from_before(x, distance):
        pairs = [(i, i + distance) for i in range(size - distance)]  # zeros elsewhere
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, pairs), x)

    x, reach = from_before(x, 1), 1
    while reach < size - 1:
        x, reach = combine(from_before(x, reach), x), 2 * reach
    return x


def mean(x: Array, axis: str) -> Array:
    """Mean over the last dimension, of which `axis` holds parts; keeps the dimension."""
    total = psum(jnp.sum(x, axis=-1, keepdims=True), axis)
    return total / (x.shape[-1] * axis_size(axis))


def _present(axis: str) -> bool:
    return axis in jax.sharding.get_abstract_mesh().manual_axes
