"""Where arrays live: the mesh, one spec per kind of parameter, and batches.

A mesh has the axes `data` (rows of a batch), `sequence` (parts of each row) and `model` (the
last axis of tables, kernels and activations); an axis of size 1 is left out, so that a single
device has no mesh at all. The model runs inside one `jax.shard_map`, where nothing crosses an
axis that is not written (`ops.collectives`); parameters outside it, and the optimizer's step,
carry their shardings in their types (Explicit axes).

    preset         parameters and optimizer state        activations
    single         one device                            one device
    data           replicated                            rows over `data`
    fsdp           over `data`                           rows over `data`
    tensor         last axis over `model`                last axis over `model`
    fsdp_tensor    over `data` and `model`               both
    sequence       replicated                            tokens over `sequence`

`config.mesh` is a preset with optional sizes, such as 'tensor:model=4'; every preset but
`single` takes every axis, as in 'fsdp_tensor:model=2,sequence=2'. `data` takes the devices
that are left. Start at `make`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.notation import Array, Params
from memoryformer.ops import collectives

PRESETS = ("single", "data", "fsdp", "tensor", "fsdp_tensor", "sequence")
AXES = ("data", "sequence", "model")
TOKEN_AXES = ("data", "sequence")  # what splits the tokens of a batch: sums cross them


@dataclasses.dataclass(frozen=True)
class ShardingSpecs:
    """What is split over which axis; all-None (the default) runs anywhere.

    A parameter names its field. Extra axes of a parameter stand before the last one, such
    as the 3 of [K, C, 3, D], and are never split.
    """

    tables: P = P(None, None, None)  # [K, C, F]: F over `model`, C over FSDP's `data`
    columns: P = P(None, None)  # [D, F]: F over `model`, D over FSDP's `data`
    rows: P = P(None, None)  # [F, D]: F over `model`, D over FSDP's `data`
    last_axis: P = P(None)  # [.., F]: F over `model`; small, and repeated over `data`
    whole: P = P()  # not split
    batch_bl: P = P(None, None)  # [B, L]


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh (None: a single device) and its specs.

    `striped`: over `sequence` the tokens of a row are dealt out in turn, device r of n
    holding r, r + n, ..; otherwise in consecutive parts. See `ops.ring`.
    """

    mesh: Mesh | None
    specs: ShardingSpecs
    striped: bool = False

    @property
    def num_devices(self) -> int:
        """Devices in use."""
        return self.mesh.size if self.mesh else 1

    @property
    def platform(self) -> str:
        """Kind of the devices, which need not be those of this machine (`targets`)."""
        if self.mesh is None:
            return jax.default_backend()
        if isinstance(self.mesh, AbstractMesh):
            return "abstract"
        return self.mesh.devices.flat[0].platform

    def activate(self) -> contextlib.AbstractContextManager:
        """Make the mesh the ambient one, for what is computed outside `shard_map`."""
        if isinstance(self.mesh, AbstractMesh):
            return jax.sharding.use_abstract_mesh(self.mesh)
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def axis_size(self, axis: str) -> int:
        """Devices along an axis; 1 if the mesh lacks it."""
        return dict(self.mesh.shape).get(axis, 1) if self.mesh else 1

    def param_specs(self, names: Any, shapes: Any) -> Any:
        """Turn a tree of field names and one of shaped arrays into PartitionSpecs."""

        def spec(name, array):
            spec = getattr(self.specs, name)
            extra = (None,) * (array.ndim - len(spec))
            return P(*spec[:-1], *extra, *spec[-1:])

        return jax.tree.map(spec, names, shapes)

    def named(self, specs: Any) -> Any:
        """Turn a tree of PartitionSpecs into shardings, None without a mesh."""
        if self.mesh is None:
            return jax.tree.map(lambda _: None, specs, is_leaf=_is_spec)
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=_is_spec
        )

    def put(self, tree: Any, specs: Any) -> Any:
        """Place arrays by their specs."""
        if self.mesh is None:
            return jax.tree.map(jax.numpy.asarray, tree)
        return jax.tree.map(jax.device_put, tree, self.named(specs))

    def local_rows(self, batch_size: int) -> np.ndarray:
        """The rows of a batch [B, L] that this process's devices hold, in order.

        Where the mesh follows a torus of TPUs, they need not be neighbours.
        """
        if self.mesh is None:
            return np.arange(batch_size)
        share = batch_size // self.axis_size("data")
        return (self._local_parts()[:, None] * share + np.arange(share)).reshape(-1)

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """Place this process's rows of a batch, those of `local_rows`: -> [B, L].

        With `striped`, L is in the order in which devices hold it.
        """
        if self.mesh is None:
            return jax.device_put(batch)
        sharding = NamedSharding(self.mesh, self.specs.batch_bl)
        parts = self._local_parts()

        def put(rows):
            rows, share = self._dealt(rows), len(rows) // len(parts)
            shape = (share * self.axis_size("data"), *rows.shape[1:])

            def of_device(index):
                part = index[0].indices(shape[0])[0] // share
                first = int(np.searchsorted(parts, part)) * share
                return rows[first : first + share, index[1]]

            # Asked for here, which jax's transfer guard cannot know.
            with jax.transfer_guard_host_to_device("allow"):
                return jax.make_array_from_callback(shape, sharding, of_device)

        return {name: put(rows) for name, rows in batch.items()}

    def _local_parts(self) -> np.ndarray:
        """Which of the parts of `data` this process's devices hold, ascending."""
        by_row = NamedSharding(self.mesh, P(self.specs.batch_bl[0]))
        size = self.axis_size("data")
        held = by_row.addressable_devices_indices_map((size,)).values()
        return np.unique([part[0].indices(size)[0] for part in held])

    def _dealt(self, rows):
        size = self.axis_size("sequence")
        if not self.striped or size == 1:
            return rows
        return np.concatenate([rows[:, i::size] for i in range(size)], axis=1)

    def shard_map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Run `function` on every device's part; itself without a mesh.

        Replication is not tracked (`check_vma=False`): gradients taken inside are of the
        sum over devices of what each computes, and `sum_gradients` adds up their parts.
        """
        if self.mesh is None:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )


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
    main = {"tensor": "model", "fsdp_tensor": "model", "sequence": "sequence"}.get(
        preset
    )
    if main and main not in sizes:  # it takes all that the given sizes leave
        sizes[main] = max(len(devices) // math.prod(sizes.values()), 1)
    sequence, model = sizes.get("sequence", 1), sizes.get("model", 1)
    data, rest = divmod(len(devices), sequence * model)
    if rest or data < 1 or sizes.get("data", data) != data:
        wanted = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(
            f"mesh={mesh!r}: {wanted} does not fit {len(devices)} devices: the product "
            "of the sizes must be their number."
        )
    sizes = dict(zip(AXES, (data, sequence, model), strict=True))
    shape = {axis: size for axis, size in sizes.items() if size > 1}
    if not shape:
        return Sharding(None, ShardingSpecs())
    made = _mesh(mesh, shape, devices)
    return Sharding(made, _specs(set(shape), fully="fsdp" in preset), striped)


def _mesh(mesh, shape, devices):
    names, sizes = tuple(shape), tuple(shape.values())
    types = (jax.sharding.AxisType.Explicit,) * len(names)
    if isinstance(devices[0], int):
        return AbstractMesh(sizes, names, axis_types=types)
    try:
        return Mesh(_arranged(sizes, devices), names, axis_types=types)
    except (ValueError, NotImplementedError, AssertionError) as error:
        wanted = " x ".join(f"{axis}={size}" for axis, size in shape.items())
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"mesh={mesh!r}: {wanted} cannot be laid out on these {len(devices)} devices "
            f"({reason}): choose other sizes."
        ) from error


def _arranged(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
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


def _specs(axes: set[str], *, fully: bool) -> ShardingSpecs:
    data, sequence, model = (axis if axis in axes else None for axis in AXES)
    rows = data if fully else None  # FSDP: the axis that `model` does not split
    return ShardingSpecs(
        tables=P(None, rows, model),
        columns=P(rows, model),
        rows=P(model, rows),
        last_axis=P(model),
        whole=P(),
        batch_bl=P(data, sequence),
    )


def validate(
    sharding: Sharding, specs: Any, shapes: Any, batch_size: int, num_heads: int
) -> None:
    """Check that every count divides over the mesh; raises `ConfigError`.

    Beside the arrays' own axes: the rows of a batch, heads, the chunks that a memory layer
    hashes (a device hashes whole ones), and the logits of a head that is the embedding.
    """

    def check(size, axis, what, fix):
        count = sharding.axis_size(axis) if axis else 1
        if size % count:
            raise ConfigError(
                f"{what} does not divide over {count} devices along {axis!r}: "
                f"{fix.format(count)}."
            )

    rows = f"batch_size={batch_size}"
    check(batch_size, "data", rows, "use a multiple of {}")
    heads = f"model.num_heads={num_heads}"
    check(num_heads, "model", heads, "use fewer devices there or more heads")
    leaves = jax.tree.leaves_with_path(specs, is_leaf=_is_spec)
    for (path, spec), shaped in zip(leaves, jax.tree.leaves(shapes), strict=True):
        keys, shape = [str(entry.key) for entry in path], tuple(shaped.shape)
        name = f"mesh: {'.'.join(keys)} {shape}"
        if keys[-1] == "tables":
            what = f"{name}: the number of tables, {shape[0]},"
            fix = "make model.embed_dim / model.code_bits a multiple of {}"
            check(shape[0], "model", what, fix)
        if keys[-1] == "embedding" and "head" not in shapes:
            what = f"{name}: with model.tie_embeddings, model.vocab_size={shape[0]}"
            check(shape[0], "model", what, "use a multiple of {}")
        for size, axis in zip(shape, spec, strict=False):
            what = f"{name}: {size}"
            check(size, axis, what, "change that size or the mesh")


# --------------------------------------------------------------------------------------
# Inside `Sharding.shard_map`.


def gather_params(params: Params, specs: Any) -> Params:
    """Join what FSDP split over `data`, once a step."""

    def gather(param, spec):
        if "data" not in spec:
            return param
        return collectives.all_gather(param, "data", spec.index("data"))

    return jax.tree.map(gather, params, specs)


def sum_gradients(grads: Params, specs: Any, axes: Sequence[str] = AXES) -> Params:
    """Add up the devices' gradients, leaving each device what it stores.

    Over an axis that splits the parameter the gradient is whole already, or, for FSDP's
    `data`, a reduce-scatter keeps this device's rows. The other axes are summed over at once.
    Sums are in float32; what one device computes alone stays as it is.
    """

    def reduce(grad, spec):
        summed = [axis for axis in axes if axis == "data" or axis not in spec]
        if any(collectives.axis_size(axis) > 1 for axis in summed):
            grad = grad.astype(jax.numpy.promote_types(grad.dtype, "float32"))
        if "data" in axes and "data" in spec:
            grad = collectives.reduce_scatter(grad, "data", spec.index("data"))
        return collectives.psum(grad, tuple(axis for axis in axes if axis not in spec))

    return jax.tree.map(reduce, grads, specs)


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, P)
