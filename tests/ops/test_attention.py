"""Attention that never stores its logits, and where it cannot run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoryformer import errors, model
from memoryformer.ops import attention
from memoryformer.ops.lookup import native as lookup_native

SEGMENTS = np.array([[1] * 50 + [2] * 60 + [0] * 18], np.int32)


def _qkv(length=128, width=32):
    rng = np.random.default_rng(0)
    shape = (1, length, 2, width)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))


def test_splash_is_the_plain_form():
    """In interpret mode. Red without the scale, the documents, or zeros for padding."""
    q, k, v = _qkv()
    want = attention.fused(q, k, v, jnp.asarray(SEGMENTS), "xla")
    got = attention.fused(q, k, v, jnp.asarray(SEGMENTS), "splash", interpret=True)
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
    index, own, places, segments = map(jnp.asarray, (index, own, places, segments))
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


def _cache(batch_size, length, heads, width, filled, room):
    """Queries at the end of a cache in documents, with padding among both; NaN in blocks beyond."""
    rng = np.random.default_rng(length)
    q = 3 * rng.standard_normal((batch_size, length, heads, width), np.float32)
    k, v = rng.standard_normal((2, batch_size, heads, room, width), np.float32)
    unread = filled + -filled % attention.CACHE_BLOCK
    k[:, :, unread:] = v[:, :, unread:] = np.nan
    segments = np.sort(rng.integers(0, 4, (batch_size, room)), axis=1).astype(np.int32)
    segments[0] = 1  # one document, whose keys need no mask
    segments[:, filled:] = 0
    index = np.arange(filled - length, filled, dtype=np.int32)
    own = segments[:, index].copy()
    own[:, 2] = 0
    index = np.tile(index, (batch_size, 1))
    return q, k, v, index, own, segments, np.int32(filled)


def _attended(q, k, v, index, own, segments, filled):
    """The definition in float64, and zeros for queries that see nothing."""
    q, k, v = (np.nan_to_num(x).astype(np.float64) for x in (q, k, v))
    places = np.arange(segments.shape[1])
    seen = (places <= index[..., None]) & (segments[:, None] == own[..., None])
    seen &= (own[..., None] != 0) & (places < filled)
    logits = np.einsum("blhe,bhme->bhlm", q, k) / q.shape[-1] ** 0.5
    weights = np.where(seen[:, None], np.exp(logits), 0)
    total = np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bhlm,bhme->blhe", weights / total, v)


@pytest.mark.skipif(not lookup_native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("instructions", lookup_native.INSTRUCTION_SETS)
def test_many_queries_read_a_cache_natively(instructions):
    """Ragged lengths, widths and blocks of keys, as the blocks of XLA have it.

    Mutations: `index` one less; sums not rescaled where the maximum grows; every key of a
    block in the query's document; the last keys of a block forgotten.
    """
    lookup_native.configure(instruction_set=instructions)
    for shape in (
        (2, 5, 1, 3, 5, 32),
        (2, 70, 3, 20, 290, 320),
        (1, 130, 2, 64, 130, 160),
    ):
        operands = _cache(*shape)
        q, k, v, *others = map(jnp.asarray, operands)
        want = _attended(*operands)
        got = attention.over_cache(q, k, v, *others)
        np.testing.assert_allclose(got, want, atol=1e-5)
        by_blocks = attention._by_blocks(q, k, v, *others)
        np.testing.assert_allclose(by_blocks, want, atol=1e-5)
        k, v = (x.astype(jnp.bfloat16) for x in (k, v))
        narrow = [np.asarray(x, np.float64) for x in (k, v)]
        got = attention.over_cache(q.astype(jnp.bfloat16), k, v, *others)
        assert got.dtype == jnp.bfloat16
        q = np.asarray(q.astype(jnp.bfloat16), np.float64)
        want = _attended(q, *narrow, *operands[3:])
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=2e-2)
    lookup_native.configure()


@pytest.mark.parametrize("implementation", ["cudnn", "splash"])
def test_what_is_named_is_never_replaced(implementation):
    """On CPU neither can run; 'auto' takes the plain form. Red if one falls back.

    Both are traced, for a program may be compiled for another platform; `why_not` is asked
    about shapes first.
    """
    q, k, v = (x.astype(jnp.bfloat16) for x in _qkv(128))
    trace = jax.jit(attention.fused, static_argnums=4).trace
    with pytest.raises(ValueError, match=f"attention {implementation!r} cannot run: "):
        trace(q, k, v, jnp.asarray(SEGMENTS), implementation).lower()  # for this CPU
    with pytest.raises(ValueError, match=f"{implementation!r} cannot run: the "):
        trace(
            *(x[:, :9, :, :7] for x in (q, k, v)),
            jnp.asarray(SEGMENTS[:, :9]),
            implementation,
        )
    got = attention.fused(q, k, v, jnp.asarray(SEGMENTS), "auto")
    want = attention.fused(q, k, v, jnp.asarray(SEGMENTS), "xla")
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


@pytest.mark.parametrize(
    "implementation, dtype, length, width, platform, reason",
    [
        ("cudnn", "bfloat16", 8, 128, "gpu", ""),
        ("cudnn", "bfloat16", 8, 8, "gpu", ""),
        ("cudnn", "bfloat16", 8, 64, "tpu", "the platform is tpu, not gpu"),
        ("cudnn", "float32", 8, 64, "gpu", "the dtype is float32, not bfloat16"),
        ("cudnn", "bfloat16", 8, 136, "gpu", "the heads' width 136 is not"),
        (
            "cudnn",
            "bfloat16",
            8,
            12,
            "gpu",
            "the heads' width 12 is not a multiple of 8",
        ),
        ("cudnn", "bfloat16", 7, 64, "gpu", "the length 7 is odd"),
        ("splash", "float32", 256, 64, "tpu", ""),
        ("splash", "float32", 128, 64, "gpu", "the platform is gpu, not tpu"),
        (
            "splash",
            "float32",
            129,
            64,
            "tpu",
            "the length 129 is not a multiple of 128",
        ),
        ("splash", "float32", 64, 64, "tpu", "the length 64 is not a multiple of 128"),
        ("xla", "float32", 7, 3, "cpu", ""),
        ("auto", "float32", 7, 3, "cpu", ""),
    ],
)
def test_where_fused_attention_runs(
    implementation, dtype, length, width, platform, reason
):
    """Both sides of each edge. Mutations: `and` for `or`; 9 for 8; `>=` for `>`."""
    q = jnp.zeros((1, length, 2, width), dtype)
    found = attention.why_not(implementation, q, platform)
    assert found.startswith(reason) and bool(found) == bool(reason)
    if platform != "cpu":  # asked of this machine
        assert "the platform is cpu" in attention.why_not(implementation, q)


def test_what_auto_takes(monkeypatch):
    """cuDNN where it runs, with its zeros for padding; the plain form elsewhere.

    Mutations: `not` left out; the mask not handed on; padding left as it comes.
    """
    seen = []

    def theirs(q, k, v, *, mask, implementation):
        seen.append((mask.shape, implementation))
        return jnp.ones_like(q)

    monkeypatch.setattr(jax.nn, "dot_product_attention", theirs)
    (q, k, v), segments = _qkv(), jnp.asarray(SEGMENTS)
    wide = attention.fused(q, k, v, segments, "auto")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(attention.fused(q, k, v, segments, "auto"), wide)
    assert not seen
    half = (x.astype(jnp.bfloat16) for x in (q, k, v))
    y = np.asarray(attention.fused(*half, segments, "auto"), np.float32)
    assert seen == [((1, 1, 128, 128), "cudnn")]
    assert (y[SEGMENTS != 0] == 1).all() and (y[SEGMENTS == 0] == 0).all()


def test_without_the_cuda_plugin(monkeypatch):
    """What is wrong with the shapes comes first. Mutations: `and` for `or`; `all`."""
    monkeypatch.setattr(
        attention.only_on, "platform", lambda segments, platform, what: segments
    )
    q, k, v = (x.astype(jnp.bfloat16) for x in _qkv())
    segments = jnp.asarray(SEGMENTS)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="CUDA plugin, which brings cuDNN, is not inst"
    ):
        attention.fused(q, k, v, segments, "cudnn")
    with pytest.raises(ValueError, match="the length 127 is odd"):
        attention.fused(*(x[:, 1:] for x in (q, k, v)), segments[:, 1:], "cudnn")
    monkeypatch.setattr(
        attention.importlib.util, "find_spec", lambda name: "cuda13" in name or None
    )
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **options: jnp.ones_like(q)
    )
    assert attention.fused(q, k, v, segments, "cudnn").any()


def test_a_cache_read_all_at_once(monkeypatch):
    """As an accelerator does, from keys and values by head and of another type.

    Mutations: axes not swapped; the mask of another document.
    """
    (q, k, v), here = _qkv(), np.where(np.arange(128) < 40, 1, 0)[None]
    arguments = (
        q[:, 30:40],
        *(jnp.swapaxes(x, 1, 2) for x in (k, v)),
        jnp.arange(30, 40)[None],
        jnp.ones((1, 10), jnp.int32),
        jnp.asarray(here),
        jnp.int32(40),
    )
    wanted = attention.over_cache(*arguments)
    monkeypatch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *operands, cpu, default: default(*operands),
    )
    got = attention.over_cache(*arguments)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
