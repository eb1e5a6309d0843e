"""Where arrays live: the mesh, one spec per kind of parameter, and batches.

A mesh has the axes `data` and `shard` (rows of a batch), `sequence` (parts of each row) and `model`
(the last axis of tables, kernels and activations); an axis of size 1 is left out, so that a single
device has no mesh at all. The model runs inside one `jax.shard_map`, where nothing crosses an
axis that is not written (`ops.collectives`); parameters outside it, and the optimizer's step,
carry their shardings in their types (Explicit axes).

    preset         parameters and optimizer state        activations
    single         one device                            one device
    data           replicated                            rows over `data`
    fsdp           over `data`, and `shard`              rows over both
    tensor         last axis over `model`                last axis over `model`
    fsdp_tensor    over these and `model`                both
    sequence       replicated                            tokens over `sequence`

`config.mesh` is a preset with optional sizes, such as 'tensor:model=4'; every preset but
`single` takes every axis, as in 'fsdp_tensor:model=2,sequence=2'. `data` takes the devices
that are left. Beyond 128 of them FSDP splits two axes of each parameter, the buckets of tables over
`data` and the tables themselves over `shard`: no array is padded. Modules: `mesh` (which devices), `placement` (what lies on them, decided in
`specs_over`), `movement` (what FSDP sends). Start at `make`.
"""

from memoryformer.ops.collectives import AXES, TOKEN_AXES
from memoryformer.sharding.mesh import PRESETS, make
from memoryformer.sharding.movement import axes_of, gather_params, sum_gradients
from memoryformer.sharding.placement import (
    Sharding,
    ShardingSpecs,
    num_bytes,
    validate,
)

__all__ = [
    "AXES",
    "PRESETS",
    "TOKEN_AXES",
    "Sharding",
    "ShardingSpecs",
    "axes_of",
    "gather_params",
    "make",
    "num_bytes",
    "sum_gradients",
    "validate",
]
