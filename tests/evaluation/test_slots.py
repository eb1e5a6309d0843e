"""The memory degradation meter, on memories whose figures are known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import errors, model, sharding
from memoryformer.evaluation import slots
from memoryformer.model import mixers
from memoryformer.runs import metrics


def test_known_memories():
    """Red if a row is compared with itself, or the entropy's sign is lost."""
    alike = jnp.ones((3, 5)) * jnp.array([[1.0], [2.0], [3.0]])
    orthogonal = jnp.eye(3, 5)
    rows = jnp.stack([alike, orthogonal, -orthogonal])
    np.testing.assert_allclose(slots.cosine(rows), [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(slots.effective_rank(rows), [1, 3, 3], rtol=1e-4)
    opposite = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(slots.cosine(opposite), -1, atol=1e-6)
    one = jnp.ones((1, 4))
    assert slots.cosine(one) == pytest.approx(0, abs=1e-6)


def _config(**fields):
    return model.ModelConfig(
        12,
        16,
        2,
        2,
        12,
        code_bits=4,
        mixer="luna",
        mixer_options={"num_slots": 3},
        **fields,
    )


def _batch():
    tokens = np.random.default_rng(0).integers(0, 11, (8, 12), dtype=np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32)[None], (8, 12)).copy()
    return {
        "inputs": tokens,
        "positions": positions,
        "segment_ids": np.ones_like(tokens),
    }


def test_a_mesh_measures_the_same():
    """Red if a device measures its share of the heads, or a state has all of them."""
    config = _config(mixer_std=0.3)
    params = model.init(config)
    one = slots.collect(config, params, [_batch()])
    shards = sharding.make("tensor:model=2")
    specs = model.partition_specs(config, shards)
    with shards.activate():
        params = shards.put(params, specs)
        eight = slots.collect(config, params, [_batch()], shards)
    assert one == pytest.approx(eight, abs=1e-4)
    assert set(one) == {
        f"degradation/blocks.{i}.mixer/{name}"
        for i in range(2)
        for name in ("cosine", "effective_rank")
    }


@pytest.mark.parametrize("mixer", ["luna", "conv_luna"])
def test_two_sided_memory_is_what_tokens_read(mixer):
    """o = softmax(q . Y_P) Y_P. Mutation: pack over the whole row, padding or all documents."""
    config = toy.model_config(
        "dense", mixer=mixer, mixer_options={"num_slots": 3}, causal=False
    )
    params = model.init(config)
    batch = toy.batch(config)

    @toy.quick_jit
    def both(params, inputs, positions, segment_ids):
        network = model.merge(config, params)
        mixer = network.blocks[0].mixer
        seq = mixers.SeqInfo(positions, segment_ids)
        x = network.blocks[0].norm1(network.embed(inputs))
        memory = mixer.packed(x, seq)
        q = mixer._inputs(x, seq, None)[0]
        p = jax.nn.softmax(jnp.einsum("blhe,bmhe->blhm", q, memory), axis=-1)
        want = mixer.join(jnp.einsum("blhm,bmhe->blhe", p, memory), x.dtype)
        return memory, want, mixer(x, seq)[0]

    names = ("inputs", "positions", "segment_ids")
    memory, want, got = map(np.asarray, both(params, *(batch[n] for n in names)))
    last = batch["segment_ids"] == batch["segment_ids"].max(axis=1, keepdims=True)
    assert 0 < last.mean() < 0.9
    np.testing.assert_allclose(want[last], got[last], atol=1e-5)
    figures = slots.collect(config, params, [batch])
    cosine = slots.cosine(memory.reshape(8, 3, 16))
    assert figures["degradation/blocks.0.mixer/cosine"] == pytest.approx(cosine.mean())


def test_it_is_logged_while_training(tmp_path):
    """Red if the trainer does not ask for it."""
    workdir = toy.trained(
        tmp_path,
        **{
            "model.mixer": "luna",
            "model.mixer_options.num_slots": 4,
            "train.num_steps": 10,
        },
    )
    rows = [json.dumps(row) for row in metrics.read(workdir)]
    assert any("degradation/blocks.0.mixer/effective_rank" in row for row in rows)


def test_other_mixers_are_refused():
    """Red if softmax's cache is read as a memory."""
    config = model.ModelConfig(11, 16, 1, 2, 12, code_bits=4)
    with pytest.raises(errors.ConfigError, match="has no memory to measure"):
        slots.collect(config, model.init(config), [_batch()])
