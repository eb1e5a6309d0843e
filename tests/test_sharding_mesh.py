"""Which mesh a `config.mesh` asks for, and how devices are laid out in it."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

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
        ("fsdp_tensor:model=1", {"data": 8}),
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


@pytest.mark.parametrize(
    "mesh, tables, columns, rows, last_axis, batch",
    [
        ("data", (None,) * 3, (None, None), (None, None), None, ("data", None)),
        (
            "fsdp",
            (None, "data", None),
            ("data", None),
            (None, "data"),
            None,
            ("data", None),
        ),
        (
            "tensor",
            (None, None, "model"),
            (None, "model"),
            ("model", None),
            "model",
            (None, None),
        ),
        (
            "fsdp_tensor:model=2",
            (None, "data", "model"),
            ("data", "model"),
            ("model", "data"),
            "model",
            ("data", None),
        ),
        (
            "fsdp_tensor:shard=2,model=2",
            ("shard", "data", "model"),
            ("data", ("model", "shard")),
            (("model", "shard"), "data"),
            "model",
            (("data", "shard"), None),
        ),
        ("sequence", (None,) * 3, (None, None), (None, None), None, (None, "sequence")),
    ],
)
def test_what_each_preset_splits(mesh, tables, columns, rows, last_axis, batch):
    """As in the table of the module.

    Mutations: `and` for the order of axes; FSDP always; `activate` sets what has no devices.
    """
    made = sharding.make(mesh, range(8))
    assert made.specs == sharding.ShardingSpecs(
        tables=P(*tables),
        columns=P(*columns),
        vocabulary=P(*columns),
        rows=P(*rows),
        last_axis=P(last_axis),
        whole=P(),
        batch_bl=P(*batch),
    )
    assert made.num_devices == 8 and made.platform == "abstract"
    with made.activate():
        assert jax.sharding.get_abstract_mesh() == made.mesh
    assert made.striped is False
    assert sharding.make(mesh, range(8), striped=True).striped


def test_no_devices_are_too_few():
    """Mutation: `data < 1` left out."""
    with pytest.raises(ConfigError, match="does not fit 0 devices"):
        sharding.make("data", [])


def test_whose_devices_they_are():
    """Mutations: the platform of this machine for that of the mesh."""
    assert sharding.make("single").platform == sharding.make("data").platform == "cpu"
    single = sharding.make("single")
    assert (single.num_devices, single.axis_size("data")) == (1, 1)
    made = sharding.make("data:sequence=2", jax.devices()[:6])
    sizes = {axis: made.axis_size(axis) for axis in sharding.AXES}
    assert sizes == {"data": 3, "shard": 1, "sequence": 2, "model": 1}


def test_bytes_of_a_tree():
    """Mutation: a quotient for the product."""
    tree = {"a": jax.ShapeDtypeStruct((2, 3), "bfloat16"), "b": np.zeros(5, np.int8)}
    assert sharding.num_bytes(tree) == 12 + 5


def test_a_spec_may_be_shorter_than_its_array():
    """Axes that it does not name are not split. Mutation: the last spec of an array first."""
    made = sharding.make("data", range(4))
    shapes = {"head": jax.ShapeDtypeStruct((3, 5), "float32")}
    sharding.validate(made, {"head": "whole"}, shapes, 8, 2)
    with pytest.raises(
        ConfigError, match=r"mesh: head \(3, 5\): 3 does not divide over 4"
    ):
        sharding.validate(made, {"head": "batch_bl"}, shapes, 8, 2)
    made = sharding.make("tensor", range(2))
    shapes = {"head": jax.ShapeDtypeStruct((3, 4), "float32")}
    sharding.validate(made, {"head": "last_axis"}, shapes, 8, 2)
    shapes = {"head": jax.ShapeDtypeStruct((4, 3), "float32")}
    with pytest.raises(
        ConfigError, match=r"mesh: head \(4, 3\): 3 does not divide over 2"
    ):
        sharding.validate(made, {"head": "last_axis"}, shapes, 8, 2)


def test_rows_are_dealt_in_turn():
    """Only over `sequence`, and only where asked. Mutations: `and` for `or`; parts for turns."""
    rows = np.arange(8)[None]
    for striped, wanted in ((True, [0, 2, 4, 6, 1, 3, 5, 7]), (False, range(8))):
        made = sharding.make("sequence", range(2), striped=striped)
        np.testing.assert_array_equal(made._dealt(rows), [list(wanted)])
    made = sharding.make("data", range(2), striped=True)
    np.testing.assert_array_equal(made._dealt(rows), rows)


def test_rows_of_this_process():
    """All of them where there is one. Mutation: a product for the quotient."""
    for mesh in ("single", "data", "fsdp_tensor:model=2", "sequence"):
        made = sharding.make(mesh)
        np.testing.assert_array_equal(made.local_rows(16), np.arange(16))


def test_what_one_device_computes_stays_in_its_type():
    """Mutations: `>=` for `>`; every gradient in float32."""
    for dtype in ("bfloat16", "float32"):
        grads = {"a": np.ones((2, 2), dtype)}
        summed = sharding.sum_gradients(grads, {"a": P()})
        assert summed["a"].dtype == dtype
        gathered = sharding.gather_params(grads, {"a": P()})
        assert gathered["a"] is grads["a"]


@pytest.mark.parametrize(
    ("mesh", "spec", "dtype"),
    [
        ("data", P(), "float32"),
        ("fsdp", P("data"), "float32"),
        ("tensor:model=8", P("model"), "bfloat16"),
        ("tensor:model=8", P(), "float32"),
    ],
)
def test_what_devices_add_up_is_float32(mesh, spec, dtype):
    """Also where each keeps its part. Mutation: `!=` for `==`, for FSDP's axis."""
    made = sharding.make(mesh)
    specs = {"a": spec}

    def total(grads):
        return sharding.sum_gradients(grads, specs)

    whole = {"a": P()} if mesh != "tensor:model=8" else specs
    with made.activate():
        function = made.shard_map(total, (whole,), specs)
        summed = jax.eval_shape(
            function, made.put({"a": np.ones((8, 2), "bfloat16")}, whole)
        )
    assert summed["a"].dtype == dtype


def test_a_long_reason_is_cut(monkeypatch):
    """Mutation: 201."""

    def refuse(*arguments, **options):
        raise ValueError("y" * 300)

    monkeypatch.setattr(mesh_lib.mesh_utils, "create_device_mesh", refuse)
    with pytest.raises(ConfigError, match=r"\(y{200}\): choose other sizes"):
        sharding.make("data")
