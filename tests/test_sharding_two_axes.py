"""FSDP over more devices than one axis of a parameter divides over: two axes of each are split."""

import math

import jax
import numpy as np
import pytest
import test_sharding as cases
from jax.sharding import PartitionSpec as P

from memoryformer import presets, sharding
from memoryformer.dryrun import lowering
from memoryformer.runs import checkpoint
from memoryformer.training import experiment, programs


def test_state_keeps_its_place():
    """Tables and their moments lie an eighth each: K over 2 devices, the buckets over 4.

    Mutation: `second` left out of `specs_over`.
    """
    state = cases.results("few", "fsdp:shard=2").state
    qkv = state.params["blocks"]["0"]["mixer"]["qkv"]["tables"]
    assert qkv.shape[:2] == (4, 4)
    assert qkv.sharding.spec == P("shard", "data", None, None)
    for tree in (state.params, state.opt_state.nu):
        down = tree["blocks"]["0"]["ffn"]["down"]["tables"]
        for array in (qkv, down, tree["embed"]["embedding"], tree["head"]["kernel"]):
            assert array.addressable_shards[0].data.size == array.size // 8


@pytest.mark.parametrize("size", presets.MEMORYFORMER)
@pytest.mark.parametrize("preset", ["fsdp", "fsdp_tensor:model=4"])
def test_every_count_of_devices_divides(size, preset):
    """1 to 2,048 devices, every power of two, for all models of the paper: in equal parts.

    Mutation: `ONE_AXIS` 256, over which 50304 tokens do not divide.
    """
    config = presets.memoryformer(size)
    config.mesh = preset
    config.train.batch_size = config.eval.batch_size = 2048
    run = experiment.resolve(config)
    shapes = jax.eval_shape(lambda: cases.model.init(run.model))
    whole = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    for devices in (2**n for n in range(2, 12)):
        made = lowering.device_sharding(run, range(devices))
        assert made.num_devices == devices
        specs = programs.check_fit(run, made)
        parts = jax.tree.map(
            lambda x, sharding: math.prod(sharding.shard_shape(x.shape)),
            shapes,
            made.named(specs),
        )
        # Norms and biases are whole on every device.
        assert sum(jax.tree.leaves(parts)) < whole / devices + 2e5


def test_a_second_axis_is_split_beyond_128_devices():
    """And not before: meshes of up to 128 devices are as they were.

    Mutation: `>=` in `_second_split`.
    """
    shapes = {
        128: {"data": 128},
        256: {"data": 128, "shard": 2},
        2048: {"data": 128, "shard": 16},
    }
    for devices, shape in shapes.items():
        assert dict(sharding.make("fsdp", range(devices)).mesh.shape) == shape
    made = sharding.make("fsdp_tensor:model=8", range(2048))
    assert dict(made.mesh.shape) == {"data": 128, "shard": 2, "model": 8}
    assert "shard" not in sharding.make("data", range(512)).mesh.shape


def test_a_checkpoint_is_restored_on_another_number_of_devices(tmp_path):
    """Arrays are stored in their true shapes: from two split axes to one device, bit for bit.

    Mutation: tables stored with their first two axes as one.
    """
    run = cases.run_of("few")
    states = {}
    for mesh in ("fsdp:shard=2", "single"):
        made = sharding.make(mesh)
        with made.activate():
            _, abstract = programs.init_state(run, made, programs.check_fit(run, made))
            with _checkpointer(tmp_path, run) as keeper:
                if mesh != "single":
                    fresh = cases.step_lib.new_state(run, cases.initial_params("few"))
                    states[mesh] = cases.place(fresh, abstract)
                    keeper.save(1, states[mesh], wait=True)
                else:
                    states[mesh] = keeper.restore(1, abstract)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, states.values()))


def _checkpointer(folder, run):
    return checkpoint.Checkpointer(
        folder,
        run.checkpoint,
        run_config=experiment.as_dict(run),
        data_fingerprint="none",
    )
