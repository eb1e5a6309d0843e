"""Certificates of models: what the norm fixes is counted, layers are watched as they read."""

import dataclasses

import jax
import numpy as np
import oracle_mixers
import pytest
import toy

from memoryformer import errors, model
from memoryformer.identifiability import linear_attention, moments, tables, trained
from memoryformer.model import codes as codes_lib
from memoryformer.model import mixers

IDENTITY = {
    "mixer": "linear",
    "mixer_options": {"feature_map": "identity", "prefix_chunk": 4},
    "rotary_fraction": 0.0,
}


def linear_config(**fields):
    fields = IDENTITY | {"embed_dim": 4, "num_layers": 1, "vocab_size": 60} | fields
    return toy.model_config("dense", **fields)


def drawn(config):
    """Parameters of either sign, none near 0, without compiling what draws them."""
    rng = np.random.default_rng(0)

    def draw(p):
        return (rng.uniform(0.3, 1.2, p.shape) * rng.choice([-1, 1], p.shape)).astype(
            p.dtype
        )

    return jax.tree.map(draw, jax.eval_shape(lambda: model.init(config)))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("output_projection", [False, True])
def test_the_first_mixer_is_determined_up_to_its_norm(norm, output_projection):
    """Its rank is what the norm leaves free, and least squares on its outputs predict it anew.

    The second half says that these are the features of the layer as the model computes it.
    Mutations: no 1 beside norm1(x); sums over the whole row in place of the document so far;
    freedom of the other norm; no bias where there is an output projection.
    """
    config = linear_config(norm=norm, output_projection=output_projection)
    params = drawn(config)
    batches = [toy.batch(config, seed, batch_size=16) for seed in (1, 2)]
    found = trained.of_first_mixer(config, params, batches)
    assert found.unknowns == linear_attention.num_features(5) + output_projection
    assert found.freedom == {"rmsnorm": 5, "layernorm": 75 - (40 - 4)}[norm]
    assert found.function_is_unique and not found.weights_are_unique
    assert found.smallest == 0 < 1e-6 * found.largest < found.smallest_beyond

    def examples(batch):
        rows = np.concatenate(list(trained.first_features(config, params, [batch])))
        merged = model.merge(config, params)
        x = np.asarray(merged.blocks[0].norm1(merged.embed(batch["inputs"])))
        mixer, places = (
            params["blocks"]["0"]["mixer"],
            (batch["positions"], batch["segment_ids"]),
        )
        y = oracle_mixers.linear_identity(config, mixer, x, *places)
        return rows, y[batch["segment_ids"] > 0]

    fit = [np.concatenate(pair) for pair in zip(*map(examples, batches), strict=True)]
    weights = np.linalg.lstsq(*fit, rcond=1e-7)[0]
    rows, y = examples(toy.batch(config, 3))
    assert np.abs(rows @ weights - y).max() < 1e-4 * np.abs(y).max()


def test_too_little_text_is_said():
    """Mutation: eigenvalues that fewer tokens than features do not have, left out."""
    config = linear_config()
    found = trained.of_first_mixer(config, drawn(config), [toy.batch(config, 0, 2)])
    assert found.rank <= found.examples < found.unknowns
    assert found.smallest_beyond == 0 and not found.function_is_unique


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (IDENTITY | {"mixer": "softmax", "mixer_options": None}, "mixer='softmax'"),
        (IDENTITY | {"mixer_options": None}, "feature_map='elu'"),
        (IDENTITY | {"rotary_fraction": 0.5}, "rotary_fraction=0.5"),
        ({"recurrence": "rmt"}, "recurrence='rmt'"),
    ],
)
def test_models_without_a_certificate_are_refused(fields, said):
    """Mutation: one of the checks left out."""
    with pytest.raises(errors.ConfigError, match=said):
        trained.check(toy.model_config("dense", **fields))


def test_what_is_hashed_is_watched():
    """Codes of layers with thresholds and a mix, which are a sum, so that none has a certificate.

    Mutations: the codes of its input; each layer of a sum certified alone.
    """
    options = {"parts": "ffn=memory_block,bits=4,mix=none+hadamard,thresholds"}
    config = trained.eager(
        toy.model_config("mixed", num_layers=1, projection_options=options)
    )
    params, batch = drawn(config), toy.batch(config, 0)
    seq = mixers.SeqInfo(batch["positions"], batch["segment_ids"])
    says = codes_lib.of_tokens(model.merge(config, params), batch["inputs"], seq)
    reads = trained.reads(config, params, [batch])
    assert len(reads) == 2
    for name, (codes, _, _) in reads.items():
        np.testing.assert_array_equal(
            codes, np.asarray(says[name])[batch["segment_ids"] > 0]
        )
    found = trained.of_tables(config, params, [batch], 1000)
    assert set(found.values()) == {"one of a sum of memory layers"}


def test_layers_are_watched_as_they_read():
    """Codes are those that the model says it reads, padding left out; scores as their equation.

    Mutations: padding kept; scores of another temperature; a layer that reads slots, watched;
    the certificate without the model's bias.
    """
    config = toy.model_config(
        mixer="luna",
        num_layers=1,
        remat="full",
        projection_options={"temperature": 0.7},
    )
    config = trained.eager(config)
    params = drawn(config)
    batches = [toy.batch(config, seed) for seed in (0, 1)]
    found = trained.reads(config, params, batches)
    real = [b["segment_ids"] > 0 for b in batches]

    @toy.quick_jit
    def says(batch):
        seq = mixers.SeqInfo(batch["positions"], batch["segment_ids"])
        merged = model.merge(config, params)
        first = merged.blocks[0].norm1(merged.embed(batch["inputs"]))
        return codes_lib.of_tokens(merged, batch["inputs"], seq), first

    said = [says(batch) for batch in batches]
    assert found.keys() == said[0][0].keys()
    for name, (codes, scores, num_buckets) in found.items():
        expected = [
            np.asarray(s[0][name])[keep] for s, keep in zip(said, real, strict=True)
        ]
        np.testing.assert_array_equal(codes, np.concatenate(expected))
        assert codes.max() < num_buckets == (32 if name.endswith("down") else 16)
        assert scores.shape == codes.shape
    first = np.asarray(said[0][1], np.float64)[real[0]]
    z = first.reshape(len(first), -1, 4)
    expected = np.prod(1 / (1 + np.exp(-2 * np.abs(z) / 0.7)), axis=-1)
    codes, scores, num_buckets = found["blocks.0.mixer.qkv"]
    np.testing.assert_allclose(scores[: len(first)], expected, rtol=1e-5)
    certificates = trained.of_model(config, params, batches, 4096)
    assert certificates.keys() == found.keys()
    expected = tables.certificate(codes, scores, num_buckets, bias=True)
    assert certificates["blocks.0.mixer.qkv"] == expected


def test_a_run_is_looked_at_whole(toy_run):
    """Every memory layer of a run, from its folder; layers above the limit say so.

    Mutation: the limit not passed on.
    """
    found = trained.of_run(toy_run, None, max_tokens=300, max_unknowns=10_000)
    assert set(found) == {f"blocks.0.{n}" for n in ("mixer.qkv", "ffn.up", "ffn.down")}
    for certificate in found.values():
        assert isinstance(certificate, moments.Certificate)
        assert 300 <= certificate.examples < 600
        assert 0 < certificate.rank <= certificate.unknowns
    small = trained.of_run(toy_run, None, max_tokens=300, max_unknowns=30)
    assert "more than --max_unknowns=30" in small["blocks.0.ffn.down"]


def test_a_layer_too_wide_is_refused():
    """Mutation: hours of work in place of a line."""
    config = dataclasses.replace(linear_config(), embed_dim=64, num_heads=2)
    with pytest.raises(errors.ConfigError, match="max_unknowns=4096"):
        trained.of_model(config, {}, [], 4096)
