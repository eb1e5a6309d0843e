"""Converters around the layers of a merged model: narrow inputs and outputs, noise of reading.

    x' = Q(x, input_bits)             each vector over its own largest magnitude
    y' = Q(f(x') + n u xi, output_bits) + b

f is the layer without its bias b, n `output_noise`, and u the output of one full cell: the largest
input times w_max of the output's column (of all tables, for a memory layer, whose inputs are its
scores). Outputs are converted over `output_bound` u, beyond which they are clipped, or over their
own largest magnitude. A memory layer hashes x': what conversion does to signs, it does to codes.

Q has the levels of aihwkit's converters, steps of bound / (2^(bits - 1) - 1), of which one is 0
('mid_tread'). 'mid_rise' has steps of 2 bound / 2^bits and no level at 0: it keeps every sign.

For evaluation only: nothing here has a gradient that is meant. Start at `attach`.
"""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.model import Transformer, layers
from memoryformer.notation import Activations, Array

LEVELS = ("mid_tread", "mid_rise")
MAX_BITS = 16


@dataclasses.dataclass(frozen=True)
class Periphery:
    """Converters of a layer; the default has none.

    output_bound: in units of u; 0: the largest output of each vector.
    output_noise: standard deviation in units of u.
    """

    input_bits: int = 0  # 0: exact
    output_bits: int = 0
    output_bound: float = 0.0
    output_noise: float = 0.0
    levels: str = "mid_tread"

    def __post_init__(self):
        for name in ("input_bits", "output_bits"):
            bits = getattr(self, name)
            if bits and not 2 <= bits <= MAX_BITS:
                raise ConfigError(f"{name}={bits}: must be 0 or from 2 to {MAX_BITS}.")
        for name in ("output_bound", "output_noise"):
            if not 0 <= getattr(self, name) < 1e6:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more.")
        config_lib.choose(self.levels, LEVELS, "levels")


# Defaults of aihwkit 1.2: of inference tiles, and of its preset of hardware-aware training.
AIHWKIT = Periphery(7, 9, output_bound=12.0, output_noise=0.06)
AIHWKIT_TRAINED = Periphery(8, 8, output_bound=10.0, output_noise=0.04)


def quantise(x: Array, bits: int, bound: Array, levels: str) -> Array:
    """Round x to the nearest level inside [-bound, bound]; a bound of 0 keeps 0."""
    safe = jnp.where(bound > 0, bound, 1)
    if levels == "mid_rise":
        step = 2 * safe / 2**bits
        half = 2 ** (bits - 1)
        return (jnp.clip(jnp.floor(x / step), -half, half - 1) + 0.5) * step
    step = safe / (2 ** (bits - 1) - 1)
    return jnp.clip(jnp.round(x / step) * step, -safe, safe)


class _Noise(nnx.Variable):
    """A key of a layer."""


class _Converted(nnx.Module):
    """Before and after the equation of the layer that this is mixed into."""

    periphery: Periphery
    noise: Any

    def __call__(self, x: Activations) -> Array:
        """[.., D] -> [.., *features], in the layer's dtype."""
        converters = self.periphery
        if converters.input_bits:
            bound = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
            x = quantise(x, converters.input_bits, bound, converters.levels)
        whole = super().__call__(x)
        bias = getattr(self, "bias", None)
        offset = 0 if bias is None else layers.align(bias[...], whole.ndim)
        y = (whole - offset).astype(jnp.float32)
        unit = self._unit(x, y.ndim) if _needs_unit(converters) else jnp.ones(())
        if converters.output_noise:
            # Another draw for each call: it follows from the layer, the seed and the input.
            bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
            key = jax.random.fold_in(self.noise[...], jnp.sum(bits, dtype=jnp.uint32))
            spread = converters.output_noise * unit
            y = y + spread * jax.random.normal(key, y.shape)
        if converters.output_bits:
            flat = y.reshape(*x.shape[:-1], -1)
            largest = jnp.max(jnp.abs(flat), axis=-1)
            bound = largest.reshape(*x.shape[:-1], *(1,) * (y.ndim - x.ndim + 1))
            if converters.output_bound:
                bound = converters.output_bound * unit
            y = quantise(y, converters.output_bits, bound, converters.levels)
        return (y + offset).astype(whole.dtype)

    def _unit(self, x, ndim):
        raise NotImplementedError


class ConvertedDense(_Converted, layers.Dense):
    """A `Dense` between converters."""

    def _unit(self, x, ndim):
        largest = jnp.max(jnp.abs(x), axis=-1)
        columns = jnp.max(jnp.abs(self.kernel[...]), axis=0)
        largest = largest.reshape(*largest.shape, *(1,) * columns.ndim)
        return largest * layers.align(columns, ndim)


class ConvertedHead(_Converted, layers.Head):
    """A `Head` between converters."""

    _unit = ConvertedDense._unit


class ConvertedMemoryLayer(_Converted, layers.MemoryLayer):
    """A `MemoryLayer` between converters."""

    def _unit(self, x, ndim):
        _, scores = self.addresses(x)
        if self.rows_read > 1:
            scores = scores[0]  # those across weigh no more
        largest = jnp.max(scores, axis=-1)
        columns = jnp.max(jnp.abs(self.tables[...]), axis=(0, 1))
        largest = largest.reshape(*largest.shape, *(1,) * columns.ndim)
        return largest * layers.align(columns, ndim)


_CONVERTED = {
    layers.Dense: ConvertedDense,
    layers.Head: ConvertedHead,
    layers.MemoryLayer: ConvertedMemoryLayer,
}


def attach(model: Transformer, periphery: Periphery, seed: int | Array = 0) -> None:
    """Put converters around every memory layer, dense layer and untied head of `model`.

    Without any to put (`Periphery()`), the model stays as it is. seed: of the noise.
    """
    if periphery == Periphery():
        return
    for path, module in nnx.iter_modules(model, graph=False):
        converted = _CONVERTED.get(type(module))
        if converted is None:
            continue
        layers.become(module, converted)
        layer: Any = module
        layer.periphery = periphery
        name = ".".join(map(str, path)).encode()
        number = int.from_bytes(hashlib.sha256(name).digest()[:4], "little")
        layer.noise = _Noise(jax.random.fold_in(jax.random.key(seed), number))


def _needs_unit(periphery: Periphery) -> bool:
    return bool(periphery.output_noise or periphery.output_bound)
