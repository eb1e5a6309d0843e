"""Sequence mixers, one file per family; `MIXERS` names them."""

import dataclasses
from typing import TYPE_CHECKING, Any

from memoryformer.errors import ConfigError
from memoryformer.model import token_rows
from memoryformer.model.mixers.base import (
    Cost,
    SeqInfo,
    SequenceMixer,
    State,
    by_chunks,
)
from memoryformer.model.mixers.conv_luna import ConvLuna
from memoryformer.model.mixers.cosformer import CosFormer
from memoryformer.model.mixers.kernel import Linear, Performer
from memoryformer.model.mixers.linformer import Linformer
from memoryformer.model.mixers.luna import Luna
from memoryformer.model.mixers.mamba2 import Mamba2
from memoryformer.model.mixers.recurformer import Recurformer
from memoryformer.model.mixers.softmax import Softmax
from memoryformer.model.mixers.trained_kernel import TrainedKernel
from memoryformer.notation import Array, Params

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig

MIXERS = {
    "softmax": Softmax,
    "linear": Linear,
    "trained_kernel": TrainedKernel,
    "performer": Performer,
    "cosformer": CosFormer,
    "linformer": Linformer,  # the causal prefix form
    "luna": Luna,
    "conv_luna": ConvLuna,
    "mamba2": Mamba2,
    "recurformer": Recurformer,
}


def check(config: "ModelConfig") -> None:
    """Check what the mixer of a model's config asks of it; raises `ConfigError`."""
    if not config.causal and not MIXERS[config.mixer].LOOKS_AHEAD:
        able = [name for name, mixer in MIXERS.items() if mixer.LOOKS_AHEAD]
        raise ConfigError(
            f"model.causal=False: mixer={config.mixer!r} has only a causal form; "
            f"choose one of {', '.join(able)}."
        )
    if not MIXERS[config.mixer].HAS_TOKEN_ROWS:
        token_rows.refuse(config, f"model.mixer={config.mixer!r}")
    if config.recurrence != "none":
        token_rows.refuse(config, f"model.recurrence={config.recurrence!r}")
    MIXERS[config.mixer].check(config)


def check_sequence(config: "ModelConfig", num_devices: int) -> None:
    """Check that rows can be split over devices of a `sequence` axis; `ConfigError`."""
    if num_devices == 1:
        return
    if config.seq_len % num_devices:
        below = config.seq_len // num_devices * num_devices
        raise ConfigError(
            f"model.seq_len={config.seq_len} does not divide over {num_devices} devices "
            f"along 'sequence': try {below or num_devices} or {below + num_devices}."
        )
    if config.recurrence != "none":
        raise ConfigError(
            f"mesh: model.recurrence={config.recurrence!r} carries a memory from chunk to "
            "chunk of whole rows and cannot run over a 'sequence' axis."
        )
    MIXERS[config.mixer].check_sequence(config)


def takes_any_order(config: "ModelConfig") -> bool:
    """Whether the tokens of a row may lie in any order over a `sequence` axis."""
    return MIXERS[config.mixer].TAKES_ANY_ORDER


def max_length(config: "ModelConfig") -> int:
    """Return the most tokens that the mixer has positions for; 0 if there is no limit."""
    return MIXERS[config.mixer].max_length(config)


def of_layer(config: "ModelConfig", layer: int) -> "ModelConfig":
    """Return the config of a model whose layers all have the mixer that this one has."""
    return MIXERS[config.mixer].of_layer(config, layer)


def projections(config: "ModelConfig") -> dict[str, tuple[int, int]]:
    """Return {name: (inputs, outputs)} of the projections of the mixer of one block."""
    return MIXERS[config.mixer].projections(config)


def cost(config: "ModelConfig", length: int) -> Cost:
    """Count what mixing `length` tokens costs in one block, without its projections."""
    return MIXERS[config.mixer].cost(config, length)


def token_row_values(config: "ModelConfig") -> int:
    """Return how many values a token reads of `token_rows`, in all blocks."""
    if not config.projection_options.token_rows:
        return 0
    count = MIXERS[config.mixer].num_projections(config)
    return config.num_layers * count * config.embed_dim


def settings() -> dict[str, dict[str, Any]]:
    """Return the examples that mixers bring: {name: fields of a model's config}."""
    return {
        name: {"mixer": mixer, "mixer_options": dict(options)}
        for mixer, cls in MIXERS.items()
        for name, options in cls.EXAMPLES.items()
    }


def table() -> str:
    """Return the table of mixers in Markdown."""
    heads = (
        "`mixer`",
        "what a token reads",
        "multiply-adds per token",
        "decode state, values per head",
        "positions",
    )
    rows: list[tuple[str, ...]] = [heads, ("---",) * len(heads)]
    rows += [
        (f"`{name}`", *dataclasses.astuple(mixer.ABOUT))
        for name, mixer in MIXERS.items()
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def redraw(
    config: "ModelConfig", fixed: Params, seed: Array | int, step: Array
) -> Params:
    """Return the parameters that are not trained, as batch `step` of a run needs them."""
    return MIXERS[config.mixer].redraw(config, fixed, seed, step)


__all__ = [
    "MIXERS",
    "Cost",
    "SeqInfo",
    "SequenceMixer",
    "State",
    "by_chunks",
    "check",
    "check_sequence",
    "cost",
    "max_length",
    "of_layer",
    "projections",
    "redraw",
    "settings",
    "table",
    "takes_any_order",
]
