"""All blocks in one native call: the equations in float64, and each token as if alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toy

from memoryformer.generation import sampler
from memoryformer.model import fused, mixers, narrow, params
from memoryformer.ops.lookup import narrow as narrow_rows
from memoryformer.ops.lookup import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
slow = pytest.mark.slow
FORMS = {
    "sequential": {},
    "parallel_layernorm": {
        "residual": "parallel",
        "norm": "layernorm",
        "norm_eps": 1e-5,
    },
    "eq13_output": {"residual": "eq13", "output_projection": True},
    "two_rows": {
        "projection_options": {"rows_read": 2},
        "rotary_fraction": 0.0,
        "norm_eps": 0.1,  # not that of the LayerNorm in the middle
    },
    "learned": {"score": "learned", "output_projection": True, "rotary_fraction": 1.0},
    "l1_without_bias": {"score": "l1", "projection_options": {"memory_bias": False}},
}
LENGTHS = (3, 1, 2)  # read one after another
TOKENS = np.random.default_rng(0).integers(0, 13, (2, sum(LENGTHS)))
SEGMENTS = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]], np.int32)


def make(**fields):
    """(config, drawn parameters) of a model that is read in one call."""
    config = toy.model_config(**({"lookup": "auto"} | fields))
    rng = np.random.default_rng(1)

    def leaf(path, ones):
        spread = 0.1 if path[-1].key in ("scale", "beta", "gamma") else 0.5
        values = spread * rng.normal(size=ones.shape)
        return (values + (spread == 0.1)).astype(np.float32)

    ones = toy.numpy_params(config)
    return config, jax.tree_util.tree_map_with_path(leaf, ones)


def reader(config, weights):
    """(compiled features, the state before any token)."""
    module = params.merge(config, weights)

    def read(tokens, positions, segments, state):
        seq = mixers.SeqInfo(positions, segments)
        return fused.features(config, module, tokens, seq, state)

    return toy.quick_jit(read), lambda rows: module.init_state(rows, 32)


def in_pieces(read, state, rows=slice(None), lengths=LENGTHS):
    """Features [rows, 6, D] of pieces one after another, and the last state."""
    found, start = [], 0
    for length in lengths:
        part = np.s_[rows, start : start + length]
        x, state = read(*(a[part] for a in (TOKENS, POSITIONS, SEGMENTS)), state)
        found.append(x)
        start += length
    return np.concatenate(found, axis=1), state


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=slow if form in ("learned", "l1_without_bias") else ())
        for form in FORMS
    ],
)
def test_equals_the_equations_in_float64(form):
    """Two streams, one behind padding, read in pieces of three, one and two tokens.

    Mutations: keys stored before they are turned; the second row not added; a later token of
    the call seen; a LayerNorm in the middle without its mean, or with the others' eps; one
    token counted where two were read.
    """
    config, weights = make(**FORMS[form])
    assert not fused.why_not(config)
    prepared = narrow.prepare(config, weights, narrow.WeightKinds())
    read, empty = reader(config, prepared)
    found, state = in_pieces(read, empty(2))
    logits = found.astype(np.float64) @ weights["head"]["kernel"]
    expected = oracle.transformer(config, weights, TOKENS, POSITIONS, SEGMENTS)
    real = SEGMENTS > 0
    error = np.abs(logits - expected)[real].max() / np.abs(expected[real]).max()
    assert error < 1e-5
    assert [int(cache.length) for cache in state] == [6, 6]
    np.testing.assert_array_equal(state[1].segment_ids[:, :6], SEGMENTS)
    assert not np.any(state[1].segment_ids[:, 6:])


@pytest.mark.parametrize("kind", ["int8", pytest.param("bfloat16", marks=slow)])
def test_equals_the_blocks_themselves(kind):
    """Features and caches, of tables as they are stored; padding gets zeros of attention.

    Mutation: `seen` of the segment 0.
    """
    config, weights = make()
    prepared = narrow.prepare(config, weights, narrow.WeightKinds(tables=kind))
    both = []
    for lookup in ("auto", "xla"):
        chosen = dataclasses.replace(config, lookup=lookup)
        assert bool(fused.why_not(chosen)) == (lookup == "xla")
        read, empty = reader(chosen, prepared)
        both.append(jax.tree.leaves(in_pieces(read, empty(2))))
    for one, other in zip(*both, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(
    ("width", "lengths"), [(16, LENGTHS), (144, (4, 2))], ids=("narrow", "wide")
)
def test_a_token_is_what_it_is_alone(width, lengths):
    """Other streams, and how many tokens a call reads, change no bit: drafts rely on it.

    The wide heads fill vectors and a rest, and four queries share a read of their keys.
    Mutations: keys of a later token seen; the last of four queries without its own key.
    """
    config, weights = make(embed_dim=width)
    prepared = narrow.prepare(config, weights, narrow.WeightKinds(tables="int8"))
    read, empty = reader(config, prepared)

    def after_18(rows, part=slice(None)):
        state = empty(rows)
        for _ in range(3):
            _, state = in_pieces(read, state, part, lengths)
        return state

    together, state = in_pieces(read, after_18(2), lengths=lengths)
    one_by_one, same = in_pieces(read, after_18(2), lengths=[1] * 6)
    np.testing.assert_array_equal(together, one_by_one)
    assert jax.tree.all(jax.tree.map(np.array_equal, state, same))
    second = slice(1, 2)
    alone, _ = in_pieces(read, after_18(1, second), second, lengths)
    np.testing.assert_array_equal(together[1:], alone)


def test_what_it_does_not_know_goes_through_the_blocks():
    """Each is refused with its field, and many tokens are not refused but not taken.

    Mutation: any line of `why_not` left out.
    """
    refused = {
        "lookup": {"lookup": "xla"},
        "dtype": {"dtype": "bfloat16"},
        "projection=": {"projection": "dense"},
        "ffn_activation": {"ffn_activation": "gelu"},
        "mixer=": {"mixer": "cosformer"},
        "causal softmax": {"causal": False},
        "logit_transform": {"mixer_options": {"logit_transform": "dape_v2"}},
        "recurrence": {"recurrence": "rmt"},
        "ngram_rows": {"projection_options": {"ngram_rows": 8}},
    }
    for field, fields in refused.items():
        config = toy.model_config(**({"lookup": "auto"} | fields))
        assert field in fused.why_not(config), field
    config, weights = make()
    prepared = narrow.prepare(config, weights, narrow.WeightKinds())
    module = params.merge(config, prepared)

    def calls(num_tokens):
        tokens = jnp.zeros((num_tokens, 1), jnp.int32)
        seq = mixers.SeqInfo(tokens, tokens + 1)
        state = module.init_state(num_tokens, 32)
        read = jax.jit(lambda *args: fused.features(config, module, *args))
        return read.lower(tokens, seq, state).as_text().count("memoryformer_blocks")

    assert (calls(32), calls(33)) == (1, 0)


@slow
def test_greedy_tokens_are_those_of_the_blocks():
    """Forty tokens after each of eight prompts, one stream and four at once."""
    config, weights = make(vocab_size=61, seq_len=64)
    kinds = narrow.WeightKinds(tables="int8", head="int8")
    prompts = np.random.default_rng(2).integers(0, 61, (8, 4)).tolist()
    sampling = sampler.SamplingConfig(max_tokens=40, temperature=0.0)
    both = []
    for lookup in ("auto", "xla"):
        chosen = dataclasses.replace(config, lookup=lookup)
        generator = sampler.Generator(chosen, weights, kinds)
        tokens = [list(generator.stream(prompt, sampling)) for prompt in prompts[:4]]
        tokens += list(generator.stream_batch(prompts[4:], sampling))
        both.append(tokens)
    assert both[0] == both[1]


@pytest.mark.parametrize("size", [1, 15, 16, 1003])
def test_the_first_of_the_largest(size):
    """As NumPy's argmax: ties, infinities, and NaN before all numbers.

    Mutations: NaN ignored; the first place never taken.
    """
    rng = np.random.default_rng(size)
    y = rng.integers(-3, 3, (4, size)).astype(np.float32)
    y[1] = -np.inf
    y[2, size // 2 :] = np.nan
    y[3] = np.arange(size)
    found = jax.vmap(narrow_rows.first_largest)(jnp.asarray(y)[:, None])
    np.testing.assert_array_equal(found[:, 0], np.argmax(y, axis=-1))
    assert found.dtype == jnp.int32


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_rows_that_lie_in_memory(kind):
    """Tables of more than 8 MB are read in groups of rows: all instruction sets, odd sizes.

    Mutations: the last rows of K left out; the columns after the last whole vector; rows from
    128 on taken for the first.
    """
    rng = np.random.default_rng(0)
    shape = (141, 64, 1333) if kind == "int8" else (13, 128, 1333)
    tables = rng.integers(-127, 128, shape).astype(kind)
    codes = rng.integers(0, shape[1], (3, shape[0])).astype(np.int32)
    scores = rng.normal(size=(3, shape[0])).astype(np.float32)
    rows = tables[np.arange(shape[0]), codes].astype(np.float64)
    expected = np.einsum("nk,nkf->nf", scores, rows)
    scales = np.ones(shape[:2], np.float32)
    assert tables.nbytes > 8 << 20
    try:
        for instructions in native.INSTRUCTION_SETS:
            native.configure(instruction_set=instructions)
            if kind == "int8":
                y = native.native_int8(tables, scales, codes, scores)
            else:
                y = native.native(tables, codes, scores)
            np.testing.assert_allclose(y, expected, atol=5e-3)
    finally:
        native.configure()


def test_a_full_cache_is_written_as_xla_writes_it():
    """Behind the last slot nothing is written: the new token takes the last.

    Mutation: the start cut to one slot more.
    """
    config, weights = make()
    both = []
    for lookup in ("auto", "xla"):
        prepared = narrow.prepare(config, weights, narrow.WeightKinds())
        read, empty = reader(dataclasses.replace(config, lookup=lookup), prepared)
        state = tuple(c._replace(length=jnp.int32(32)) for c in empty(2))
        part = np.s_[:, :1]
        _, after = read(TOKENS[part], POSITIONS[part], np.ones((2, 1), np.int32), state)
        both.append(after[0])  # the next reads past the end, which nobody asks for
    for one, other in zip(*both, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
