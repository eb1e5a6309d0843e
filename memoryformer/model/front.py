"""What stands before the hash of a memory layer: z = mix(x) - t.

    mix          z from x                            multiply-adds a token  parameters
    none         x                                   0                      -
    hadamard     H (x * signs), `ops.hadamard`       D log2 n additions     D signs
    orthogonal   x R, R'R = I                        D^2                    D^2
    grouped      the columns of x in another order   0                      D numbers

Signs, R and the order are drawn with the model and are not trained: a chunk's signs have no
gradient that could. Thresholds t begin at 0 and are trained: the scores' gradient reaches them.
On a `model` axis a mix gathers x, which a memory layer without one never sends.
Start at `Front`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.notation import Activations, AnyArray
from memoryformer.ops import collectives, hadamard

MIXES = ("none", "hadamard", "orthogonal", "grouped")
PARAMETERS = ("signs", "rotation", "order", "thresholds")


class Front(nnx.Module):
    """z = mix(x) - t: [.., D] -> float32 [.., D]."""

    def __init__(self, width: int, mix: str, thresholds: bool, *, rngs: nnx.Rngs):
        self.mix = mix
        if mix == "hadamard":
            signs = jax.random.rademacher(rngs.params(), (width,), jnp.float32)
            self.signs = nnx.Param(signs, spec="last_axis", trained=False)
        elif mix == "orthogonal":
            rotation = jax.random.orthogonal(rngs.params(), width)
            self.rotation = nnx.Param(rotation, spec="columns", trained=False)
        elif mix == "grouped":  # whole numbers, exact in float32 up to 2^24
            order = jax.random.permutation(rngs.params(), width).astype(jnp.float32)
            self.order = nnx.Param(order, spec="last_axis", trained=False)
        start = jnp.zeros((width,))
        self.thresholds = (
            nnx.Param(start, spec="last_axis", decay=False) if thresholds else None
        )

    def __call__(self, x: Activations) -> Activations:
        """[.., D] -> float32 [.., D]."""
        variables = {name: getattr(self, name, None) for name in PARAMETERS}
        arrays = {name: v[...] for name, v in variables.items() if v is not None}
        return transform(x, self.mix, arrays)


def transform(x: Activations, mix: str, arrays: Mapping[str, AnyArray]) -> Activations:
    """mix(x) - t in float32, of a front's parameters by name: [.., D] -> [.., D]."""
    z = _mixed(x.astype(jnp.promote_types(x.dtype, jnp.float32)), mix, arrays)
    if "thresholds" not in arrays:
        return z
    return z - _align(arrays["thresholds"], z.ndim)


def _mixed(x, mix, arrays):
    if mix == "hadamard":
        width = x.shape[-1]  # of this device
        z = hadamard.transform(_gathered(x * _align(arrays["signs"], x.ndim)))
        first = width * collectives.axis_index(collectives.MODEL_AXIS)
        return jax.lax.dynamic_slice_in_dim(z, first, width, axis=-1)
    if mix == "orthogonal":
        return jnp.tensordot(_gathered(x), jnp.asarray(arrays["rotation"]), axes=1)
    if mix == "grouped":
        order = jnp.asarray(arrays["order"]).astype(jnp.int32)
        return jnp.take(_gathered(x), order, axis=-1)
    return x


def _gathered(x):
    return collectives.all_gather(x, collectives.MODEL_AXIS, -1)


def _align(vector, ndim):
    return jnp.asarray(vector).reshape((1,) * (ndim - 1) + (-1,))


def make(width: int, mix: str, thresholds: bool, *, rngs: nnx.Rngs) -> Front | None:
    """Return the front of a layer, None where x is hashed as it is."""
    if mix == "none" and not thresholds:
        return None
    return Front(width, mix, thresholds, rngs=rngs)
