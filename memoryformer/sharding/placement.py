"""What lies where on a mesh: one spec per kind of parameter, and batches.

Which axis splits what is decided in `specs_over`. Start at `Sharding`; `mesh.make` builds one.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memoryformer.errors import ConfigError
from memoryformer.notation import Array
from memoryformer.ops.collectives import (
    AXES,
    MODEL_AXIS,
    ROW_AXES,
    SEQUENCE_AXIS,
)
from memoryformer.sharding.movement import axes_of


@dataclasses.dataclass(frozen=True)
class ShardingSpecs:
    """What is split over which axis; all-None (the default) runs anywhere.

    A parameter names its field (`spec=`). Extra axes of a parameter stand before the last one, such
    as the 3 of [K, C, 3, D], and are never split.
    """

    # F over `model`; over FSDP's axes C and K, D and F.
    tables: P = P(None, None, None)  # [K, C, F]: C over `data`, K over `shard`
    columns: P = P(None, None)  # [D, F]: D over `data`, F over `shard`
    rows: P = P(None, None)  # [F, D]: likewise
    vocabulary: P = P(None, None)  # [V, D], embedding and head: as `columns`
    last_axis: P = P(None)  # [.., F]: F over `model`; small, and repeated over `data`
    whole: P = P()  # not split
    batch_bl: P = P(None, None)  # [B, L]


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh (None: a single device) and its specs.

    `striped`: over `sequence` the tokens of a row are dealt out in turn, device r of n
    holding r, r + n, ..; otherwise in consecutive parts. See `ops.ring`.
    """

    mesh: Mesh | AbstractMesh | None
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

    @property
    def row_parts(self) -> int:
        """Parts that the rows of a batch are split into."""
        return math.prod(map(self.axis_size, ROW_AXES))

    def param_specs(self, names: Any, shapes: Any) -> Any:
        """Turn a tree of field names and one of shaped arrays into PartitionSpecs."""

        def spec(name: str, array: Any) -> P:
            spec = getattr(self.specs, name)
            extra = (None,) * (array.ndim - len(spec))
            return P(*spec[:-1], *extra, *spec[-1:])

        return jax.tree.map(spec, names, shapes)

    def named(self, specs: Any) -> Any:
        """Turn a tree of PartitionSpecs into shardings, None without a mesh."""
        mesh = self.mesh
        if mesh is None:
            return jax.tree.map(lambda _: None, specs, is_leaf=_is_spec)
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec
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
        share = batch_size // self.row_parts
        return (
            self._local_parts(self.mesh)[:, None] * share + np.arange(share)
        ).reshape(-1)

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """Place this process's rows of a batch, those of `local_rows`: -> [B, L].

        With `striped`, L is in the order in which devices hold it.
        """
        if self.mesh is None:
            return jax.device_put(batch)
        sharding = NamedSharding(self.mesh, self.specs.batch_bl)
        parts = self._local_parts(self.mesh)

        def put(rows: np.ndarray) -> Array:
            rows, share = self._dealt(rows), len(rows) // len(parts)
            shape = (share * self.row_parts, *rows.shape[1:])

            def of_device(index: Any) -> np.ndarray:
                part = index[0].indices(shape[0])[0] // share
                first = int(np.searchsorted(parts, part)) * share
                return rows[first : first + share, index[1]]

            # Asked for here, which jax's transfer guard cannot know.
            with jax.transfer_guard_host_to_device("allow"):
                return jax.make_array_from_callback(shape, sharding, of_device)

        return {name: put(rows) for name, rows in batch.items()}

    def _local_parts(self, mesh: Mesh | AbstractMesh) -> np.ndarray:
        """Which of the rows' parts this process's devices hold, ascending."""
        by_row = NamedSharding(mesh, P(self.specs.batch_bl[0]))
        size = self.row_parts
        held = by_row.addressable_devices_indices_map((size,)).values()
        return np.unique(
            [part[0].indices(size)[0] for part in held if part is not None]
        )

    def _dealt(self, rows: np.ndarray) -> np.ndarray:
        """Tokens in the order in which the devices of `sequence` hold them."""
        size = self.axis_size(SEQUENCE_AXIS)
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


def specs_over(axes: set[str], *, fsdp: bool) -> ShardingSpecs:
    """Return the specs of a mesh with these axes.

    What gathers relies on them: `model.layers` (codes), `evaluation.buckets` (counts).
    """
    data, shard, sequence, model = (axis if axis in axes else None for axis in AXES)
    rows = data if fsdp else None  # the axis that `model` does not split
    second = shard if fsdp else None  # another axis; after `model` where that splits it
    return ShardingSpecs(
        tables=P(second, rows, model),
        columns=P(rows, _both(model, second)),
        vocabulary=P(rows, _both(model, second)),
        rows=P(_both(model, second), rows),
        last_axis=P(model),
        whole=P(),
        batch_bl=P(_both(data, shard), sequence),
    )


def _both(first: str | None, second: str | None) -> str | tuple[str, ...] | None:
    """Return an entry of a spec for an axis that is split over one, both or neither."""
    axes = tuple(axis for axis in (first, second) if axis)
    return axes if len(axes) > 1 else (first or second)


# Axis 0 of these is computed by parts over `model` too, though it is not stored so.
_COMPUTED_BY_PARTS = {
    "tables": (
        "the number of tables, {size},",  # a device hashes whole chunks
        "make model.embed_dim / model.code_bits a multiple of {count}",
    ),
    "vocabulary": (  # the logits of a head that is the embedding
        "with model.tie_embeddings, model.vocab_size={size}",
        "use a multiple of {count}",
    ),
}


def validate(
    sharding: Sharding, names: Any, shapes: Any, batch_size: int, num_heads: int
) -> None:
    """Check that every count divides over the mesh; raises `ConfigError`.

    names: the parameters' fields of `ShardingSpecs`.  shapes: their arrays, or abstract
    ones. Beside their axes: the rows of a batch, heads, and what `_COMPUTED_BY_PARTS` says.
    """

    def check(size: int, axes: Any, what: str, fix: str) -> None:
        present = [a for a in axes_of(axes) if sharding.axis_size(a) > 1]
        count = math.prod(map(sharding.axis_size, present))
        if size % count:
            along = " x ".join(map(repr, present))
            raise ConfigError(
                f"{what} does not divide over {count} devices along {along}: "
                f"{fix.format(count=count)}."
            )

    rows = f"batch_size={batch_size}"
    check(batch_size, ROW_AXES, rows, "use a multiple of {count}")
    heads = f"model.num_heads={num_heads}"
    check(num_heads, MODEL_AXIS, heads, "use fewer devices there or more heads")
    specs = jax.tree.leaves(sharding.param_specs(names, shapes), is_leaf=_is_spec)
    arrays = jax.tree.leaves_with_path(shapes)
    for (path, array), kind, spec in zip(
        arrays, jax.tree.leaves(names), specs, strict=True
    ):
        shape = tuple(array.shape)
        keys = jax.tree_util.keystr(path, simple=True, separator=".")
        if kind in _COMPUTED_BY_PARTS:
            what, fix = _COMPUTED_BY_PARTS[kind]
            what = f"mesh: {keys} {shape}: {what.format(size=shape[0])}"
            check(shape[0], MODEL_AXIS, what, fix)
        for size, axis in zip(shape, spec, strict=False):
            what = f"mesh: {keys} {shape}: {size}"
            check(size, axis, what, "change that size or the mesh")


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, P)
