"""Decoding with a screened head gives the tokens of the int8 head."""

import dataclasses

import jax
import numpy as np
import pytest
import toy

from memoryformer import errors, model
from memoryformer.generation import sampler
from memoryformer.model import narrow
from memoryformer.ops.lookup import native as lookup_native
from memoryformer.ops.lookup import screened

INT8 = narrow.WeightKinds(head="int8")
SCREENED = narrow.WeightKinds(head="int8-screened")
PROMPTS = [[[5, 1, 7], [2], [3, 4, 8, 1, 0]], [[600]], [[i, 2 * i] for i in range(12)]]


def make():
    """A model whose head lies mostly in a few directions, and one whose does not."""
    config = toy.model_config("dense", vocab_size=1100, embed_dim=48, num_layers=1)
    config = dataclasses.replace(config, seq_len=64, num_heads=2)
    flat = model.init(config, 1)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((48, 48)))[0]
    steep = (
        (basis * 0.8 ** np.arange(48)) @ basis.T @ np.asarray(flat["head"]["kernel"])
    )
    return config, (flat | {"head": {"kernel": np.float32(3 * steep)}}, flat)


def tokens(generator, prompts, **sampling):
    sampling = sampler.SamplingConfig(max_tokens=20, **sampling)
    return np.array(list(generator.stream_batch(prompts, sampling)))


@pytest.mark.skipif(not lookup_native.available(), reason="no C++ compiler")
def test_tokens_are_those_of_the_int8_head(monkeypatch):
    """Greedy and sampled, alone and together; rows stay unread where the head lets them.

    Mutations: the highest bound taken for the highest logit; the state's features carried
    before the final norm; a sample of the screened logits only.
    """
    monkeypatch.setattr(screened, "FEWEST_WEIGHTS", 48 * 1100)
    config, models = make()
    plain = sampler.Generator(config, models[0], INT8)
    generator = sampler.Generator(config, models[0], SCREENED)
    for params, gains in zip(models, (True, False), strict=True):
        # Other parameters for the same compiled programs.
        plain.params = sampler.Generator(config, params, INT8).params
        generator.params = sampler.Generator(config, params, SCREENED).params
        before = screened.counts()
        for prompts in PROMPTS:
            wanted = tokens(plain, prompts, temperature=0.0)
            got = tokens(generator, prompts, temperature=0.0)
            np.testing.assert_array_equal(got, wanted)
        after = screened.counts()
        seen = after.vectors - before.vectors
        assert seen == 20 * sum(map(len, PROMPTS))
        assert after.rows - before.rows < 0.3 * 1100 * seen or not gains
        sampled = tokens(generator, PROMPTS[0], seed=3)
        np.testing.assert_array_equal(sampled, tokens(plain, PROMPTS[0], seed=3))
        assert screened.counts() == after


def test_a_small_head_is_read_whole(monkeypatch):
    """From `FEWEST_WEIGHTS` on it is screened. Mutation: `>` for `>=`."""
    config, (params, _) = make()
    for fewest, chosen_from in ((48 * 1100 + 1, 1100), (48 * 1100, 48)):
        monkeypatch.setattr(screened, "FEWEST_WEIGHTS", fewest)
        generator = sampler.Generator(config, params, SCREENED)
        carried = jax.eval_shape(
            generator.to_choose, generator.params, np.zeros((1, 48), np.float32)
        )
        assert carried.shape == (1, chosen_from)  # logits, or features


def test_what_a_head_may_be():
    """A screened head is int8 for evaluation; rounded activations are no weights.

    Mutations: evaluated as float32; `--dense=int8-screened`; w8a8 evaluated as weights.
    """
    config, (params, _) = make()
    as_int8, as_screened = (
        narrow.round_weights(config, params, kinds) for kinds in (INT8, SCREENED)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, as_int8, as_screened))
    for kind in ("w8a8", "w4a8"):
        for name in ("head", "dense"):
            kinds = narrow.WeightKinds(**{name: kind})
            message = f"--{name}={kind}: rounds activations too"
            with pytest.raises(errors.ConfigError, match=message):
                narrow.round_weights(config, params, kinds)
    for fields in ({"dense": "int8-screened"}, {"tables": "w8a8"}):
        with pytest.raises(errors.ConfigError, match="="):
            narrow.WeightKinds(**fields)


def test_decoding_with_rounded_activations():
    """Tokens are the argmax of the same layers' whole pass. Mutation: w4a8 stored as w8a8."""
    config, (params, _) = make()
    for kind in ("w8a8", "w4a8"):
        kinds = narrow.WeightKinds(head=kind, dense=kind)
        (prompt,) = PROMPTS[1]
        chosen = tokens(
            sampler.Generator(config, params, kinds), [prompt], temperature=0.0
        )
        whole = np.concatenate([prompt, chosen[:, 0]])[None]
        stored = narrow.prepare(config, params, kinds)
        assert stored["head"]["kernel"].four_bits == (kind == "w4a8")
        logits = toy.forward(config, stored, whole)[0, :-1]
        at_choice = logits[np.arange(20), chosen[:, 0]]
        np.testing.assert_allclose(at_choice, logits.max(-1), rtol=1e-4)
