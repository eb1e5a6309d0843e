"""AdamW in C++ on a CPU: all parameters and moments in one pass over them, in place.

    g  <- g / weight * factor
    m  <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    p  <- p - rate * ((m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + decay * p)

28 bytes of memory are moved for each parameter, against 60 and more where XLA computes it, which
writes quotients, and new arrays beside the old ones. The operations and their order are those of
`training.optimizer`, so that only what a compiler contracts can differ. What is updated should be
donated: XLA copies it first if not. Start at `update`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryformer.notation import Array, Float
from memoryformer.ops.lookup import native

Leaves = Sequence[Array]


class Knobs(NamedTuple):
    """The scalars of an update, float32; `rest1` is 1 - b1, `unbias1` is 1 - b1^t."""

    weight: Array
    factor: Array | float
    unbias1: Array
    unbias2: Array
    b1: float
    rest1: float
    b2: float
    rest2: float
    eps: float


def norm(gradients: Leaves) -> Float[Array, ""]:
    """Return the Euclidean norm of float32 arrays; whatever the threads, the same bits."""
    result = jax.ShapeDtypeStruct((), jnp.float32)
    return native.ffi_call("gradient_norm", result)(*gradients)


def update(
    wanted: Array,
    knobs: Knobs,
    rates: Float[Array, " n"],
    decays: Float[Array, " n"],
    gradients: Leaves,
    stored: tuple[Leaves, Leaves, Leaves],
) -> tuple[list[Array], list[Array], list[Array]]:
    """Return the n parameters and their moments after one step, in the places of `stored`.

    wanted: a bool; without it all stays as it is. rates, decays: of each parameter. stored:
    parameters, first and second moments. All arrays are float32, of the shapes of `gradients`.
    """
    count = len(gradients)
    scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in knobs])
    places = [array for leaves in stored for array in leaves]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in places]
    first = 4 + count  # the arguments before `places`
    call = native.ffi_call(
        "adamw",
        results,
        input_output_aliases={first + i: i for i in range(3 * count)},
    )
    flat = call(wanted, scalars, rates, decays, *gradients, *places)
    return flat[:count], flat[count : 2 * count], flat[2 * count :]
