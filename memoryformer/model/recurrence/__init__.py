"""Segment recurrence: a memory of m slots carried over chunks of S tokens, around the trunk.

    M_1 = M_init;   y_c, M_{c+1} = chunk(x_c, M_c)      M_{c+1} = M_init where a document starts

    rmt         [_; y; M'] = trunk([M; x; M])                          Bulatov et al. 2022
    memformer   y = trunk(x), every block reading M; M' = write(M, y)  Wu et al. 2020
    pmi         the same, M a working memory and a long-term one        ours

Any causal mixer may be inside. Attention ends at its chunk, so the cost is linear in the length
and decoding keeps one chunk. Training scans over checkpointed chunks: only memories and outputs
are stored, and a chunk is run again for its gradient. Gradients cross `bptt_chunks` chunks,
counted from the row's start (0: all).

Results depend on where chunks begin. A document must begin where a chunk does, which
`data.align_documents` sees to; two documents in one chunk would share a memory. Start at
`Recurrence`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flax import nnx

from memoryformer.errors import ConfigError
from memoryformer.model import mixers
from memoryformer.model.recurrence.base import (
    OPTIONS,
    Cost,
    Read,
    Recurrence,
    RecurrentState,
    chunk_size,
)
from memoryformer.model.recurrence.memformer import Memformer
from memoryformer.model.recurrence.pmi import PMI
from memoryformer.model.recurrence.rmt import RMT

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig

KINDS: dict[str, type[Recurrence]] = {"rmt": RMT, "memformer": Memformer, "pmi": PMI}


def make(
    config: "ModelConfig", project: Callable, norm: Callable, *, rngs: nnx.Rngs
) -> Recurrence | None:
    """Make the recurrence of a model's config, or None."""
    if config.recurrence == "none":
        return None
    return KINDS[config.recurrence](config, project, norm, rngs=rngs)


def capacity(config: "ModelConfig") -> int:
    """Return the positions that the trunk sees of one chunk."""
    if config.recurrence == "none":
        return chunk_size(config)
    return KINDS[config.recurrence].capacity_of(config)


def cost(config: "ModelConfig", block: int, project: Callable[[int], Any]) -> Cost:
    """Count what the memory of a model's config adds to it; see `Recurrence.cost`."""
    if config.recurrence == "none":
        return Cost()
    return KINDS[config.recurrence].cost(config, block, project)


def settings() -> dict[str, dict[str, Any]]:
    """Return the examples that recurrences bring: {name: fields of a model's config}."""
    return {
        name: {"recurrence": kind, "recurrence_options": dict(options)}
        for kind, cls in KINDS.items()
        for name, options in cls.EXAMPLES.items()
    }


def check(config: "ModelConfig") -> None:
    """Check what the recurrence of a model's config asks of it; raises `ConfigError`."""
    if config.recurrence == "none":
        return
    if not config.causal:
        raise ConfigError(
            f"model.causal=False: model.recurrence={config.recurrence!r} goes from the past "
            "to the future; use causal=True."
        )
    size = chunk_size(config)
    if size < 1 or config.seq_len % size:
        raise ConfigError(
            f"{OPTIONS}.chunk_size={size} does not divide model.seq_len="
            f"{config.seq_len}: choose a divisor."
        )
    needed, limit = capacity(config), mixers.max_length(config)
    if limit and limit < needed:
        raise ConfigError(
            f"model.mixer_options.max_len={limit}: a chunk of {size} tokens with its "
            f"memory takes {needed} positions; raise it to {needed}."
        )


__all__ = [
    "KINDS",
    "Cost",
    "Read",
    "Recurrence",
    "RecurrentState",
    "capacity",
    "check",
    "chunk_size",
    "cost",
    "make",
    "settings",
]
