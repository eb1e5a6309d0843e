"""Working for a few positions at a time changes the memory, not the result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoryformer import model

LENGTH = 23


def _config(projection, chunk, num_layers=1, **fields):
    dense = {"output_projection": True, "ffn_activation": "gelu"}
    return model.ModelConfig(
        **{"vocab_size": 17, "embed_dim": 16, "num_heads": 2},
        **{"seq_len": LENGTH, "code_bits": 4, "mixer_std": 0.2, "ffn_std": 0.2},
        **(dense if projection == "dense" else {}),
        num_layers=num_layers,
        projection=projection,
        sequence_chunk=chunk,
        **fields,
    )


def _loss_and_gradient(config, length=LENGTH):
    tokens = np.random.default_rng(0).integers(0, 17, (2, length))
    segments = np.where(np.arange(length) < length // 2, 1, 2)[None].repeat(2, axis=0)

    def loss(params):
        logits = model.forward(config, params, jnp.asarray(tokens), segments)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("projection", ["memory", "dense"])
@pytest.mark.parametrize("transform", ["none", "dape_v2"])
def test_same_result(projection, transform):
    """5 does not divide 23. Red if a chunk's queries get another chunk's mask."""
    options = {"logit_transform": transform}
    make = functools.partial(_config, projection, mixer_options=options)
    params = model.init(make(0))
    whole, chunked = (_loss_and_gradient(make(chunk))(params) for chunk in (0, 5))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), chunked, whole
    )


def test_less_memory():
    """Red if the chunks are kept for the gradient."""

    def temporary(chunk):
        config = _config("dense", chunk, num_layers=2)
        params = jax.eval_shape(lambda: model.init(config))
        step = _loss_and_gradient(config, 1024).lower(params).compile()
        return step.memory_analysis().temp_size_in_bytes

    assert temporary(64) < temporary(0) / 3
