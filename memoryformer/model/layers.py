"""Modules that hold parameters: MemoryLayer, Dense, Embed, RMSNorm, LayerNorm.

Each reads like its equation and is written for one device. On a mesh with a `model` axis
its last axis is a device's part: activations [.., D / n], tables [K, C, F / n]. A memory
layer then sends only codes (1 or 2 bytes) and scores; a dense layer sends activations.

Every parameter says which field of `sharding.ShardingSpecs` splits it (`spec=`), and whether
weight decay shrinks it (`decay=`): weights do, scales, biases and scalars do not. Tables and
kernels also say what they are (`role=`, see `params.param_roles`). Start at `MemoryLayer`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.model import front as front_lib
from memoryformer.notation import Activations, Array, Float, Int, Tokens
from memoryformer.ops import collectives, hashing, lookup
from memoryformer.ops import remat as remat_lib


class MemoryLayer(nnx.Module):
    """y = sum_k s(z_k) * T_k[h(z_k)] + b  (Eq. 11): [.., D] -> [.., *features].

    1. Split x into K = D / tau chunks z_k; `model.front` may mix it first.
    2. The signs of a chunk are its code h(z_k); its score s(z_k) is `hashing.scores`.
    3. Sum the K rows that the codes select, weighted by their scores; with `rows_read` of 2
       also those across the least certain bits (`hashing.second_bucket`).

    `features` may be several axes, such as (3, D) for Q, K and V: they share one hash and
    one pass of row reads.
    """

    def __init__(
        self,
        in_features: int,
        features: int | tuple[int, ...],
        *,
        code_bits: int,
        score: str = "softmax",
        temperature: float = 1.0,
        implementation: str = "auto",
        use_bias: bool = False,
        table_std: float = 0.02,
        bias_std: float = 0.0,
        mix: str = "none",
        thresholds: bool = False,
        rows_read: int = 1,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        features = _as_tuple(features)
        shape = (in_features // code_bits, 1 << code_bits, *features)  # [K, C, F]
        self.code_bits = code_bits
        self.score = score
        self.temperature = temperature
        self.implementation = implementation
        self.rows_read = rows_read
        self.dtype = dtype
        self.keeps_codes = False  # see `model.codes`
        self.tables = nnx.Param(
            _normal(rngs, shape, table_std), spec="tables", decay=True, role="tables"
        )
        self.bias = _bias(rngs, features, use_bias, bias_std)
        self.front = front_lib.make(in_features, mix, thresholds, rngs=rngs)
        if hashing.is_learned(score):  # starts where beta is 2 / t and gamma 1
            beta, gamma = jnp.full((), 2.0 / temperature), jnp.ones(())
            self.beta = nnx.Param(beta, spec="whole", decay=False)
            self.gamma = nnx.Param(gamma, spec="whole", decay=False)

    def __call__(self, x: Activations) -> Array:
        """[.., D] -> [.., *features], in the layer's dtype."""
        codes, scores = self.addresses(x)
        if self.keeps_codes:
            first = codes if self.rows_read == 1 else codes[0]
            self.codes = nnx.Intermediate(first)  # [.., K / n]
        codes, scores = self._from_all_devices(codes, scores)  # [.., K]
        scores = remat_lib.name(scores, "scores")
        tables = self.tables[...].astype(self.dtype)
        num_tables, num_buckets, *features = tables.shape
        y = lookup.lookup(
            tables.reshape(num_tables, num_buckets, -1),
            codes,
            scores,
            self.implementation,
        )
        y = y if self.rows_read == 1 else jnp.sum(y, axis=0)
        y = y.reshape(*x.shape[:-1], *features)
        if self.bias is not None:
            y = y + align(self.bias[...], y.ndim)
        return remat_lib.name(y.astype(self.dtype), "projected")

    def addresses(
        self, x: Activations
    ) -> tuple[Int[Array, "*R K"], Float[Array, "*R K"]]:
        """Codes and scores of this device's part of x: [.., K / n], or [2, .., K / n], each."""
        chunks = hashing.split_chunks(self.hashed(x), self.code_bits)
        return hashing.addresses(
            chunks, self.score, self.temperature, self.learned(), self.rows_read
        )

    def hashed(self, x: Activations) -> Activations:
        """z, what is hashed: x itself, or what the layer's front makes of it."""
        return x if self.front is None else self.front(x)

    def learned(self) -> tuple[Array, Array] | None:
        """(beta, gamma) of a score that has them."""
        if not hashing.is_learned(self.score):
            return None
        return self.beta[...], self.gamma[...]

    def _from_all_devices(self, codes, scores):
        """Gather what the other devices' parts of x hash to, in as few bytes as it takes."""
        if collectives.axis_size(collectives.MODEL_AXIS) == 1:
            return remat_lib.name(codes, "codes"), scores
        small = jnp.uint8 if self.code_bits <= 8 else jnp.uint16
        codes = collectives.all_gather(codes.astype(small), collectives.MODEL_AXIS, -1)
        codes = remat_lib.name(codes, "codes")
        scores = collectives.all_gather(
            scores.astype(self.dtype), collectives.MODEL_AXIS, -1
        )
        return codes.astype(jnp.int32), scores


class Dense(nnx.Module):
    """y = x W + b: [.., D] -> [.., *features].

    On a `model` axis: by default W is split over its outputs, and x is gathered; with
    `split_inputs` W is split over its inputs, and the products are reduce-scattered.
    """

    def __init__(
        self,
        in_features: int,
        features: int | tuple[int, ...],
        *,
        use_bias: bool = True,
        kernel_std: float = 0.02,
        split_inputs: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        features = _as_tuple(features)
        self.features = features
        self.split_inputs = split_inputs
        self.dtype = dtype
        self.kernel = nnx.Param(
            _normal(rngs, (in_features, *features), kernel_std),
            spec="rows" if split_inputs else "columns",
            decay=True,
            role="dense",
        )
        self.bias = _bias(rngs, features, use_bias, 0.0)

    def __call__(self, x: Activations) -> Array:
        """[.., D] -> [.., *features], in the layer's dtype."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.split_inputs:
            y = jnp.tensordot(x, kernel, axes=1)
            y = collectives.reduce_scatter(y, collectives.MODEL_AXIS, -1)
        else:
            x = collectives.all_gather(x, collectives.MODEL_AXIS, -1)
            y = jnp.tensordot(x, kernel, axes=1)
        if self.bias is not None:
            y = y + align(self.bias[...].astype(self.dtype), y.ndim)
        return remat_lib.name(y, "projected")


class Embed(nnx.Module):
    """x = W[token]: int [B, L] -> [B, L, D]."""

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        *,
        std: float = 0.02,
        is_head: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.embedding = nnx.Param(
            _normal(rngs, (vocab_size, embed_dim), std),
            spec="vocabulary" if is_head else "columns",
            decay=True,
        )

    def __call__(self, tokens: Tokens) -> Activations:
        """[B, L] -> [B, L, D]; ids outside the vocabulary give NaN, never another row."""
        rows = jnp.take(self.embedding[...], tokens, axis=0, mode="fill")
        return rows.astype(self.dtype)

    def attend(self, x: Activations) -> Array:
        """Read the embedding as a head: [.., D] -> float32 [.., V]; see `Head`."""
        weights = self.embedding[...].astype(self.dtype)
        logits = jnp.einsum(
            "...d,vd->...v",
            x.astype(self.dtype),
            weights,
            preferred_element_type=jnp.float32,
        )
        return collectives.reduce_scatter(logits, collectives.MODEL_AXIS, -1)


class Head(nnx.Module):
    """logits = x W: [.., D] -> float32 [.., V], the only fully-connected layer left.

    On a `model` axis each device returns its part of the vocabulary.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        *,
        std: float = 0.02,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(
            _normal(rngs, (embed_dim, vocab_size), std),
            spec="columns",
            decay=True,
            role="head",
        )

    def __call__(self, x: Activations) -> Array:
        """[.., D] -> float32 [.., V]."""
        x = collectives.all_gather(x.astype(self.dtype), collectives.MODEL_AXIS, -1)
        kernel = self.kernel[...].astype(self.dtype)
        return jnp.einsum(
            "...d,dv->...v", x, kernel, preferred_element_type=jnp.float32
        )


class RMSNorm(nnx.Module):
    """y = x / (sqrt(mean(x^2)) + eps) * g; eps is added to the root, as released."""

    def __init__(self, features: int, *, eps: float = 1e-8):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,)), spec="last_axis", decay=False)

    def __call__(self, x: Activations) -> Activations:
        """[.., D] -> [.., D]; statistics in float32."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = collectives.mean(wide**2, collectives.MODEL_AXIS)
        y = wide / (jnp.sqrt(mean_square) + self.eps)
        return (y * align(self.scale[...], x.ndim)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * g + b."""

    def __init__(self, features: int, *, eps: float = 1e-5):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,)), spec="last_axis", decay=False)
        self.bias = nnx.Param(jnp.zeros((features,)), spec="last_axis", decay=False)

    def __call__(self, x: Activations) -> Activations:
        """[.., D] -> [.., D]; statistics in float32."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - collectives.mean(wide, collectives.MODEL_AXIS)
        variance = collectives.mean(centred**2, collectives.MODEL_AXIS)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        y = y * align(self.scale[...], x.ndim) + align(self.bias[...], x.ndim)
        return y.astype(x.dtype)


def _as_tuple(features: int | tuple[int, ...]) -> tuple[int, ...]:
    return features if isinstance(features, tuple) else (features,)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> Array:
    return std * jax.random.normal(rngs.params(), shape, jnp.float32)


def _bias(rngs, features, use_bias, std):
    if not use_bias:
        return None
    value = _normal(rngs, features, std) if std else jnp.zeros(features)
    return nnx.Param(value, spec="last_axis", decay=False)


def become(module: nnx.Module, cls: Any) -> None:
    """Give a module another class of the same fields, for its `__call__`."""
    object.__setattr__(module, "__class__", cls)  # flax's own setattr is for fields


def align(vector: Array, ndim: int) -> Array:
    """Add leading axes, so that broadcasting is written and never guessed."""
    return vector.reshape((1,) * (ndim - vector.ndim) + vector.shape)
