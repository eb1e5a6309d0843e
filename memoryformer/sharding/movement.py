"""What FSDP sends inside `Sharding.shard_map`: parameters joined, gradients summed.

Start at `gather_params`.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from memoryformer.notation import Params
from memoryformer.ops import collectives
from memoryformer.ops.collectives import AXES, ROW_AXES, SHARD_AXIS


def gather_params(params: Params, specs: Any) -> Params:
    """Join what FSDP split over `data` and `shard`, once a step."""

    def gather(param, spec):
        for axis, dim in _fsdp_splits(spec):
            param = collectives.all_gather(param, axis, dim)
        return param

    return jax.tree.map(gather, params, specs)


def sum_gradients(grads: Params, specs: Any, axes: Sequence[str] = AXES) -> Params:
    """Add up the devices' gradients, leaving each device what it stores.

    Over an axis that splits the parameter the gradient is whole already, or, for FSDP's
    axes, a reduce-scatter keeps this device's part. The other axes are summed over at once.
    Sums are in float32; what one device computes alone stays as it is.
    """

    def reduce(grad, spec):
        split = {axis for entry in spec for axis in axes_of(entry)}
        summed = [axis for axis in axes if axis in ROW_AXES or axis not in split]
        if any(collectives.axis_size(axis) > 1 for axis in summed):
            grad = grad.astype(jax.numpy.promote_types(grad.dtype, "float32"))
        for axis, dim in reversed(_fsdp_splits(spec)):
            if axis in axes:
                grad = collectives.reduce_scatter(grad, axis, dim)
        return collectives.psum(grad, tuple(axis for axis in axes if axis not in split))

    return jax.tree.map(reduce, grads, specs)


def _fsdp_splits(spec: P) -> list[tuple[str, int]]:
    """[(axis, dimension)] of what is joined for a step, in the order of joining."""
    splits = [
        (axis, dim)
        for dim, entry in enumerate(spec)
        for axis in axes_of(entry)
        if axis in ROW_AXES
    ]
    return sorted(splits, key=lambda split: split[0] != SHARD_AXIS)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a spec names."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()
