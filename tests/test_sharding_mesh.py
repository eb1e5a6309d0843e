"""Which mesh a `config.mesh` asks for, and how devices are laid out in it."""

import types

import jax
import numpy as np
import pytest

from memoryformer import sharding
from memoryformer.errors import ConfigError
from memoryformer.sharding import mesh as mesh_lib


def test_bare_specs_run_anywhere():
    """One device, and any mesh's preset on one device, has no mesh at all.

    Mutation: a mesh of size 1 in `make`.
    """
    for mesh in sharding.PRESETS:
        made = sharding.make(mesh, jax.devices()[:1])
        assert made.mesh is None and made.num_devices == 1
        assert made.specs == sharding.ShardingSpecs()


@pytest.mark.parametrize(
    "mesh, shape",
    [
        ("data", {"data": 8}),
        ("fsdp", {"data": 8}),
        ("tensor", {"model": 8}),
        ("tensor:model=2", {"data": 4, "model": 2}),
        ("fsdp_tensor:data=2,model=4", {"data": 2, "model": 4}),
        ("sequence", {"sequence": 8}),
        ("sequence:sequence=4", {"data": 2, "sequence": 4}),
        ("data:sequence=4,data=2", {"data": 2, "sequence": 4}),
        ("tensor:sequence=2", {"sequence": 2, "model": 4}),
        ("fsdp_tensor:model=2,sequence=2", {"data": 2, "sequence": 2, "model": 2}),
    ],
)
def test_mesh_strings(mesh, shape):
    """Sizes not given are filled in. Mutation: `model` 1 where 'tensor' names no size."""
    assert dict(sharding.make(mesh).mesh.shape) == shape


@pytest.mark.parametrize(
    "mesh, message",
    [
        ("fsd", "mesh='fsd': unknown choice; did you mean 'fsdp'?"),
        ("tensor:modle=2", "did you mean 'model'?"),
        ("tensor:model=3", "model=3 does not fit 8 devices"),
        ("tensor:model=16", "model=16 does not fit 8 devices"),
        ("tensor:model=two", "model='two' is not a size >= 1"),
        ("tensor:model=0", "model='0' is not a size >= 1"),
        ("data:data=4", "data=4 does not fit 8 devices"),
        ("data:sequence=3", "sequence=3 does not fit 8 devices"),
        ("tensor:sequence=16", "sequence=16 x model=1 does not fit 8 devices"),
    ],
)
def test_bad_mesh_strings_are_one_line(mesh, message):
    """Mutation: `rest` not looked at in `make`."""
    with pytest.raises(ConfigError) as caught:
        sharding.make(mesh)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def slice_of_tpus(rows, columns, kind="TPU v6 lite", slice_index=0):
    """Devices of one slice as jax describes them, hosts of 2 x 2."""
    return [
        types.SimpleNamespace(
            platform="tpu",
            device_kind=kind,
            core_on_chip=0,
            coords=(x, y, 0),
            slice_index=slice_index,
            process_index=(y // 2 * ((columns + 1) // 2) + x // 2, slice_index),
            id=x + columns * y + 1000 * slice_index,
        )
        for y, x in np.ndindex(rows, columns)
    ]


@pytest.mark.parametrize(
    "devices, sizes",
    [
        (slice_of_tpus(8, 8), (16, 4)),
        (slice_of_tpus(4, 4), (8, 2)),
        (slice_of_tpus(4, 4, "TPU v5 lite"), (8, 2)),
        (slice_of_tpus(4, 4), (2, 2, 4)),
    ],
)
def test_meshes_that_split_an_axis_of_the_torus(devices, sizes):
    """Every device once; those of a `model` group are neighbours.

    Mutation: `jax.make_mesh`, which refuses all but v5e.
    """
    made = mesh_lib.arranged(sizes, devices)
    assert made.shape == sizes and len({d.id for d in made.flat}) == len(devices)
    for group in made.reshape(-1, sizes[-1]):
        spread = np.ptp([d.coords for d in group], axis=0) + 1
        assert np.prod(spread) == len(group)


@pytest.mark.parametrize(
    "sizes, across",
    [((8, 4), (2, 1)), ((32,), (2,)), ((16, 2), (2, 1)), ((1, 32), (1, 2))],
)
def test_meshes_of_several_slices(sizes, across):
    """The first axis that can lies across slices, the others inside one.

    Mutation: `create_device_mesh` for all devices; or `sizes` from the last.
    """
    devices = slice_of_tpus(4, 4) + slice_of_tpus(4, 4, slice_index=1)
    made = mesh_lib.arranged(sizes, devices)
    assert made.shape == sizes and len({d.id for d in made.flat}) == len(devices)
    slices = np.vectorize(lambda d: d.slice_index)(made)
    for axis, size in enumerate(across):
        for line in np.moveaxis(slices, axis, -1).reshape(-1, sizes[axis]):
            assert len(set(line)) == size
            assert list(line) == sorted(line)  # consecutive parts in one slice


@pytest.mark.parametrize(
    "devices, reason",
    [
        ([*slice_of_tpus(4, 3)[:-1], *slice_of_tpus(6, 6)[-1:]], "jax_devices="),
        (slice_of_tpus(2, 4) + slice_of_tpus(2, 2, slice_index=1), "must equal"),
    ],
)
def test_devices_that_cannot_be_laid_out(devices, reason):
    """A hole, slices of two sizes: one line. Mutation: jax's errors let through."""
    with pytest.raises(ConfigError, match="data=6 x model=2 cannot be laid") as caught:
        sharding.make("tensor:model=2", devices)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
