"""Performer against its authors' code, as far as that is causal.

tests/data/performer_google_research.npz holds inputs, outputs and gradients of google-research's
performer/fast_attention/jax/fast_attention.py (Apache-2.0, commit 0c1bbe5f), run on CPU with jax
0.10.2: `make_fast_softmax_attention(8, numerical_stabilizer=1e-12, nb_features=20,
redraw_features=False, unidirectional=True)`, its own draw of 20 rows, and unit-normal float32
queries, keys and values [B, L, H, E] = [2, 12, 2, 8]. With its defaults (stabilizer 1e-6,
redrawn features) its outputs depend on the future and are no oracle. The gradients are those of
sum(output * weights).
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx

from memoryformer import model
from memoryformer.model import mixers
from memoryformer.model import transformer as transformer_lib
from memoryformer.model.mixers import kernel
from memoryformer.ops import random_features

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "performer_google_research.npz"


class _Given(kernel.Performer):
    """Performer whose projections are the identity on [q, k, v] and whose rows are given."""

    def split(self, x, seq):
        return jnp.moveaxis(x, 2, 0)  # [B, L, 3, H, E] -> three of [B, L, H, E]

    def join(self, y, dtype):
        return y.astype(dtype)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.mark.parametrize("chunk", [5, 64])
def test_google_research(golden, chunk):
    """Red if queries and keys are scaled otherwise, or a feature loses its |x|^2 / 2."""
    num_heads, head_dim = golden["query"].shape[2:]
    config = model.ModelConfig(
        vocab_size=8,
        embed_dim=num_heads * head_dim,
        num_layers=1,
        num_heads=num_heads,
        seq_len=12,
        mixer="performer",
        projection="dense",
        mixer_options={"num_features": len(golden["rows"]), "prefix_chunk": chunk},
        rotary_fraction=0.0,
    )
    rngs = nnx.Rngs(0)
    project = functools.partial(transformer_lib.make_projection, config, rngs=rngs)
    mixer = _Given(config, project, rngs=rngs, layer=0)
    mixer.random_rows.set_value(jnp.asarray(golden["rows"]))
    qkv = jnp.stack([golden[name] for name in ("query", "key", "value")], axis=2)
    seq = mixers.SeqInfo.of_tokens(qkv[:, :, 0, 0, 0])

    def loss(qkv):
        y, _ = mixer(qkv, seq)
        return jnp.sum(y * golden["weights"]), y

    grads, y = toy.quick_jit(jax.grad(loss, has_aux=True))(qkv)
    np.testing.assert_allclose(y, golden["output"], atol=1e-5)
    for i, name in enumerate(("dquery", "dkey", "dvalue")):
        want = golden[name]
        np.testing.assert_allclose(grads[:, :, i], want, atol=1e-5 * np.abs(want).max())


def test_its_rows_are_drawn_as_ours(golden):
    """Orthogonal in blocks of E, with other lengths. Red if the draw is of plain normals."""
    ours = random_features.draw(jax.random.key(0), *golden["rows"].shape)
    for rows in (golden["rows"], np.asarray(ours)):
        for first in (0, 8, 16):
            block = rows[first : first + 8]
            norms = np.linalg.norm(block, axis=1)
            np.testing.assert_allclose(
                block @ block.T, np.diag(norms**2), atol=1e-4 * norms.max() ** 2
            )
            assert np.ptp(norms) > 0.1
