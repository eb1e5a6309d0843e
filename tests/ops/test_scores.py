"""Every score, known or made up, on everything that computes a memory layer: right or refused.

Never silently another score: what has the formula in a language of its own must say which
scores it has.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toy

from memoryformer import model
from memoryformer.convert import reference_reader, trees
from memoryformer.ops import hashing, lookup
from memoryformer.ops.lookup import gpu as lookup_gpu
from memoryformer.ops.lookup import narrow as narrow_rows
from memoryformer.ops.lookup import native as lookup_native

TEMPERATURE = 0.8
BETA, GAMMA = 1.3, 0.7
MADE_UP = {  # of other powers and exponents; the last one trained
    "squared": (2, 1),
    "squared_norm": (2, 0),
    "sharper": (1, 2),
    "learned_square": (2, None),
}
KINDS = (*hashing.SCORES, *MADE_UP)


@pytest.fixture(autouse=True)
def more_scores(monkeypatch):
    for kind, row in MADE_UP.items():
        monkeypatch.setitem(hashing.SCORES, kind, row)


def expected_scores(chunks, kind):
    """||z||_1^a * exp(gamma * sum_i log sigmoid(beta |z_i|)) in float64."""
    power, gamma = hashing.SCORES[kind]
    beta = 2 / TEMPERATURE
    if gamma is None:
        beta, gamma = BETA, GAMMA
    size = np.abs(np.asarray(chunks, np.float64))
    confidence = -np.log1p(np.exp(-beta * size)).sum(-1)
    return size.sum(-1) ** power * np.exp(gamma * confidence)


def operands():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 6)).astype(np.float32)
    tables = rng.normal(size=(3, 4, 7)).astype(np.float32)
    return x, tables


def by_lookup(implementation):
    def compute(x, tables, kind, learned):
        return lookup.memory_layer(
            jnp.asarray(x), tables, None, kind, TEMPERATURE, implementation, learned
        )

    return compute


def by_gpu_kernel(x, tables, kind, learned):
    chunks = hashing.split_chunks(jnp.asarray(x), 2)
    scores = hashing.scores(chunks, kind, TEMPERATURE, learned)
    return lookup_gpu.gpu(jnp.asarray(tables), hashing.hash_codes(chunks), scores, True)


def packed_as(kind_of_table):
    def compute(x, tables, kind, learned):
        stored = narrow_rows.pack_tables(tables, kind_of_table)
        return narrow_rows.memory_layer(x, stored, None, kind, TEMPERATURE, learned)

    return compute


def in_one_native_call(x, tables, kind, learned):
    power, gamma = hashing.SCORES[kind]
    beta, gamma = (2 / TEMPERATURE, gamma) if learned is None else learned
    x, tables = jnp.asarray(x), jnp.asarray(tables)
    return lookup_native.memory_layer(x, tables, None, None, power, beta, gamma)


def by_reader(x, tables, kind, learned):
    options = {"temperature": TEMPERATURE}
    config = toy.model_config("memory", score=kind, projection_options=options)
    config = dataclasses.asdict(config)
    params = {"layer.tables": tables}
    if learned:
        params |= {"layer.beta": learned[0], "layer.gamma": learned[1]}
    return reference_reader.Model(config, params)._project("layer", x[None])[0]


WAYS = {
    **{name: by_lookup(name) for name in lookup.IMPLEMENTATIONS},
    "gpu interpreted": by_gpu_kernel,
    "packed": packed_as("float32"),
    "native in one call": in_one_native_call,
    "reader": by_reader,
}
NATIVE = ("native", "native in one call")
REFUSED = {  # the whole of what may refuse, and whom
    "gpu": KINDS,  # there is none here
    "native in one call": ("squared", "squared_norm", "learned_square"),
    "reader": tuple(MADE_UP),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_right_or_refused(way, kind):
    """Mutations tried: `power not in POWERS` dropped from the native layer, or the choice of
    it in `narrow`; a default score in the reader.
    """
    if way in NATIVE and not lookup_native.available():
        pytest.skip("no C++ compiler")
    x, tables = operands()
    learned = None
    if hashing.is_learned(kind):
        learned = (jnp.float32(BETA), jnp.float32(GAMMA))
    if kind in REFUSED.get(way, ()):
        with pytest.raises(ValueError, match=r"score|lookup 'gpu' cannot run"):
            WAYS[way](x, tables, kind, learned)
        return
    y = np.asarray(WAYS[way](x, tables, kind, learned))
    chunks = x.reshape(5, 3, 2)
    scores = expected_scores(chunks, kind)
    rows = tables[np.arange(3), oracle.codes(chunks)]
    wanted = np.einsum("nk,nkf->nf", scores, rows.astype(np.float64))
    np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_formulas(kind):
    """In the chunks, beta and gamma, against jax's own rules for the same formula in float64.

    Mutation tried: the slope of ||z||^a left at a, which is right for 0 and 1 only.
    """
    power, gamma = hashing.SCORES[kind]
    trained = gamma is None
    start = (BETA, GAMMA) if trained else (2 / TEMPERATURE, gamma)

    def plain(chunks, beta, gamma):
        size = jnp.abs(chunks)
        sharpness = jnp.sum(jax.nn.log_sigmoid(beta * size), axis=-1)
        return jnp.sum(size, axis=-1) ** power * jnp.exp(gamma * sharpness)

    def ours(chunks, beta, gamma):
        learned = (beta, gamma) if trained else None
        return hashing.scores(chunks, kind, TEMPERATURE, learned)

    with jax.enable_x64(True):
        chunks = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, 2)))
        arguments = (chunks, *map(jnp.float64, start))
        which = (0, 1, 2) if trained else (0,)
        got, wanted = (
            jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums=which)(*arguments)
            for f in (ours, plain)
        )
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_a_made_up_score_trains_and_is_read_alike():
    """A whole model of a score that only `SCORES` knows: layers, packed weights, counting."""
    from memoryformer import accounting
    from memoryformer.model import narrow as narrow_lib

    config = toy.model_config("memory", score="learned_square", num_layers=1)
    params = model.init(config)
    tokens = np.arange(12, dtype=np.int32)[None] % config.vocab_size
    want = toy.forward(config, params, tokens)
    narrow = narrow_lib.prepare(config, params, narrow_lib.WeightKinds())
    np.testing.assert_allclose(
        toy.forward(config, narrow, tokens), want, rtol=2e-4, atol=2e-5
    )
    sizes = sum(leaf.size for leaf in trees.flatten(params).values())
    assert accounting.count(config).parameters.total == sizes
