"""Softmax attention: o_i = sum_j softmax_j(q_i . k_j / sqrt(E)) v_j over the allowed j.

`softmax` is the plain form, for every platform: logits and softmax in float32. `over_cache`
reads the filled part of a cache. `fused` computes the same for whole rows without storing
the logits:

    cudnn     GPU, bf16: `jax.nn.dot_product_attention`
    splash    TPU, length a multiple of 128: Pallas splash attention
    auto      the one that can run, else the plain form

Start at `softmax`.
"""

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from memoryformer.notation import Array, ArrayOrShape, Float, Int
from memoryformer.ops import only_on
from memoryformer.ops.lookup import native as lookup_native

_CUDA = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # with one of them cuDNN is there
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}
IMPLEMENTATIONS = ("xla", "cudnn", "splash", "auto")
SPLASH_BLOCK = 128
CACHE_BLOCK = 32  # keys that `over_cache` reads at a time; caches hold whole blocks
FEW = 4  # up to so many queries read a cache with the bits of each alone

_CACHES = (jnp.float32, jnp.bfloat16)  # types that native code reads

Transform = Callable[[Float[Array, "B H L M"], Array], Float[Array, "B H L M"]]


def causal_mask(
    query_index: Int[Array, "B L"],
    query_segments: Int[Array, "B L"],
    key_index: Int[Array, "B M"],
    key_segments: Int[Array, "B M"],
    *,
    causal: bool = True,
) -> Array:
    """True where a query may look: same document, and not ahead of it: bool [B, L, M].

    Indices count along the row (not inside a document); segment 0 is padding.
    """
    past = key_index[:, None, :] <= query_index[:, :, None]
    same = key_segments[:, None, :] == query_segments[:, :, None]
    seen = past & same if causal else same
    return seen & (key_segments[:, None, :] != 0)


def softmax(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B M H E"],
    v: Float[Array, "B M H E"],
    mask: Array,
    transform: Transform | None = None,
) -> Float[Array, "B L H E"]:
    """Attend with mask [B, L, M]; a query that may look nowhere gets zeros.

    `transform(logits, mask)` may change the scaled logits.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("blhe,bmhe->bhlm", q, k, preferred_element_type=dtype)
    logits = logits * q.shape[-1] ** -0.5
    mask = mask[:, None]  # [B, 1, L, M]
    if transform is not None:
        logits = transform(logits, mask)
    logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(logits, axis=-1)
    weights = jnp.where(jnp.any(mask, axis=-1, keepdims=True), weights, 0)
    return jnp.einsum("bhlm,bmhe->blhe", weights.astype(v.dtype), v)


def over_cache(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B H M E"],
    v: Float[Array, "B H M E"],
    query_index: Int[Array, "B L"],
    query_segments: Int[Array, "B L"],
    key_segments: Int[Array, "B M"],
    filled: Int[Array, ""],
) -> Float[Array, "B L H E"]:
    """Attend, by `causal_mask`, to the first `filled` keys; M is whole blocks.

    On CPU the blocks beyond them are not read, there is no gradient, up to `FEW` queries get the
    bits that each would get alone, and more are read by native code where it is built.
    """

    def all_at_once(q, k, v, query_index, query_segments, key_segments, filled):
        del (
            filled
        )  # an accelerator loses more by a loop of unknown length than by reads
        k, v = (jnp.swapaxes(x, 1, 2).astype(q.dtype) for x in (k, v))
        index = jnp.broadcast_to(jnp.arange(k.shape[1])[None], key_segments.shape)
        mask = causal_mask(query_index, query_segments, index, key_segments)
        return softmax(q, k, v, mask)

    operands = (q, k, v, query_index, query_segments, key_segments, filled)
    many = q.shape[1] > FEW and q.dtype in _CACHES and k.dtype in _CACHES
    # Built only where it will run.
    native = many and jax.default_backend() == "cpu" and lookup_native.available()
    on_cpu = _natively if native else _by_blocks
    return jax.lax.platform_dependent(*operands, cpu=on_cpu, default=all_at_once)


def _natively(q, k, v, query_index, query_segments, key_segments, filled):
    """The same as `_by_blocks` in one call (ops/lookup/native/attention_native.h)."""
    y = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    call = lookup_native.ffi_call("cache_attention", y, vmap_method="sequential")
    others = (query_index, query_segments, key_segments, filled)
    integers = (x.astype(jnp.int32) for x in others)
    return call(q.astype(jnp.float32), k, v, *integers).astype(q.dtype)


def _by_blocks(q, k, v, query_index, query_segments, key_segments, filled):
    """o = sum_j e^(l_j - max) v_j / sum_j e^(l_j - max), rescaled when the maximum grows."""
    batch_size, length, heads, width = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    narrow, q = q.dtype, q.astype(dtype)  # XLA CPU has no batched bfloat16 product

    def step(i, carry):
        largest, total, y = carry
        start = i * CACHE_BLOCK
        block = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=CACHE_BLOCK
        )
        keys, values = (block(x, axis=2).astype(q.dtype) for x in (k, v))
        segments = block(key_segments, axis=1)
        index = jnp.broadcast_to(start + jnp.arange(CACHE_BLOCK)[None], segments.shape)
        mask = causal_mask(query_index, query_segments, index, segments)[:, None]

        def products(q):
            # Keys stand first, so that the product reads them as they lie.
            spec = "bhme,blhe->bhml"
            logits = jnp.einsum(spec, keys, q, preferred_element_type=dtype)
            return jnp.swapaxes(logits, 2, 3)

        def reads(weights):
            spec = "bhlm,bhme->bhle"
            return jnp.einsum(spec, weights, values, preferred_element_type=dtype)

        logits = _each(products, q, axis=1)
        logits = jnp.where(mask, logits * width**-0.5, jnp.finfo(dtype).min)
        new = jnp.maximum(largest, jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.where(mask, jnp.exp(logits - new), 0)
        before = jnp.exp(largest - new)
        total = total * before + jnp.sum(weights, axis=-1, keepdims=True)
        read = _each(reads, weights.astype(narrow).astype(dtype), axis=2)
        return new, total, y * before + read

    rows = (batch_size, heads, length)
    largest = jnp.full((*rows, 1), jnp.finfo(dtype).min, dtype)
    carry = (largest, jnp.zeros((*rows, 1), dtype), jnp.zeros((*rows, width), dtype))
    blocks = (filled + CACHE_BLOCK - 1) // CACHE_BLOCK
    _, total, y = jax.lax.fori_loop(0, blocks, step, carry)
    y = jnp.where(total > 0, y / jnp.where(total > 0, total, 1), 0)
    return jnp.swapaxes(y, 1, 2).astype(narrow)


def _each(product, x, axis):
    """Product of each query of a few alone: XLA sums one in another order than several."""
    length = x.shape[axis]
    if length > FEW:
        return product(x)
    return jnp.concatenate(
        [product(part) for part in jnp.split(x, length, axis)], axis=2
    )


def why_not(
    implementation: str, q: Float[ArrayOrShape, "B L H E"], platform: str | None = None
) -> str:
    """Say why `fused` cannot serve q on a platform (None: this process's); '' if it can."""
    backend, dtype = platform or jax.default_backend(), q.dtype
    _, length, _, width = q.shape
    match implementation:
        case "cudnn" if backend != "gpu":
            return f"the platform is {backend}, not gpu"
        case "cudnn" if dtype != jnp.bfloat16:
            return f"the dtype is {dtype}, not bfloat16"
        case "cudnn" if width % 8 or width > 128:
            return f"the heads' width {width} is not a multiple of 8 up to 128"
        case "cudnn" if length % 2:  # its gradient, under a mask
            return f"the length {length} is odd"
        case "splash" if backend != "tpu":
            return f"the platform is {backend}, not tpu"
        case "splash" if length % SPLASH_BLOCK:
            return f"the length {length} is not a multiple of {SPLASH_BLOCK}"
    return ""


def fused(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B L H E"],
    v: Float[Array, "B L H E"],
    segment_ids: Int[Array, "B L"],
    implementation: str,
    *,
    interpret: bool = False,
) -> Float[Array, "B L H E"]:
    """Attend within whole rows by one of `IMPLEMENTATIONS`; padding gets zeros.

    Raises ValueError where `why_not` objects. `interpret` runs splash attention on any
    platform, slowly.
    """
    if implementation == "auto":
        able = (name for name in ("cudnn", "splash") if not why_not(name, q))
        implementation = next(able, "xla")
    elif implementation in PLATFORMS and not interpret:
        platform, what = PLATFORMS[implementation], f"attention {implementation!r}"
        reason = why_not(implementation, q, platform)
        if platform == "gpu" and not any(map(importlib.util.find_spec, _CUDA)):
            reason = reason or "jax's CUDA plugin, which brings cuDNN, is not installed"
        if reason:
            raise ValueError(f"{what} cannot run: {reason}.")
        segment_ids = only_on.platform(segment_ids, platform, what)
    if implementation == "splash":
        y = _splash(q, k, v, segment_ids, interpret)
    else:
        index = jnp.broadcast_to(jnp.arange(q.shape[1])[None], segment_ids.shape)
        mask = causal_mask(index, segment_ids, index, segment_ids)
        if implementation == "xla":
            return softmax(q, k, v, mask)
        y = jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], implementation="cudnn"
        )
    return jnp.where((segment_ids != 0)[..., None, None], y, 0)


def _splash(q, k, v, segment_ids, interpret):
    num_heads, length = q.shape[2], q.shape[1]
    causal = splash_attention.CausalMask((length, length))
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([causal] * num_heads), interpret=interpret
    )

    def one_row(q, k, v, segments):  # [H, L, E]
        segments = splash_attention.SegmentIds(q=segments, kv=segments)
        return kernel(q * q.shape[-1] ** -0.5, k, v, segment_ids=segments)

    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    return jnp.moveaxis(jax.vmap(one_row)(q, k, v, segment_ids), 1, 2)
