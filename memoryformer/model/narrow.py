"""Parameters made ready to be read only: narrower weights, in huge pages.

    kind       of tables         of the head and of dense layers
    float32    4 bytes           4 bytes a weight
    bfloat16   2                 2
    int8       1, a scale a row  1, a scale for each output
    int4       -                 1/2, a scale for 64 weights
    w8a8       -                 1, and activations are rounded to int8 too
    w4a8       -                 1/2, the same

A head may also be int8-screened: the int8 head, of which greedy decoding reads about a third.
What is rounded, and by how much, is in `ops.lookup.narrow`, `.integer` and `.screened`. The result takes the place of the
parameters in `model.merge` and has no gradients. Start at `prepare`; `round_weights` and
`prune` give ordinary parameters of the same values, to measure what they cost.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.model import params as params_lib
from memoryformer.model import transformer as model
from memoryformer.notation import Array, Params
from memoryformer.ops.lookup import integer, screened
from memoryformer.ops.lookup import narrow as narrow_rows

DENSE_KINDS = (*narrow_rows.MATRIX_KINDS, *integer.KINDS)
SCREENED = "int8-screened"
HEAD_KINDS = (*DENSE_KINDS, SCREENED)
PACKED = (
    narrow_rows.PackedTables,
    narrow_rows.PackedMatrix,
    integer.IntegerMatrix,
    screened.ScreenedMatrix,
)


@dataclasses.dataclass(frozen=True)
class WeightKinds:
    """How weights are stored; each field is a flag of generation and evaluation."""

    tables: str = "float32"
    head: str = "float32"  # an untied head
    dense: str = "float32"  # every other dense layer

    def __post_init__(self):
        config_lib.choose(self.tables, narrow_rows.TABLE_KINDS, "--tables")
        config_lib.choose(self.head, HEAD_KINDS, "--head")
        config_lib.choose(self.dense, DENSE_KINDS, "--dense")


def prepare(
    model_config: model.ModelConfig, params: Params, kinds: WeightKinds
) -> Params:
    """Store tables, head and dense kernels as `kinds` says; the rest stays as it is.

    Leaves are converted one after the other; what is packed already is kept. Raises
    `ConfigError` for a head that is the embedding.
    """
    _check_head(model_config, kinds)

    def store(role, path, leaf):
        return jax.tree.map(narrow_rows.in_huge_pages, _pack(role, leaf, kinds))

    return map_weights(model_config, params, store)


def round_weights(
    model_config: model.ModelConfig, params: Params, kinds: WeightKinds
) -> Params:
    """Return float32 parameters with the values that `prepare` would store.

    A screened head has those of int8. Raises `ConfigError` for kinds that round activations.
    """
    _check_head(model_config, kinds)
    for name in ("head", "dense"):
        if (kind := getattr(kinds, name)) in integer.KINDS:
            raise ConfigError(
                f"--{name}={kind}: rounds activations too, which are not weights; evaluate "
                "with int8 or int4, and see docs/performance.md for what they cost."
            )
    if kinds.head == SCREENED:
        kinds = dataclasses.replace(kinds, head="int8")

    def rounded(role, path, leaf):
        weights = _pack(role, leaf, kinds)
        if role == "tables":
            return narrow_rows.widen_tables(weights)
        return narrow_rows.widen_matrix(weights).reshape(leaf.shape)

    return map_weights(model_config, params, rounded)


def prune(
    model_config: model.ModelConfig, params: Params, density: float
) -> tuple[Params, dict[str, float]]:
    """Keep the largest magnitudes of each dense kernel but the head: a share `density`.

    Returns the parameters and {'multiply_adds', 'effective_multiply_adds'} of a token in
    those kernels. Effective counts the weights that are not zero: fewer operations only for
    a machine that skips zeros, which no matrix product here does.
    """
    if not 0 < density <= 1:
        raise ConfigError(f"--density={density}: must be in (0, 1].")
    counts: dict[str, float] = {"multiply_adds": 0, "effective_multiply_adds": 0}

    def sparse(role, path, leaf):
        if role != "dense":
            return leaf
        weights = np.array(leaf)
        magnitudes = np.abs(weights).reshape(-1)
        kept = round(density * magnitudes.size)
        dropped = np.argpartition(magnitudes, -kept)[:-kept] if kept else slice(None)
        weights.reshape(-1)[dropped] = 0
        counts["multiply_adds"] += weights.size
        counts["effective_multiply_adds"] += kept
        return weights

    return map_weights(model_config, params, sparse), counts


def altered(
    model_config: model.ModelConfig,
    params: Params,
    kinds: WeightKinds | None,
    density: float,
) -> tuple[Params, dict[str, Any]]:
    """Prune to `density` and round to `kinds`, and say so: (params, what was done)."""
    changed: dict[str, Any] = {}
    if density != 1:
        params, changed = prune(model_config, params, density)
    if kinds is not None:
        params = round_weights(model_config, params, kinds)
        changed = changed | {"weights": dataclasses.asdict(kinds)}
    return params, changed


def map_weights(
    model_config: model.ModelConfig,
    params: Params,
    function: Callable[[str, str, Array], Any],
) -> Params:
    """Replace every leaf that has a role (`params.param_roles`) by function(role, path, leaf).

    The one door for whatever changes the weights of a trained model. path: such as
    'blocks.0.mixer.qkv.tables'. What `prepare` has packed stays as it is.
    """

    def walk(node, role, path):
        if isinstance(node, PACKED):
            return node
        if isinstance(node, dict):
            return {key: walk(node[key], role[key], (*path, key)) for key in node}
        return function(role, ".".join(path), node) if role else node

    return walk(params, params_lib.param_roles(model_config), ())


def _check_head(model_config, kinds):
    if model_config.tie_embeddings and kinds.head != "float32":
        raise ConfigError(
            f"--head={kinds.head}: with model.tie_embeddings=True the head is the embedding, "
            "which stays as it is; leave --head=float32."
        )


def _pack(role, leaf, kinds):
    leaf = np.asarray(leaf)
    if role == "tables":
        return narrow_rows.pack_tables(leaf, kinds.tables)
    kind, matrix = getattr(kinds, role), leaf.reshape(leaf.shape[0], -1)
    if kind == SCREENED:
        return screened.pack(matrix)
    if kind in integer.KINDS:
        return integer.pack(matrix, kind)
    return narrow_rows.pack_matrix(matrix, kind)
