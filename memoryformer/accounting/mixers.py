"""What each sequence mixer costs without its projections; see `accounting`.

Multiply-adds of one sequence of L tokens, H heads of width E (D = H E in all):

    softmax         2 L^2 D                 trained_kernel  2 L (E D + network of q and k)
    linear          2 L E D                 linformer       4 L m D      m slots
    cosformer       4 L E D                 luna            4 L m D
    performer       4 L M D    M features   conv_luna       4 L m D + 2 L W D   window W

An element of a running sum costs one to write and one to read. Denominators, softmaxes and
rotary positions are not counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from memoryformer.ops.attention import CACHE_BLOCK

Shape = Any  # an `accounting.Shape`


@dataclasses.dataclass(frozen=True)
class Mixer:
    """Cost of one sequence mixer without its projections."""

    multiply_adds: int  # over one sequence of L tokens
    state_values: int  # kept per sequence to decode at context L
    parameters: int = 0
    state_value_bytes: int = 0  # 4 for sums, kept in float32; 0: `value_bytes`


def _softmax(shape: Shape) -> Mixer:
    length, width = shape.seq_len, shape.embed_dim
    cached = length + -length % CACHE_BLOCK
    pair, parameters = 0, 0
    if shape.logit_transform == "dape_v2":  # two convolutions for each query and key
        heads, hidden = shape.num_heads, shape.dape_width
        pair = 3 * (2 * heads * hidden + hidden * heads)
        parameters = pair + hidden
    return Mixer(
        multiply_adds=length * length * (2 * width + pair),
        state_values=2 * cached * width,  # keys and values, in whole blocks
        parameters=parameters,
    )


def _kernel(
    shape: Shape, width: int, features: int = 0, parameters: int = 0, extra: int = 0
) -> Mixer:
    """Kernel attention with `width` features a head, which cost `features` a token.

    One product writes to the sums and one reads them; the denominator is not counted.
    """
    per_token = 2 * width * shape.embed_dim + features
    return Mixer(
        multiply_adds=shape.seq_len * per_token,
        state_values=shape.num_heads * (width * (shape.head_dim + 1) + extra),
        parameters=parameters,
        state_value_bytes=4,
    )


def _trained_kernel(shape: Shape) -> Mixer:
    width = shape.head_dim
    rank = max(1, width // 4)
    network = shape.num_heads * shape.trained_kernel_layers
    network *= width * width + 2 * width * rank
    return _kernel(shape, width, features=2 * network, parameters=network)


def _performer(shape: Shape) -> Mixer:
    features = shape.performer_features
    projections = 2 * features * shape.embed_dim  # of queries and keys
    return _kernel(shape, features, features=projections, extra=1)  # a running maximum


def _linformer(shape: Shape) -> Mixer:
    slots, width = shape.linformer_slots, shape.embed_dim
    return Mixer(
        multiply_adds=shape.seq_len * 4 * slots * width,
        state_values=2 * slots * width,
        parameters=2 * slots * (shape.linformer_max_len or shape.seq_len),
        state_value_bytes=4,
    )


def _luna(shape: Shape) -> Mixer:
    slots, width = shape.luna_slots, shape.embed_dim
    return Mixer(
        multiply_adds=shape.seq_len * 4 * slots * width,
        state_values=slots * width,
        parameters=slots * width,
        state_value_bytes=4,
    )


def _conv_luna(shape: Shape) -> Mixer:
    luna, window = _luna(shape), shape.conv_luna_width
    taps = window if shape.conv_luna_filter == "conv" else 0
    filters = 2 * taps * shape.embed_dim * shape.seq_len
    return dataclasses.replace(
        luna,
        multiply_adds=luna.multiply_adds + filters,
        state_values=luna.state_values + 2 * (window - 1) * shape.embed_dim,
        parameters=luna.parameters + taps * shape.num_heads + 2,  # and two temperatures
    )


# One function per mixer; a new mixer adds its line here.
MIXERS: dict[str, Callable[[Shape], Mixer]] = {
    "softmax": _softmax,
    "linear": lambda shape: _kernel(shape, shape.head_dim),
    "cosformer": lambda shape: _kernel(shape, 2 * shape.head_dim),
    "trained_kernel": _trained_kernel,
    "performer": _performer,
    "linformer": _linformer,
    "luna": _luna,
    "conv_luna": _conv_luna,
}
