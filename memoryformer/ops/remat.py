"""A stack of layers: what each keeps for its gradient, and a Python loop or `lax.scan`.

    remat          kept between a layer's forward and backward pass
    none           everything the gradient reads
    projections    what projections put out, and what `codes` keeps
    codes          codes and scores of memory layers, and what attention (any mixer) read
                   along the sequence: all that other devices had a part in, so that nothing is
                   sent twice
    full           the layer's input

What is not kept is computed again; results are the same. `name` marks what a row may keep:
`model.mixers.base` marks what was attended, `ops.ring` and the layers the rest. Start at `apply`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from memoryformer.notation import Array

_CODES = ("codes", "scores", "attended")
_KEPT = {"projections": (*_CODES, "projected"), "codes": _CODES, "full": ()}
REMAT = ("none", *_KEPT)
NAMES = _KEPT["projections"]  # everything that a policy may keep

Layer = Callable[
    [Any, Array], tuple[Array, Any]
]  # (params, x) -> x, something beside it


def name(x: Array, what: str) -> Array:
    """Mark x as one of the things that a policy may keep: a name of `NAMES`."""
    if what not in NAMES:
        raise ValueError(f"{what!r}: no policy keeps it; known: {', '.join(NAMES)}.")
    return checkpoint_name(x, what)


def rematerialise(layer: Layer, remat: str, *, scanned: bool = False) -> Layer:
    """Let the gradient of `layer` keep what `remat` says and compute the rest again."""
    if remat == "none":
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
    # A scan keeps the two passes apart by itself.
    return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)


def apply(
    layers: Sequence[Layer],
    params: Sequence[Any],
    x: Array,
    *,
    remat: str = "none",
    scan: bool = False,
) -> tuple[Array, list[Any]]:
    """x -> layers[n](params[n], .. layers[0](params[0], x)), and what each layer returns beside.

    With `scan` all layers must be one function of trees of the same shapes: it is traced
    and compiled once, and the parameters are copied into one stack [n, ..] each step.
    """
    if scan:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        layer = rematerialise(layers[0], remat, scanned=True)
        x, beside = jax.lax.scan(lambda x, params: layer(params, x), x, stacked)
        return x, [jax.tree.map(lambda a: a[i], beside) for i in range(len(layers))]  # noqa: B023
    besides = []
    for layer, layer_params in zip(layers, params, strict=True):
        x, beside = rematerialise(layer, remat)(layer_params, x)
        besides.append(beside)
    return x, besides
