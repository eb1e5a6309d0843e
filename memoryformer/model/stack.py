"""Blocks one after another: looped over or scanned, kept or computed again."""

import itertools
from collections.abc import Sequence
from typing import Any

from flax import nnx

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.model import codes
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
    """Send whole rows [B, L, D] through blocks, kept and looped over as `ops.remat` says.

    A scan is over blocks of the same parts: of a model whose layers differ (projection='mixed'),
    over each run of neighbours that are alike.
    """
    if not scan:
        return _run_alike(blocks, x, seq, remat, scan)
    for _, alike in itertools.groupby(blocks, lambda block: vars(block)["parts"]):
        x = _run_alike(list(alike), x, seq, remat, scan)
    return x


def _run_alike(blocks, x, seq, remat, scan):
    pure = [codes.pure(block, lambda block, x: block(x, seq)[0]) for block in blocks]
    functions, params = zip(*pure, strict=True)
    x, read = remat_lib.apply(functions, params, x, remat=remat, scan=scan)
    for block, codes_of_block in zip(blocks, read, strict=True):
        codes.give(block, codes_of_block)
    return x
