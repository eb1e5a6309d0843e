"""The head and its loss on a CPU, in C++, with gradients and without logits in memory.

    nats = sum_n w[n] (log sum_v exp(x[n] . W[:, v]) - x[n] . W[:, t[n]])
    dl = w (softmax(x W) - onehot(t));   dx = dl W';   dW = x' dl

The gradients are computed with the loss, tile by tile of tokens, while the logits of a tile are in
a cache: 6 N D V operations, and 8 bytes of memory for each of the N V logits, where XLA moves some
40 and takes the slower of its two libraries for dW. Start at `sum_of_nats`.
"""

import jax
import jax.numpy as jnp

from memoryformer.notation import Array, Float, Int
from memoryformer.ops.lookup import native


@jax.custom_vjp
def sum_of_nats(
    x: Float[Array, "N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
) -> Float[Array, ""]:
    """Return the weighted nats of all targets; tokens without weight count nothing.

    All in float32. Differentiable in x and kernel. Raises RuntimeError without a compiler.
    """
    return _call(x, kernel, targets, weights)[0]


def _call(x, kernel, targets, weights):
    results = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((), x.shape, kernel.shape)
    ]
    call = native.ffi_call("head_nats", results, vmap_method="sequential")
    return call(x, kernel, targets.astype(jnp.int32), weights)


def _forward(*operands):
    nats, dx, dkernel = _call(*operands)
    return nats, (dx, dkernel)


def _backward(gradients, dnats):
    dx, dkernel = gradients
    return dnats * dx, dnats * dkernel, None, None


sum_of_nats.defvjp(_forward, _backward)
