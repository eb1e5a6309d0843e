"""Variants of the published model: two rows read, rows of n-grams and of tokens; each against
the oracle.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toy
from flax import nnx

from memoryformer import accounting, convert, errors, model
from memoryformer.cim import energy
from memoryformer.convert import recency, reference_reader
from memoryformer.convert.memorise import source
from memoryformer.identifiability import trained
from memoryformer.model import (
    fused,
    losses,
    mixers,
    narrow,
    ngrams,
    parts,
    token_rows,
)
from memoryformer.ops import ngrams as ngrams_ops

ALL = {"rows_read": 2, "ngram_rows": 7, "ngram_order": 3, "token_rows": True}


def drawn(config):
    """Parameters of a config, all of them random."""
    rng = np.random.default_rng(0)
    shapes = toy.numpy_params(config)
    return jax.tree.map(
        lambda x: 0.5 * rng.normal(size=x.shape).astype(x.dtype), shapes
    )


@pytest.fixture(scope="module")
def example():
    """A model with all of them, its parameters, a packed batch, its logits by the oracle."""
    config = toy.model_config(projection_options=ALL, lookup="xla", num_layers=1)
    params = drawn(config)
    batch = toy.batch(config, batch_size=4)
    names = ("inputs", "positions", "segment_ids")
    expected = oracle.transformer(config, params, *(batch[name] for name in names))
    return config, params, batch, expected


def test_the_model_is_the_oracles(example):
    """Documents of a packed batch, int8 tables and the count of parameters.

    Mutations: positions left out of `whole`; orders swapped; `rows_read` not passed on to the
    layers, or to the narrow ones; (N - 1) R, or V D of the tokens' rows, left out of
    `accounting`; these rows added to V alone, or not at all.
    """
    config, params, batch, expected = example
    wanted = expected[batch["segment_ids"] > 0]
    np.testing.assert_allclose(toy.logits(config, params, batch), wanted, atol=2e-5)
    kinds = narrow.WeightKinds("int8", "int8", "int8")
    stored = narrow.prepare(config, params, kinds)
    rounded = narrow.round_weights(config, params, kinds)
    np.testing.assert_allclose(
        toy.logits(config, stored, batch), toy.logits(config, rounded, batch), atol=2e-5
    )
    counted = accounting.count(config)
    assert counted.parameters.total == sum(x.size for x in jax.tree.leaves(params))
    plain = accounting.count(toy.model_config(num_layers=1))
    rows = 2 * plain.table_bytes_read_per_token + 2 * (2 + 3) * config.embed_dim
    assert counted.table_bytes_read_per_token == rows
    assert counted.decode_bytes_per_token == (
        rows + counted.dense_bytes + counted.decode_state_bytes
    )
    assert counted.block.projections_exact == 2 * plain.block.projections_exact


def test_decoding_in_pieces_is_one_pass(example):
    """By 1, 3, 1, 1 and 3 tokens. Mutations: `last` of the new tokens alone; the state's
    tokens in the wrong order.
    """
    config, params, *_ = example
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9), np.int32)
    one = (np.tile(np.arange(9), (2, 1)), np.ones((2, 9), int))
    whole = oracle.transformer(config, params, tokens, *one)
    state, found = model.merge(config, params).init_state(2, 12), []
    step = toy.quick_jit(lambda tokens, *s: model.merge(config, params)(tokens, *s))
    for start, size in ((0, 1), (1, 3), (4, 1), (5, 1), (6, 3)):
        part = jnp.asarray(tokens[:, start : start + size])
        seq = mixers.SeqInfo.of_tokens(part)
        logits, state = step(part, seq._replace(positions=seq.positions + start), state)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=2e-5)


def test_buckets_are_the_documented_ones():
    """Of Python's whole numbers; nothing before a document's start.

    Mutations: the order left out of the first value; a shift of 15; the oldest token last.
    """
    tokens = np.random.default_rng(0).integers(0, 50_000, (3, 8)).astype(np.int32)
    nothing = jnp.full((3, 2), ngrams_ops.NOTHING, jnp.int32)
    for order in (2, 3):
        found = np.asarray(ngrams_ops.buckets(jnp.asarray(tokens), nothing, order, 97))
        for b, i in np.ndindex(3, 8 - order + 1):
            words = [int(t) for t in tokens[b, i : i + order]]
            assert found[b, i + order - 1] == oracle.ngram_bucket(words, 97)
        positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3]] * 3)
        whole = ngrams_ops.whole(jnp.asarray(tokens), nothing, positions, order)
        assert np.asarray(whole)[0].tolist() == [
            p >= order - 1 for p in positions[0].tolist()
        ]


def test_an_export_and_its_reader(example, tmp_path):
    """The same numbers in numpy alone. Mutation: any half of either variant left out there."""
    config, params, *_ = example
    convert.save_export(tmp_path, config, params)
    again, stored = convert.load_export(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, stored, params)
    tokens = np.arange(12)[None] % 13
    one = (np.arange(12)[None], np.ones((1, 12), int))
    expected = oracle.transformer(config, params, tokens, *one)
    found = reference_reader.load(tmp_path).logits(tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_gradients_reach_what_was_read(example):
    """And no other row of an n-gram. Mutation: no gradient to the rows."""
    config, params, batch, _ = example
    seq = mixers.SeqInfo(*(jnp.asarray(batch[n]) for n in ("positions", "segment_ids")))

    def total(rows):
        layer = model.merge(config, params | {"ngrams": {"rows": rows}}).ngrams
        return jnp.sum(layer(jnp.asarray(batch["inputs"]), seq)[0])

    gradient = np.asarray(jax.grad(total)(jnp.asarray(params["ngrams"]["rows"])))
    counts = np.zeros(14)
    for b, i in np.ndindex(*batch["inputs"].shape):
        for n in (2, 3):
            if batch["positions"][b, i] >= n - 1 and i >= n - 1:
                words = [int(t) for t in batch["inputs"][b, i - n + 1 : i + 1]]
                counts[(n - 2) * 7 + oracle.ngram_bucket(words, 7)] += 1
    np.testing.assert_allclose(gradient, np.tile(counts[:, None], 16), rtol=1e-6)


def test_the_gradient_of_tokens_rows_is_the_oracles_slope(example):
    """Of the mean loss, along a random direction. Mutation: no gradient to the rows."""
    config, params, batch, _ = example
    names = ("inputs", "positions", "segment_ids")
    block = params["blocks"]["0"]
    rows = block["mixer"]["token_rows"]["rows"]
    along = np.random.default_rng(3).normal(size=rows.shape)

    def moved(by):
        mixer = block["mixer"] | {"token_rows": {"rows": rows + by * along}}
        return params | {"blocks": {"0": block | {"mixer": mixer}}}

    def by_oracle(by):
        logits = oracle.transformer(config, moved(by), *(batch[n] for n in names))
        return np.mean(oracle.token_nats(logits, batch["inputs"]))

    def ours(by):
        seq = mixers.SeqInfo(*(jnp.asarray(batch[n]) for n in names[1:]))
        logits, _ = model.merge(config, moved(by))(jnp.asarray(batch["inputs"]), seq)
        return jnp.mean(losses.token_nats(logits, jnp.asarray(batch["inputs"])))

    step = 1e-6  # no sign changes over it
    slope = (by_oracle(step) - by_oracle(-step)) / (2 * step)
    np.testing.assert_allclose(toy.quick_jit(jax.grad(ours))(0.0), slope, rtol=1e-3)


def test_tokens_rows_are_each_blocks_own_however_they_are_run():
    """In a loop, scanned, computed again. Mutation: the tokens not given to the blocks."""
    options = {"token_rows": True}
    config = toy.model_config(projection_options=options, lookup="xla")
    params, batch = drawn(config), toy.batch(config, batch_size=2)
    plain = toy.logits(config, params, batch)
    names = ("inputs", "positions", "segment_ids")
    wanted = oracle.transformer(config, params, *(batch[n] for n in names))
    np.testing.assert_allclose(plain, wanted[batch["segment_ids"] > 0], atol=2e-5)
    for fields in ({"scan_layers": True}, {"remat": "full"}):
        other = dataclasses.replace(config, **fields)
        np.testing.assert_allclose(toy.logits(other, params, batch), plain, atol=1e-6)
    groups, specs = model.param_groups(config), model.param_specs(config)
    found = [
        tree["blocks"]["1"]["mixer"]["token_rows"]["rows"] for tree in (groups, specs)
    ]
    assert found == ["undecayed", "columns"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer", [name for name, cls in mixers.MIXERS.items() if cls.HAS_TOKEN_ROWS]
)
def test_equal_rows_of_all_tokens_are_a_bias(mixer):
    """Of Q, K and V, for every mixer that has them. Mutation: a mixer that gives no rngs."""
    config = toy.model_config(mixer=mixer, lookup="xla", num_layers=1)
    options = dataclasses.replace(config.projection_options, token_rows=True)
    params, batch = drawn(config), toy.batch(config, batch_size=2)
    block = params["blocks"]["0"]
    bias = block["mixer"]["qkv"]["bias"]
    rows = {"rows": np.broadcast_to(bias, (config.vocab_size, *bias.shape))}
    plain = block["mixer"] | {"qkv": block["mixer"]["qkv"] | {"bias": 0 * bias}}
    moved = block | {"mixer": plain | {"token_rows": rows}}
    found = toy.logits(
        dataclasses.replace(config, projection_options=options),
        params | {"blocks": {"0": moved}},
        batch,
    )
    np.testing.assert_allclose(found, toy.logits(config, params, batch), atol=2e-5)


def test_what_gives_mixers_no_tokens_refuses_their_rows():
    """Mutation: any refusal left out."""
    config = toy.model_config(projection_options={"token_rows": True})
    native = dataclasses.replace(config, lookup="auto")
    assert "token_rows" in fused.why_not(native)
    with pytest.raises(errors.ConfigError, match="token_rows=True: the measure of"):
        recency.check(config)
    with pytest.raises(errors.ConfigError, match="token_rows=True: memorise gives"):
        source.prepared(source.Subject(config, {}), None)
    for fields in (
        {"recurrence": "rmt"},
        {"mixer": "mamba2"},
        {"mixer": "recurformer"},
    ):
        (name,) = fields
        with pytest.raises(errors.ConfigError, match=f"token_rows=True: model.{name}="):
            toy.model_config(projection_options={"token_rows": True}, **fields)
    dense = {"projection": "dense", "mixer": "linear", "rotary_fraction": 0.0}
    dense |= {"mixer_options": {"feature_map": "identity"}}
    linear = toy.model_config(projection_options={"token_rows": True}, **dense)
    with pytest.raises(errors.ConfigError, match="token_rows=True: the certificate"):
        trained.check(linear)
    token_rows.refuse(toy.model_config(), "anything")
    assert mixers.token_row_values(toy.model_config()) == 0
    with pytest.raises(ValueError, match=r"SeqInfo\.tokens is None"):
        token_rows.TokenRows(config, 3, rngs=nnx.Rngs(0))(None)


def test_a_dense_model_may_have_rows_and_has_none_by_itself():
    """Mutations: an option of memory layers only; rows of order 3 whatever is asked."""
    assert "ngrams" not in toy.numpy_params(toy.model_config("dense"))
    options = {"ngram_rows": 5, "ngram_order": 4}
    params = toy.numpy_params(toy.model_config("dense", projection_options=options))
    assert params["ngrams"]["rows"].shape == (15, 16)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rows_read": 3}, r"rows_read=3: must be 1 or 2"),
        ({"ngram_order": 1}, r"ngram_order=1: must be"),
        ({"ngram_rows": -1}, r"ngram_rows=-1: must be"),
    ],
)
def test_mistakes_are_one_line(fields, message):
    """Mutation: any check left out."""
    with pytest.raises(errors.ConfigError, match=message) as caught:
        toy.model_config(projection_options=fields)
    assert "\n" not in str(caught.value)


def test_what_knows_one_row_refuses_two():
    """And a score without a probability has none to weigh it by.

    Mutation: any refusal left out.
    """
    two = toy.model_config(projection_options={"rows_read": 2})
    with pytest.raises(errors.ConfigError, match="rows_read=2: the energy of a token"):
        energy.per_token(two, "edram")
    with pytest.raises(errors.ConfigError, match="rows_read"):
        parts.check_one_row(two, "memorise")
    parts.check_one_row(toy.model_config("dense"), "memorise")
    with pytest.raises(errors.ConfigError, match="'l1' has no probability"):
        dataclasses.replace(two, score="l1")


def test_what_stands_before_a_row():
    """Tokens of the row before count, nothing does not, and a document's start ends it.

    Mutations: any index of `buckets`, `whole` or `last`; `==` for `!=`.
    """
    rng = np.random.default_rng(1)
    before, tokens = rng.integers(0, 99, (2, 3)), rng.integers(0, 99, (2, 5))
    line = np.concatenate([before, tokens], axis=1)
    known = np.where(np.arange(3) < 1, ngrams_ops.NOTHING, before)
    positions = np.array([[7, 8, 0, 1, 2], [0, 1, 2, 3, 4]])
    arrays = [jnp.asarray(a, jnp.int32) for a in (tokens, before, known, positions)]
    for order in (2, 3, 4):
        found = np.asarray(ngrams_ops.buckets(arrays[0], arrays[1], order, 1009))
        whole = np.asarray(ngrams_ops.whole(arrays[0], arrays[2], arrays[3], order))
        for b, i in np.ndindex(2, 5):
            words = [int(t) for t in line[b, i + 4 - order : i + 4]]
            assert found[b, i] == oracle.ngram_bucket(words, 1009)
            inside = positions[b, i] >= order - 1
            assert whole[b, i] == (inside and i + 4 - order >= 1)
    np.testing.assert_array_equal(ngrams_ops.last(*arrays[:2]), tokens[:, 2:])
    few = ngrams_ops.last(arrays[0][:, :1], arrays[1])
    np.testing.assert_array_equal(few, line[:, 1:4])


def test_rows_of_ngrams_as_a_parameter():
    """Drawn as the embedding, without decay, read by XLA where a one-hot product is asked for.

    Mutations: another scale; a row more; `==` for `!=`; a row split over devices.
    """
    options = {"ngram_rows": 500, "ngram_order": 4}
    config = toy.model_config(projection_options=options, embed_std=0.3, lookup="xla")
    for lookup, read_by in (("onehot", "xla"), ("xla", "xla"), ("auto", "auto")):
        made = ngrams.make(dataclasses.replace(config, lookup=lookup), rngs=nnx.Rngs(0))
        assert made.implementation == read_by
    assert made.rows[...].shape == (3 * 500, 16)
    assert abs(np.std(np.asarray(made.rows[...])) / 0.3 - 1) < 0.05
    facts = made.rows.get_metadata()
    assert (facts["spec"], facts["decay"]) == ("columns", False)
    np.testing.assert_array_equal(made.init_state(2), np.full((2, 3), -1))
    assert ngrams.num_values(config) == 3 * 16
    without = toy.model_config()
    assert ngrams.num_values(without) == 0 and ngrams.make(without, rngs=None) is None
    ngrams.check_sequence(config, 1)
    ngrams.check_sequence(without, 2)
    with pytest.raises(errors.ConfigError, match="ngram_rows=500: an n-gram would lie"):
        ngrams.check_sequence(config, 2)
