"""Functions over a plain parameter tree: a nested dict of arrays with string keys.

Modules are trees, never graphs with shared nodes: `graph=False` wherever flax asks, and not
for the process, which may hold other models. Start at `init` and `forward`.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from memoryformer.model import (
    mixers,
    narrow_layers,
    ngrams,
    transformer,
)
from memoryformer.model.config import ModelConfig
from memoryformer.notation import Array, Float, Params, Tokens
from memoryformer.ops import collectives


def fingerprint(params: Params) -> str:
    """Return the SHA-256 of all parameters, by path."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnums=0)
def init(model_config: ModelConfig, seed: int | Array = 0) -> Params:
    """Draw the parameters: a nested dict of float32 arrays with string keys."""
    model = transformer.Transformer(model_config, rngs=nnx.Rngs(jax.random.key(seed)))
    params = nnx.state(model, nnx.Param, graph=False)
    return _rekey(nnx.to_pure_dict(params), str)


def merge(model_config: ModelConfig, params: Params) -> transformer.Transformer:
    """Put parameters into a `Transformer`; those of `narrow.prepare`, into narrow layers."""
    model = nnx.merge(_abstract(model_config)[0], _rekey(params, _index))
    narrow_layers.swap_in(model)
    return model


def split_trained(model_config: ModelConfig, tree: Any) -> tuple[Any, Any]:
    """Part a tree like the parameters into what is trained and what is not."""
    return split_groups(param_groups(model_config), tree)


def split_groups(groups: Any, tree: Any) -> tuple[Any, Any]:
    """The same by the group of each parameter, as `param_groups` names it."""
    flat = traverse_util.flatten_dict(groups)
    trained: dict[tuple[str, ...], Any] = {}
    fixed: dict[tuple[str, ...], Any] = {}
    for path, leaf in traverse_util.flatten_dict(tree).items():
        (fixed if flat[path] == "fixed" else trained)[path] = leaf
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(fixed)


def joined(first: Any, second: Any) -> Any:
    """Undo `split_trained`."""
    flat = traverse_util.flatten_dict(first) | traverse_util.flatten_dict(second)
    return traverse_util.unflatten_dict(flat)


def with_tables_as_read(model_config: ModelConfig, params: Params) -> Params:
    """Narrow tables to the type in which the layers read them; wider types stay."""
    dtype = jnp.dtype(model_config.dtype)

    def narrow(p, group):
        narrower = group == "tables" and dtype.itemsize < p.dtype.itemsize
        return p.astype(dtype) if narrower else p

    return jax.tree.map(narrow, params, param_groups(model_config))


def forward(
    model_config: ModelConfig,
    params: Params,
    tokens: Tokens,
    segment_ids: Array | None = None,
    positions: Array | None = None,
) -> Float[Array, "B L V"]:
    """Compute the logits of next tokens: int32 [B, L] -> float32 [B, L, V].

    Without `segment_ids` every row is one document. `positions` count inside a document.
    """
    seq = mixers.SeqInfo.of_tokens(tokens)
    if segment_ids is not None:
        seq = seq._replace(segment_ids=segment_ids)
    if positions is not None:
        seq = seq._replace(positions=positions)
    return merge(model_config, params)(tokens, seq)[0]


def param_specs(model_config: ModelConfig) -> dict[str, Any]:
    """Name the `ShardingSpecs` field of each parameter: a tree of strings."""
    return _abstract(model_config)[1]


def param_groups(model_config: ModelConfig) -> dict[str, Any]:
    """Name the group of each parameter: one of `optimizer.GROUPS`, or 'fixed' (not trained)."""
    return _abstract(model_config)[2]


def param_roles(model_config: ModelConfig) -> dict[str, Any]:
    """Name the role of each parameter: 'tables', 'dense', 'head' (untied), or '' for the rest."""
    return _abstract(model_config)[3]


def partition_specs(model_config: ModelConfig, sharding: Any) -> Any:
    """Return the PartitionSpec of every parameter under `sharding.Sharding`.

    Raises `ConfigError` for a mixer or a length that its `sequence` axis cannot split.
    """
    num_devices = sharding.axis_size(collectives.SEQUENCE_AXIS)
    mixers.check_sequence(model_config, num_devices)
    ngrams.check_sequence(model_config, num_devices)
    shapes = jax.eval_shape(lambda: init(model_config))
    return sharding.param_specs(param_specs(model_config), shapes)


@functools.lru_cache(maxsize=32)
def _abstract(
    model_config: ModelConfig,
) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The model without its numbers, and of each parameter the spec, the group and the role."""
    model = nnx.eval_shape(
        lambda: transformer.Transformer(model_config, rngs=nnx.Rngs(0)),
        graph=False,
        graph_updates=False,
    )
    graphdef, state = nnx.split(model, graph=False)

    def of_each(describe):
        described = jax.tree.map(
            lambda variable: describe(**variable.get_metadata()),
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        return _rekey(nnx.to_pure_dict(described), str)

    return (
        graphdef,
        of_each(lambda spec, **_: spec),
        of_each(_group),
        of_each(lambda role="", **_: role),
    )


def _group(spec, decay=None, trained=True, **unused_metadata):
    if not trained:
        return "fixed"
    if spec == "tables":
        return "tables"
    return {True: "decayed", False: "undecayed"}[decay]  # which has to be said


def _rekey(tree: Any, key: Callable[[Any], Any]) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key(name): _rekey(value, key) for name, value in tree.items()}


def _index(name: str) -> str | int:
    """Undo `str`: nnx merges in the order of keys, and "10" sorts before "2"."""
    return int(name) if name.isdecimal() else name
