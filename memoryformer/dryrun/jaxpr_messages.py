"""What a traced step sends, read from its jaxpr: no compiler, any number of devices.

Inside `jax.shard_map` nothing is sent that is not written, so that the jaxpr of a step already
holds its messages, with their types as the model wrote them; a compiler may combine, reorder or
widen them (`hlo_messages`). Loops multiply. Start at `collectives`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax.extend.core
import jax.numpy as jnp

from memoryformer.dryrun import hlo_messages
from memoryformer.dryrun.hlo_messages import Collective

KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}
# These name axes of a mesh and send nothing.
SILENT = {"axis_index", "pcast", "pvary", "preduced", "vary_unreduced_cast"}
SILENT |= {"reduced_vary_cast", "vary_unreduced_cast_p"}
_LETTERS = {"float": "f", "bfloat": "bf", "int": "s", "uint": "u", "bool": "pred"}


def collectives(
    jaxpr: Any, mesh_shape: Mapping[str, int], unknown: set[str] | None = None
) -> list[Collective]:
    """List the collectives of a jaxpr, equal ones counted together, largest first.

    Args:
      jaxpr: such as `jax.jit(f).trace(...).jaxpr`.
      mesh_shape: axis -> size of the mesh that it was traced for.
      unknown: as of `hlo_messages.collectives`.

    Raises `ValueError` for a collective of an unknown kind, without `unknown`.
    """
    counts: Counter[Collective] = Counter()
    for eqn, times in _equations(jaxpr, 1):
        axes = _axes(eqn)
        size = math.prod(mesh_shape.get(axis, 1) for axis in axes)
        if size == 1:
            continue
        kind = KINDS.get(eqn.primitive.name)
        if kind is None:
            name, tables = eqn.primitive.name, "jaxpr_messages.KINDS, or to SILENT"
            hlo_messages.note_unknown(name, unknown, tables)
            continue
        arrays = eqn.outvars if kind == "all-gather" else eqn.invars
        for array in arrays:
            aval = array.aval
            dtype, shape = hlo_dtype(aval.dtype), tuple(aval.shape)
            counts[Collective(kind, axes, size, dtype, shape, 1)] += times
    return hlo_messages.sorted_by_bytes(counts)


def hlo_dtype(dtype: Any) -> str:
    """'bfloat16' -> 'bf16', 'uint8' -> 'u8'."""
    name = jnp.dtype(dtype).name
    word = name.rstrip("0123456789")
    return _LETTERS.get(word, word) + name.removeprefix(word)


def _equations(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
    """Every collective equation, with how often it runs."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if _axes(eqn) and name not in SILENT:
            yield eqn, times
            continue
        inside = [list(_equations(sub, 1)) for sub in _subjaxprs(eqn)]
        if name == "cond":  # one branch runs: the one that sends most
            inside = sorted(inside, key=len)[-1:]
        repeats = times * (eqn.params["length"] if name == "scan" else 1)
        for equations in inside:
            yield from ((sub, repeats * count) for sub, count in equations)


def _axes(eqn: Any) -> tuple[str, ...]:
    """The axes of the mesh that an equation names, such as ('data',)."""
    axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    axes = axes if isinstance(axes, tuple | list) else (axes,)
    return tuple(axis for axis in axes if isinstance(axis, str))


def _subjaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr):
                yield item
