"""Bucket counts and what is made of them, against numpy and closed forms."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoryformer import errors, model
from memoryformer import sharding as sharding_lib
from memoryformer.evaluation import buckets

CONFIG = model.ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=2, seq_len=16, code_bits=4
)
LAYERS = ("mixer.qkv", "ffn.up", "ffn.down")


def batch(seed: int, padding: int = 0) -> dict[str, np.ndarray]:
    """Two rows of one document each, the last `padding` positions of it padding."""
    rng = np.random.default_rng(seed)
    segments = np.ones((2, 16), np.int32)
    segments[:, 16 - padding :] = 0
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    inputs = rng.integers(0, 64, (2, 16), np.int32)
    return {"inputs": inputs, "positions": positions, "segment_ids": segments}


def test_counts_equal_a_plain_loop():
    """Traced or not. Red: the table index left out, or `keep` ignored."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (3, 5, 4))
    keep = rng.integers(0, 2, (3, 5))
    expected = np.zeros((4, 8), int)
    for row, position in np.argwhere(keep):
        for table, code in enumerate(codes[row, position]):
            expected[table, code] += 1
    count = jax.jit(buckets.bucket_counts, static_argnums=1)
    np.testing.assert_array_equal(count(codes, 8, keep), expected)
    np.testing.assert_array_equal(
        buckets.bucket_counts(jnp.asarray(codes), 8, jnp.asarray(keep)), expected
    )


def test_every_token_counts_once_without_keep():
    """Red: `ones` of zeros, or codes outside counted in another row."""
    codes = jnp.asarray([[0, 3], [-1, 4], [3, 3]])
    expected = [[1, 0, 0, 1], [0, 0, 0, 2]]
    np.testing.assert_array_equal(buckets.bucket_counts(codes, 4), expected)


def test_utilisation_of_known_tables():
    """Uniform, one row, half of the rows. Red: entropy in nats, or load over the sum."""
    counts = np.array([[3, 3, 3, 3], [0, 0, 12, 0], [6, 0, 6, 0]])
    use = buckets.utilisation(counts)
    np.testing.assert_allclose(use.used_fraction, [1, 0.25, 0.5])
    np.testing.assert_allclose(use.entropy, [1, 0, 0.5], atol=1e-12)
    np.testing.assert_allclose(use.max_over_mean, [1, 4, 2])


def test_bit_rates_of_known_tables():
    """Counts of codes 00, 01, 10, 11, the high bit first. Red: the low bit first."""
    rates = buckets.bit_rates(np.array([[1, 0, 0, 3], [5, 5, 0, 0], [1, 0, 3, 0]]))
    np.testing.assert_allclose(rates.set_rate, [[0.75, 0.75], [0, 0.5], [0.75, 0]])
    expected = [[0.375, 0.375], [0, 0.5], [0.375, 0]]
    np.testing.assert_allclose(rates.flip_rate, expected)


def test_flip_rate_is_that_of_independent_tokens():
    """2 p (1 - p), against pairs of a shuffled sample. Red: p (1 - p)."""
    rng = np.random.default_rng(0)
    signs = rng.random((4000, 3)) < np.array([0.5, 0.2, 0.9])
    codes = signs @ np.array([4, 2, 1])
    counts = buckets.bucket_counts(jnp.asarray(codes[:, None]), 8)
    measured = np.mean(signs[1:] != signs[:-1], axis=0)
    rates = buckets.bit_rates(np.asarray(counts))
    np.testing.assert_allclose(rates.flip_rate[0], measured, atol=0.02)


def test_gaussian_chunks_fill_a_table_evenly():
    """Signs of a zero-mean input are uniform; a shift breaks that. Red: no entropy sign."""
    z = np.random.default_rng(0).normal(size=(20_000, 1, 4))
    weights = np.array([8, 4, 2, 1])
    even, shifted = (
        buckets.bucket_counts(jnp.asarray((z + shift >= 0) @ weights), 16)
        for shift in (0.0, 1.0)
    )
    assert buckets.utilisation(np.asarray(even)).entropy[0] > 0.999
    assert buckets.utilisation(np.asarray(shifted)).entropy[0] < 0.75


def test_summary_keys_and_reductions():
    """Means over tables, the worst load. Red: the mean load."""
    counts = {"blocks.0.mixer.qkv": np.array([[1, 1, 1, 1], [0, 0, 8, 0]])}
    assert buckets.summary(counts) == {
        "utilisation/blocks.0.mixer.qkv/used_fraction": pytest.approx(0.625),
        "utilisation/blocks.0.mixer.qkv/entropy": pytest.approx(0.5),
        "utilisation/blocks.0.mixer.qkv/max_over_mean": pytest.approx(4.0),
        "utilisation/blocks.0.mixer.qkv/flip_rate": pytest.approx(0.25),
    }


def test_collect_sums_batches_and_leaves_padding_out():
    """Every layer of the model, codes as `evaluation.buckets.codes` gives them. Red: the last batch
    only, padding counted, or the FFN's second layer with 2^tau rows."""
    params = model.init(CONFIG)
    batches = [batch(0), batch(1, padding=6)]
    totals = buckets.collect(CONFIG, params, iter(batches))
    assert set(totals) == {f"blocks.{b}.{layer}" for b in range(2) for layer in LAYERS}
    expected = collections.defaultdict(lambda: 0)
    read = jax.jit(lambda params, one: buckets.codes(CONFIG, params, one))
    for one in batches:
        keep = one["segment_ids"] > 0
        for name, codes in read(params, one).items():
            rows = 64 if name.endswith("ffn.down") else 16
            kept = np.asarray(codes)[keep]
            expected[name] += np.stack(
                [np.bincount(column, minlength=rows) for column in kept.T]
            )
    for name, counts in totals.items():
        np.testing.assert_array_equal(counts, expected[name])
        assert np.all(counts.sum(axis=-1) == 2 * 16 + 2 * 10)


@pytest.mark.parametrize("mesh", ["data", "fsdp_tensor:model=2"])
def test_collect_on_a_mesh(mesh):
    """8 devices count what one does. Red: without the sum over `data` (or, for the
    second mesh, the gather over `model`)."""
    params = model.init(CONFIG)
    one = {key: np.tile(value, (4, 1)) for key, value in batch(0, padding=3).items()}
    expected = buckets.collect(CONFIG, params, [one])
    sharding = sharding_lib.make(mesh)
    specs = model.partition_specs(CONFIG, sharding)
    with sharding.activate():
        placed = sharding.put(params, specs)
        counts = buckets.collect(CONFIG, placed, [one], sharding)
    assert set(counts) == set(expected)
    for name, value in counts.items():
        np.testing.assert_array_equal(value, expected[name])


def test_a_dense_model_has_nothing_to_count():
    """Red: the check left out (it would say that there is no batch)."""
    dense = dataclasses.replace(
        CONFIG, projection="dense", projection_options={}, ffn_activation="gelu"
    )
    with pytest.raises(errors.ConfigError, match="has no tables"):
        buckets.collect(dense, model.init(dense), [batch(0)])


@pytest.mark.parametrize("batches", [[], [batch(0, padding=16)]])
def test_nothing_to_count_is_an_error(batches):
    """No batch, or padding alone. Red: shares divided without a look at the total."""
    with pytest.raises(errors.DataError, match="utilisation"):
        buckets.summary(buckets.collect(CONFIG, model.init(CONFIG), batches))
