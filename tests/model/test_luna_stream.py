"""Luna's memory through depth, and what else the shared-memory paper's options are."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_mixers
import pytest
import toy

from memoryformer import accounting, errors, model
from memoryformer.evaluation import slots
from memoryformer.model import mixers

SEGMENTS = np.array([[1] * 12, [1] * 7 + [0] * 5, [0] * 2 + [3] * 10], np.int32)

UNBIASED = {"memory_bias": False, "bias_std": 0.0}


def made(mixer="luna", projection="dense", **options):
    """A two-sided model with one memory for its two layers, its parameters, and rows."""
    config = toy.model_config(
        projection,
        mixer=mixer,
        mixer_options={"num_slots": 3, "stream": True} | options,
        causal=False,
        projection_options=UNBIASED if projection == "memory" else {},
    )
    params = model.init(config, 0)
    noise = np.random.default_rng(1)
    params = jax.tree.map(  # temperatures start at a constant
        lambda x: x + jnp.float32(0.1 * noise.normal(size=x.shape)), params
    )
    tokens = np.random.default_rng(0).integers(0, 13, SEGMENTS.shape, np.int32)
    seq = mixers.SeqInfo(toy.positions(SEGMENTS), jnp.asarray(SEGMENTS))
    return config, params, tokens, seq


@pytest.mark.parametrize(
    ("projection", "options"),
    [
        ("dense", {}),
        ("dense", {"temperature": "unit", "values": False}),
        ("memory", {"temperature": "learn"}),
    ],
)
def test_one_memory_goes_through_depth(projection, options):
    """Block by block against the oracle, and the model is its blocks.

    Mutations tried: `memory` not handed on in `Transformer.run_blocks`; Y_P in the place of
    unit(P + Y_P); padding packed too; tau of reading for writing.
    """
    config, params, tokens, seq = made(projection=projection, **options)

    @toy.quick_jit
    def run(params):
        network = model.merge(config, params)
        x, memory, inputs, ys, after = network.embed(tokens), None, [], [], []
        for block in network.blocks:
            inputs.append(block.norm1(x))
            ys.append(block.mixer(inputs[-1], seq, memory)[0])
            x, memory = block(x, seq, memory)
            after.append(memory)
        whole, state = network.run_blocks(network.embed(tokens), seq)
        assert state is None
        return inputs, ys, after, whole, network.final_norm(x)

    inputs, ys, after, whole, last = run(params)
    layers = [
        jax.tree.map(np.float64, params["blocks"][str(i)]["mixer"]) for i in range(2)
    ]
    assert ["memory" in layer for layer in layers] == [True, False]
    exact = [np.float64(z) for z in inputs]
    wanted = oracle_mixers.luna_stream(config, layers, exact, SEGMENTS)
    real = SEGMENTS != 0
    for i in range(2):
        np.testing.assert_allclose(ys[i][real], wanted[0][i][real], atol=3e-5)
        np.testing.assert_allclose(after[i], wanted[1][i], atol=3e-5)
    np.testing.assert_allclose(whole, last, atol=1e-6)


def test_the_meter_follows_the_stream():
    """Each layer's slots are what it packs by the memory that reaches it.

    Mutation: `memory` not handed on in `slots._memories`.
    """
    config, params, tokens, seq = made("conv_luna", filter="pool", width=3)

    @toy.quick_jit
    def run(params):
        network = model.merge(config, params)
        sums = slots.figures(network, network.embed(tokens), seq)
        x, memory, cosines = network.embed(tokens), None, []
        for block in network.blocks:
            packed = block.mixer.packed(block.norm1(x), seq, memory)
            cosines.append(slots.cosine(packed.reshape(3, 3, -1)).sum())
            x, memory = block(x, seq, memory)
        return sums, cosines

    sums, cosines = run(params)
    for i, cosine in enumerate(cosines):
        np.testing.assert_allclose(sums[f"blocks.{i}.mixer/cosine"], cosine, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"temperature": "learn", "values": False}])
def test_the_memory_is_counted_once(options):
    """Mutation: `shared_parameters` times the layers; three projections without values."""
    config, params, _, _ = made(**options)
    sizes = [x.size for x in jax.tree.leaves(params)]
    assert accounting.count(config).parameters.total == sum(sizes)


def test_a_stream_needs_whole_rows():
    """Mutation: `check` without its first condition."""
    options = {"mixer": "luna", "mixer_options": {"stream": True}}
    with pytest.raises(errors.ConfigError, match=r"stream=True: .*model\.causal=False"):
        toy.model_config(**options)
    with pytest.raises(errors.ConfigError, match="temperature='cold': unknown choice"):
        toy.model_config(mixer="luna", mixer_options={"temperature": "cold"})
