"""What a checkpoint says about the leaves of a state: path, shape, dtype.

Enough to refuse a state of another model by the name of the first leaf that differs, and
to read the parameters back without the model. Leaves are arrays or abstract values.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from memoryformer.errors import ConfigError
from memoryformer.notation import Params
from memoryformer.runs import orbax_files

Leaf = list[Any]  # [[key, ...], [size, ...], dtype], as JSON gives it back


def describe(state: Any) -> list[Leaf]:
    """Return [[path keys], [shape], dtype] of every leaf, in the order of the tree."""
    return [
        [
            jax.tree_util.keystr(path, simple=True, separator="\0").split("\0"),
            list(x.shape),
            str(x.dtype),
        ]
        for path, x in jax.tree.leaves_with_path(state)
    ]


def compare(saved: Iterable[Leaf], wanted: Iterable[Leaf], step: int) -> None:
    """Raise `ConfigError` at the first leaf that differs in name, shape or dtype."""
    old, new = _by_name(saved), _by_name(wanted)
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name, "absent"), new.get(name, "absent")
        if was != now:
            raise ConfigError(
                f"checkpoint {step} is of another model or optimizer: {name} is {was} "
                f"there and {now} here; use its config, or a new --workdir."
            )


def nested(described: Iterable[Leaf], root: str) -> dict[str, Any]:
    """Return {root: abstract values of the leaves under that key} as nested dicts."""
    tree: dict[str, Any] = {}
    for path, shape, dtype in described:
        if path[0] != root:
            continue
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jax.ShapeDtypeStruct(shape, dtype)
    return tree


def of_params(described: Iterable[Leaf]) -> list[Leaf]:
    """Return the leaves that are parameters."""
    return [leaf for leaf in described if leaf[0][0] == "params"]


def begun(abstract_state: Any, params: Params) -> Any:
    """Return the state of step 0 with these parameters, placed as `abstract_state` says.

    All else is zero then: the step, moments, the history of spikes.
    """

    def placed(x, value):
        return jax.device_put(value, orbax_files.abstract(x).sharding)

    zeros = jax.tree.map(
        lambda x: placed(x, np.zeros(x.shape, x.dtype)), abstract_state
    )
    return zeros._replace(params=jax.tree.map(placed, abstract_state.params, params))


def without(state: Any, absent: Params) -> Any:
    """Return a state without these parameters; as it is if there are none."""
    if not absent:
        return state
    gone = traverse_util.flatten_dict(absent)
    flat = traverse_util.flatten_dict(state.params)
    kept = {path: x for path, x in flat.items() if path not in gone}
    return state._replace(params=traverse_util.unflatten_dict(kept))


def filled(state: Any, absent: Params, abstract_state: Any) -> Any:
    """Put these parameters into a state, placed as `abstract_state` says."""
    if not absent:
        return state
    flat = traverse_util.flatten_dict(state.params)
    places = traverse_util.flatten_dict(abstract_state.params)
    for path, x in traverse_util.flatten_dict(absent).items():
        flat[path] = jax.device_put(x, orbax_files.abstract(places[path]).sharding)
    return state._replace(params=traverse_util.unflatten_dict(flat))


def total_bytes(state: Any) -> int:
    """Return the bytes of all leaves, whatever devices they are spread over."""
    return sum(
        math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(state)
    )


def _by_name(described: Iterable[Leaf]) -> dict[str, str]:
    return {
        "/".join(path): f"{dtype}[{', '.join(map(str, shape))}]"
        for path, shape, dtype in described
    }
