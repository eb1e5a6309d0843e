"""A run in shapes only: its train step traced and lowered, with no array and no device.

The step is the very one that `training.loop` runs, for devices that are there, for those of
`targets` that are not, or for an abstract mesh of any number. Start at `trace`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.evaluation import loss as loss_lib
from memoryformer.model import losses, parts
from memoryformer.ops import collectives
from memoryformer.training import experiment
from memoryformer.training import programs as programs_lib
from memoryformer.training import step as step_lib
from memoryformer.training import teacher as teacher_lib


def device_sharding(
    run: experiment.Experiment, devices: Sequence[jax.Device] | range
) -> sharding_lib.Sharding:
    """Return the run's sharding over `devices`, or over an abstract mesh for `range(n)`.

    A single device that is not this machine's gets a mesh of size 1: without one, jax would
    compile for the default device.
    """
    striped = teacher_lib.striped(run)
    sharding = sharding_lib.make(run.mesh, devices, striped=striped)
    if sharding.mesh is not None or isinstance(devices, range):
        return sharding
    first: Any = devices[0]
    if first.platform == jax.default_backend():
        return sharding
    mesh = jax.make_mesh((1,), (collectives.DATA_AXIS,), devices=devices[:1])
    return sharding_lib.Sharding(mesh, sharding_lib.ShardingSpecs())


def trace(
    run: experiment.Experiment, sharding: sharding_lib.Sharding
) -> tuple[step_lib.TrainState, jax.stages.Traced]:
    """Trace the trainer's step; returns the abstract state, and what can be lowered.

    Raises `ConfigError` where run and mesh do not fit together.
    """
    # Outside the mesh: on devices that are not there, nothing can be computed.
    teacher = teacher_lib.config_of(run)
    programs = programs_lib.make(run, sharding, teacher=teacher)
    hyper = jax.eval_shape(lambda: step_lib.hyperparams(run))
    taught = teacher_lib.abstract(teacher, sharding)
    with sharding.activate():
        traced = programs.train_step.trace(
            programs.abstract, batch(run, sharding), hyper, *taught
        )
    return programs.abstract, traced


def state(
    run: experiment.Experiment, sharding: sharding_lib.Sharding
) -> step_lib.TrainState:
    """Return the shapes and places of what a checkpoint holds."""
    return programs_lib.make(run, sharding).abstract


def trace_forward(
    run: experiment.Experiment, sharding: sharding_lib.Sharding
) -> jax.stages.Traced:
    """Trace the evaluation step, on a batch of training's size."""
    programs = programs_lib.make(run, sharding)
    with sharding.activate():
        step = loss_lib.make_eval_step(run.model, sharding)
        return step.trace(programs.abstract.params, batch(run, sharding))


def lower(
    traced: jax.stages.Traced, sharding: sharding_lib.Sharding
) -> jax.stages.Lowered:
    """Lower what `trace` returned."""
    with sharding.activate():
        return traced.lower()


def batch(
    run: experiment.Experiment, sharding: sharding_lib.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a training batch, as the data's batches have them."""
    place = None
    if sharding.mesh:
        place = NamedSharding(sharding.mesh, sharding.specs.batch_bl)
    shape = (run.train.batch_size, run.model.seq_len)
    integers = ("inputs", "targets", "positions", "segment_ids")
    dtypes = dict.fromkeys(integers, jnp.int32) | {"weights": jnp.float32}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for name, dtype in dtypes.items()
    }


def mesh_shape(sharding: sharding_lib.Sharding) -> dict[str, int]:
    """Axis -> size; empty without a mesh."""
    return dict(sharding.mesh.shape) if sharding.mesh else {}


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of abstract arrays."""

    def size(x):
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def activation_bytes(
    run: experiment.Experiment, sharding: sharding_lib.Sharding
) -> int:
    """Estimate what the forward pass of a microbatch keeps for the gradient, per device.

    From traces of one and of two blocks on one device, as if all of it were split over
    `model`; codes and scores are not, so that with that axis this is a little low.
    """
    rows = run.train.batch_size // run.train.num_microbatches
    rows = max(rows // sharding.row_parts, 1)
    length = run.model.seq_len // sharding.axis_size(collectives.SEQUENCE_AXIS)
    microbatch = {
        name: jax.ShapeDtypeStruct((rows, length), x.dtype)
        for name, x in batch(run, sharding).items()
    }
    one, two = (_kept_bytes(run, layers, microbatch) for layers in (1, 2))
    total = one + (two - one) * (run.model.num_layers - 1)
    return max(total, 0) // sharding.axis_size(collectives.MODEL_AXIS)


def _kept_bytes(
    run: experiment.Experiment, num_layers: int, batch: dict[str, jax.ShapeDtypeStruct]
) -> int:
    """Bytes of what `vjp` closes over, without the parameters themselves."""
    model = parts.first_layers(run.model, num_layers)
    params = jax.eval_shape(lambda: model_lib.init(model))

    def backward(params, batch):
        nats = lambda p: losses.batch_nats(model, p, batch)  # noqa: E731
        return jax.vjp(nats, params)[1]

    kept = jax.eval_shape(backward, params, batch)
    sizes = {(x.shape, x.dtype) for x in jax.tree.leaves(params)}
    activations = [x for x in jax.tree.leaves(kept) if (x.shape, x.dtype) not in sizes]
    return sharding_lib.num_bytes(activations)
