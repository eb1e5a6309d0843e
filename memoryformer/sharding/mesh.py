"""The mesh that a `config.mesh` string asks for. Start at `make`."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.ops.collectives import (
    AXES,
    DATA_AXIS,
    MODEL_AXIS,
    SEQUENCE_AXIS,
    SHARD_AXIS,
)
from memoryformer.sharding import placement
from memoryformer.sharding.placement import Sharding, ShardingSpecs

PRESETS = ("single", "data", "fsdp", "tensor", "fsdp_tensor", "sequence")
ONE_AXIS = 128  # devices that FSDP splits one axis of each parameter over
# The axis that takes the devices which the sizes leave, where it is not `data`.
_MAIN_AXIS = {
    "tensor": MODEL_AXIS,
    "fsdp_tensor": MODEL_AXIS,
    "sequence": SEQUENCE_AXIS,
}


def make(
    mesh: str,
    devices: Sequence[jax.Device] | None = None,
    *,
    striped: bool = False,
) -> Sharding:
    """Build the mesh that a `config.mesh` string asks for; raises `ConfigError`.

    Of `range(n)` it makes an abstract mesh of n devices, to trace for.

    `striped`: how rows are split over `sequence`; for mixers that take any order.
    """
    preset, sizes = _parse(mesh)
    devices = list(jax.devices() if devices is None else devices)
    if preset == "single":
        return Sharding(None, ShardingSpecs())
    main = _MAIN_AXIS.get(preset)
    if main and main not in sizes:  # it takes all that the sizes in the string leave
        sizes[main] = max(len(devices) // math.prod(sizes.values()), 1)
    sequence, model = sizes.get(SEQUENCE_AXIS, 1), sizes.get(MODEL_AXIS, 1)
    if "fsdp" in preset and not {DATA_AXIS, SHARD_AXIS} & sizes.keys():
        sizes[SHARD_AXIS] = _second_split(len(devices) // (sequence * model))
    shard = sizes.get(SHARD_AXIS, 1)
    data, left_over = divmod(len(devices), shard * sequence * model)
    if left_over or data < 1 or sizes.get(DATA_AXIS, data) != data:
        wanted = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(
            f"mesh={mesh!r}: {wanted} does not fit {len(devices)} devices: the product "
            "of the sizes must be their number."
        )
    sizes = dict(zip(AXES, (data, shard, sequence, model), strict=True))
    shape = {axis: size for axis, size in sizes.items() if size > 1}
    if not shape:
        return Sharding(None, ShardingSpecs())
    specs = placement.specs_over(set(shape), fsdp="fsdp" in preset)
    return Sharding(_mesh(mesh, shape, devices), specs, striped)


def _second_split(parts: int) -> int:
    """Return over how many devices FSDP splits a second axis, of `parts` in all.

    An embedding of 50304 = 128 x 393 rows, and tables of 256 rows, divide over no more by one.
    """
    return parts // math.gcd(parts, ONE_AXIS) if parts > ONE_AXIS else 1


def _mesh(
    mesh: str, shape: dict[str, int], devices: Sequence[jax.Device | int]
) -> Mesh | AbstractMesh:
    names, sizes = tuple(shape), tuple(shape.values())
    types = (jax.sharding.AxisType.Explicit,) * len(names)
    if isinstance(devices[0], int):
        return AbstractMesh(sizes, names, axis_types=types)
    try:
        return Mesh(arranged(sizes, devices), names, axis_types=types)
    except (ValueError, NotImplementedError, AssertionError) as error:
        wanted = " x ".join(f"{axis}={size}" for axis, size in shape.items())
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"mesh={mesh!r}: {wanted} cannot be laid out on these {len(devices)} devices "
            f"({reason}): choose other sizes."
        ) from error


def arranged(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Lay devices out so that neighbours in the mesh are near: `sizes` -> [*sizes].

    `jax.make_mesh` does it too, but neither splits an axis of a TPU torus that is no v5e nor
    takes several slices. A slice is what a fast network joins (on GPUs, NVLink); the first
    axes, which send the least, are those that lie across slices.
    """
    left = num_slices = len({getattr(d, "slice_index", 0) for d in devices})
    if num_slices == 1:
        return mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
    across = []
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    within = [size // n for size, n in zip(sizes, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def _parse(mesh: str) -> tuple[str, dict[str, int]]:
    preset, _, options = mesh.partition(":")
    config_lib.choose(preset, PRESETS, "mesh")
    sizes = {}
    for option in filter(None, options.split(",")):
        axis, _, size = option.partition("=")
        config_lib.choose(axis, AXES, f"mesh={mesh!r}, axis")
        if not size.isdigit() or int(size) < 1:
            raise ConfigError(f"mesh={mesh!r}: {axis}={size!r} is not a size >= 1.")
        sizes[axis] = int(size)
    return preset, sizes
