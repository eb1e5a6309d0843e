"""Attention that never stores its logits, and where it cannot run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoryformer import errors, model
from memoryformer.ops import attention

SEGMENTS = np.array([[1] * 50 + [2] * 60 + [0] * 18], np.int32)


def _qkv(length=128, width=32):
    rng = np.random.default_rng(0)
    shape = (1, length, 2, width)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))


def test_splash_is_the_plain_form():
    """In interpret mode. Red without the scale, the documents, or zeros for padding."""
    q, k, v = _qkv()
    want = attention.fused(q, k, v, SEGMENTS, "xla")
    got = attention.fused(q, k, v, SEGMENTS, "splash", interpret=True)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert not np.any(np.asarray(got)[SEGMENTS == 0])


@pytest.mark.parametrize("filled", [1, 31, 32, 33, 100, 128])
def test_a_cache_is_read_as_far_as_it_is_filled(filled):
    """Equal to the plain form; what lies in blocks beyond is NaN and not seen.

    Mutation: a loop over all blocks; `largest` not carried from block to block.
    """
    (q, k, v), queries = _qkv(), min(filled, 5)
    here = np.arange(128) < filled
    segments = np.where(here, np.maximum(SEGMENTS, 1), 0)
    index = filled - queries + np.arange(queries, dtype=np.int32)[None]
    own = segments[:, filled - queries : filled].copy()
    own[:, 1:2] = 0  # padding reads nothing
    q = 10 * q[:, :queries]
    places = np.arange(128, dtype=np.int32)[None]
    mask = attention.causal_mask(index, own, places, segments)
    want = attention.softmax(q, k, v, mask)
    unread = (
        np.arange(128) >= -(-filled // attention.CACHE_BLOCK) * attention.CACHE_BLOCK
    )
    k, v = (
        jnp.swapaxes(jnp.where(unread[None, :, None, None], jnp.nan, x), 1, 2)
        for x in (k, v)
    )
    read = jax.jit(attention.over_cache)
    got = read(q, k, v, index, own, segments, jnp.int32(filled))
    np.testing.assert_allclose(got, want, atol=1e-5)  # logits of up to 60
    assert not np.any(np.asarray(got)[own == 0])


@pytest.mark.parametrize("implementation", ["cudnn", "splash"])
def test_what_is_named_is_never_replaced(implementation):
    """On CPU neither can run; 'auto' takes the plain form. Red if one falls back.

    Both are traced, for a program may be compiled for another platform; `why_not` is asked
    about shapes first.
    """
    q, k, v = (x.astype(jnp.bfloat16) for x in _qkv(128))
    trace = jax.jit(attention.fused, static_argnums=4).trace
    with pytest.raises(ValueError, match=f"attention {implementation!r} cannot run: "):
        trace(q, k, v, SEGMENTS, implementation).lower()  # for this CPU
    with pytest.raises(ValueError, match=f"{implementation!r} cannot run: the "):
        trace(*(x[:, :9, :, :7] for x in (q, k, v)), SEGMENTS[:, :9], implementation)
    got = attention.fused(q, k, v, SEGMENTS, "auto")
    want = attention.fused(q, k, v, SEGMENTS, "xla")
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("implementation", ["cudnn", "splash"])
def test_dape_is_refused_without_logits(implementation):
    """Red if the check is dropped: the transform would be ignored."""
    fields = {"vocab_size": 8, "embed_dim": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(errors.ConfigError, match="never forms the logits"):
        model.ModelConfig(
            **fields,
            seq_len=8,
            mixer_options={"logit_transform": "dape_v2", "attention": implementation},
        )
    with pytest.raises(errors.ConfigError, match=r"options.max_len=4.* 8 tokens"):
        model.ModelConfig(
            **fields, seq_len=8, mixer="cosformer", mixer_options={"max_len": 4}
        )
