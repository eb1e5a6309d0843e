"""Mixers inside a whole run: what the step, the mesh and the length of a state ask of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import errors, experiment, mixers, model, sharding, trainer
from memoryformer.mixers import kernel

PERFORMER = {
    "model.mixer": "performer",
    "model.performer_features": 6,
    "model.performer_redraw_every": 3,
}


def _gradients_at(steps, folder, **fields):
    """Gradient norms of the first batch's step, were it step `steps[i]`."""
    run = experiment.resolve(toy.run_config(folder, **fields))
    shards = sharding.make(run.mesh)
    specs = trainer._check_fit(run, shards)
    draw, _ = trainer.init_state(run, shards, specs)
    tokens = np.random.default_rng(0).integers(0, toy.VOCAB, (8, 16), dtype=np.int32)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32)[None], (8, 16)).copy()
    batch = {
        "inputs": tokens,
        "targets": tokens[:, ::-1].copy(),
        "positions": positions,
        "segment_ids": ones,
        "weights": ones.astype(np.float32),
    }
    with shards.activate():
        step = trainer.make_train_step(run, shards, specs)
        return [
            float(step(_at(draw(), i), shards.put_batch(batch))[1]["grad_norm"])
            for i in steps
        ]


def _at(state, step):
    return state._replace(step=state.step + step)


def test_performer_redraws_on_schedule(tmp_path):
    """Red if the step does not reach the mixer, or if every step draws anew."""
    a, b, c = _gradients_at((0, 2, 3), tmp_path, **PERFORMER)
    assert a == b != c


def test_redrawn_features_are_those_of_one_device(tmp_path):
    """Red if a device draws features of its own."""
    even = {"model.vocab_size": 258}
    one = _gradients_at((4,), tmp_path, **PERFORMER, **even)
    eight = _gradients_at((4,), tmp_path, **PERFORMER, mesh="tensor:model=2", **even)
    np.testing.assert_allclose(one, eight, rtol=1e-4)


def test_draw_0_is_the_constant_one():
    """Red if evaluation and the first steps of training see other features."""
    drawn = kernel._rows(5, 2, jnp.int32(0), 7, 4)
    np.testing.assert_array_equal(drawn, kernel._fixed_rows(5, 2, 7, 4))
    assert np.abs(drawn - kernel._fixed_rows(5, 3, 7, 4)).max() > 0.1


@pytest.mark.parametrize("mixer", ["cosformer", "linformer"])
def test_a_state_beyond_the_last_position_is_refused(mixer):
    """Red if decoding runs into positions that the mixer does not have."""
    config = model.ModelConfig(8, 16, 1, 2, 32, mixer=mixer, code_bits=4)
    network = model.merge(config, model.init(config))
    assert mixers.max_length(config) == 32
    jax.tree.map(jnp.shape, network.init_state(1, 32))
    with pytest.raises(errors.ConfigError, match=f"{mixer}_max_len=32.* 33 tokens"):
        network.init_state(1, 33)
