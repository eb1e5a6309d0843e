"""Blocks one after another: looped over or scanned, kept or computed again."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.notation import Activations
from memoryformer.ops import remat as remat_lib


def validate_stack(config: Any) -> None:
    """Check how a model's config wants its blocks run; raises `ConfigError`."""
    config_lib.choose(config.remat, remat_lib.REMAT, "model.remat")
    if config.recurrence != "none" and (config.remat != "none" or config.scan_layers):
        raise ConfigError(
            f"model.recurrence={config.recurrence!r}: runs blocks in its own loop; use "
            "remat='none', scan_layers=False."
        )


def run_blocks(
    blocks: Sequence[nnx.Module], x: Activations, seq: Any, remat: str, scan: bool
) -> Activations:
    """Send whole rows [B, L, D] through blocks, kept and looped over as `ops.remat` says."""
    split = (nnx.split(block, graph=False) for block in blocks)
    graphs, params = zip(*split, strict=True)

    def as_function(graph):
        return lambda own, x: nnx.merge(graph, own)(x, seq)[0]

    functions = [as_function(graph) for graph in graphs]
    return remat_lib.apply(functions, params, x, remat=remat, scan=scan)
