"""Sequence mixers, one file per family; `MIXERS` names them."""

import dataclasses

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.model.mixers import kernel
from memoryformer.model.mixers.base import SeqInfo, SequenceMixer, State, by_chunks
from memoryformer.model.mixers.kernel import CosFormer, Linear, Performer, TrainedKernel
from memoryformer.model.mixers.linformer import Linformer
from memoryformer.model.mixers.luna import ConvLuna, Luna
from memoryformer.model.mixers.softmax import Softmax
from memoryformer.notation import Array
from memoryformer.ops import attention

MIXERS = {
    "softmax": Softmax,
    "linear": Linear,
    "trained_kernel": TrainedKernel,
    "performer": Performer,
    "cosformer": CosFormer,
    "linformer": Linformer,  # the causal prefix form
    "luna": Luna,
    "conv_luna": ConvLuna,
}
CHOICES = {  # the first is the default
    "attention": attention.IMPLEMENTATIONS,
    "logit_transform": ("none", "dape_v2"),
    "conv_luna_filter": ("conv", "pool"),
}
BIDIRECTIONAL = ("softmax", "linformer", "luna", "conv_luna")  # take causal=False


def validate(config) -> None:
    """Check the fields of mixers, and what the chosen one asks; raises `ConfigError`."""
    for name, choices in CHOICES.items():
        config_lib.choose(getattr(config, name), choices, f"model.{name}")
    for name in ("attention", "logit_transform"):
        value, plain = getattr(config, name), CHOICES[name][0]
        if config.mixer != "softmax" and value != plain:
            raise ConfigError(
                f"model.{name}={value!r}: mixer={config.mixer!r} has no use for it; use "
                f"mixer='softmax', or leave {name}={plain!r}."
            )
    if not config.causal and config.mixer not in BIDIRECTIONAL:
        raise ConfigError(
            f"model.causal=False: mixer={config.mixer!r} has only a causal form; "
            f"choose one of {', '.join(BIDIRECTIONAL)}."
        )
    check = getattr(MIXERS[config.mixer], "validate", None)
    if check is not None:
        check(config)


def validate_sequence(config, num_devices: int) -> None:
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
    check = getattr(MIXERS[config.mixer], "validate_sequence", None)
    if check is not None:
        check(config)
    elif not config.causal:
        raise ConfigError(
            f"mesh: mixer={config.mixer!r} with model.causal=False sums over whole rows "
            "and cannot run over a 'sequence' axis: use softmax, or no such axis."
        )


def takes_any_order(config) -> bool:
    """Whether the tokens of a row may lie in any order over a `sequence` axis.

    Ring attention reads positions; sums over the past need consecutive parts.
    """
    return config.mixer == "softmax"


def draw(config, seed: Array | int, step: Array | int) -> Array | None:
    """Draw the random features in use after `step` steps of a run with `seed`.

    They go into `SeqInfo.features`; None for a mixer without. Both may be traced.
    """
    return kernel.draw(config, seed, step) if config.mixer == "performer" else None


def with_draw(config, seed: int, step: int):
    """Return a model's config with the features in use after `step` steps as its own."""
    if config.mixer != "performer":
        return config
    seed, number = kernel.in_use(config, seed, step)
    return dataclasses.replace(config, performer_seed=seed, performer_draw=number)


def max_length(config) -> int:
    """Return the most tokens that the mixer has positions for; 0 if there is no limit."""
    if config.mixer not in ("cosformer", "linformer"):
        return 0
    return getattr(config, f"{config.mixer}_max_len") or config.seq_len


__all__ = [
    "MIXERS",
    "SeqInfo",
    "SequenceMixer",
    "State",
    "by_chunks",
    "draw",
    "max_length",
    "takes_any_order",
    "validate",
    "validate_sequence",
    "with_draw",
]
