"""From flat names to a parameter tree and back, by a table of correspondences.

A format is a tuple of `Entry`s: the path of ours, the names of theirs, and how one becomes
the other. The same table reads and writes, so a round trip cannot lose a tensor.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from memoryformer import config as config_lib
from memoryformer import model
from memoryformer.errors import ConfigError, DataError
from memoryformer.notation import Params


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours and the tensors of theirs that hold it.

    `read(config, *tensors)` gives ours; `write(config, ours)` gives the tuple of theirs.
    """

    ours: str
    theirs: tuple[str, ...]
    read: Callable[..., np.ndarray] = lambda config, tensor: tensor
    write: Callable[..., tuple[np.ndarray, ...]] = lambda config, array: (array,)


def linear(ours: str, theirs: str) -> Entry:
    """A kernel [D, F] of ours; PyTorch's weight is [F, D]."""
    return Entry(ours, (theirs,), lambda _, w: w.T, lambda _, w: (w.T,))


def in_block(entries: Iterable[Entry], ours: str, theirs: str) -> list[Entry]:
    """Put a block's prefixes before both sides of its entries."""
    return [
        dataclasses.replace(
            e, ours=ours + e.ours, theirs=tuple(theirs + name for name in e.theirs)
        )
        for e in entries
    ]


def read(
    entries: Iterable[Entry],
    tensors: Mapping[str, np.ndarray],
    config: model.ModelConfig,
    source: Any,
) -> Params:
    """Make our parameters, float32, from their tensors; every tensor must be used.

    Raises `DataError` for a missing, superfluous or wrongly shaped tensor.
    """
    unused = set(tensors)
    flat = {}
    for entry in entries:
        missing = [name for name in entry.theirs if name not in tensors]
        if missing:
            raise DataError(f"{source}: lacks the tensor {missing[0]!r}.")
        unused.difference_update(entry.theirs)
        try:
            array = entry.read(config, *(tensors[name] for name in entry.theirs))
            flat[entry.ours] = np.ascontiguousarray(array, dtype=np.float32)
        except (ValueError, IndexError, TypeError) as error:
            raise DataError(
                f"{source}: {entry.theirs[0]!r} has the wrong shape ({error})."
            ) from error
    if unused:
        raise DataError(
            f"{source}: {len(unused)} tensors have no place in this model, such as "
            f"{min(unused)!r}."
        )
    params = unflatten(flat)
    check(config, params, source)
    return params


def write(
    entries: Iterable[Entry], params: Params, config: model.ModelConfig
) -> dict[str, np.ndarray]:
    """Make their tensors from our parameters."""
    flat = flatten(params)
    tensors: dict[str, np.ndarray] = {}
    for entry in entries:
        arrays = entry.write(config, np.asarray(flat.pop(entry.ours)))
        tensors |= zip(entry.theirs, map(np.ascontiguousarray, arrays), strict=True)
    if flat:
        raise DataError(f"the format has no place for {min(flat)!r}.")
    return tensors


def named_arrays(tensors: Any, source: Any) -> dict[str, np.ndarray]:
    """Return what a file of weights holds; raises `DataError` if not arrays by name."""
    if not isinstance(tensors, Mapping):
        raise DataError(f"{source}: holds no tensors by name.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise DataError(f"{source}: its entry {name!r:.60} is no tensor.")
    return dict(tensors)


def flatten(params: Params, prefix: str = "") -> dict[str, np.ndarray]:
    """{'a': {'b': x}} -> {'a.b': x}."""
    flat: dict[str, np.ndarray] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = np.asarray(value)
    return flat


def unflatten(flat: Mapping[str, np.ndarray]) -> Params:
    """{'a.b': x} -> {'a': {'b': x}}; raises `DataError` if 'a' is there as well."""
    params: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, last = path.split(".")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise DataError(f"{path!r}: {key!r} is a parameter itself.")
        if last in node:
            raise DataError(f"{path!r}: holds parameters and is one.")
        node[last] = array
    return params


def check_holds(
    config: model.ModelConfig, wanted: Mapping[str, Any], holder: str
) -> None:
    """Raise `ConfigError` for a field of the model that another format has no place for."""
    fields = config_lib.flatten(dataclasses.asdict(config))
    for name, value in wanted.items():
        if fields[name] != value:
            raise ConfigError(
                f"model.{name}={fields[name]!r}: {holder} only {value!r}; export to "
                "safetensors instead."
            )


def check(config: model.ModelConfig, params: Params, source: Any) -> None:
    """Raise `DataError` unless `params` has this model's paths and shapes."""
    abstract = jax.eval_shape(lambda: model.init(config))
    wanted = {
        ".".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(abstract)
    }
    shapes = {path: array.shape for path, array in flatten(params).items()}
    for path in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(path) != shapes.get(path):
            raise DataError(
                f"{source}: {path} is {shapes.get(path, 'missing')}, the model's is "
                f"{wanted.get(path, 'absent')}."
            )
