"""Whether what a model's config names to compute it with can run on a platform.

    field                          value    runs on
    model.lookup                   native   a CPU with a C++ compiler; float32, bfloat16
                                   gpu      an NVIDIA GPU of capability 9.0 or more; likewise
    model.mixer_options.attention  cudnn    a GPU; bfloat16, heads of a multiple of 8 up to 128
                                   splash   a TPU; rows of a multiple of 128 tokens

Everything else runs everywhere. A run that is trained is refused what it asks for and cannot
have; a model that is only read takes what there is, for the machine need not be the one
that it was trained on. Start at `check`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from memoryformer.errors import ConfigError
from memoryformer.model import parts, recurrence
from memoryformer.model.transformer import ModelConfig
from memoryformer.ops import attention, lookup

ANYWHERE = "auto"  # of both fields
GPUS = {"cuda": "gpu", "rocm": "gpu"}  # names of a device's platform -> jax's of all


def check(config: ModelConfig, platform: str, capability: float | None = None) -> None:
    """Raise `ConfigError` for an implementation that cannot run on jax's `platform`.

    `capability` is that of the GPU to compile for; None asks the one that is here, if any.
    """
    for field, (value, reason) in _refusals(config, platform, capability).items():
        raise ConfigError(
            f"model.{field}={value!r} cannot run: {reason}; use "
            f"model.{field}={ANYWHERE!r} to take what can."
        )


def readable(config: ModelConfig, platform: str | None = None) -> ModelConfig:
    """Return the config to read a model with here: 'auto' for what cannot run.

    Fused attention becomes 'auto' too, since texts have lengths that training had not.
    """
    refused = _refusals(config, platform or jax.default_backend(), None)
    if "lookup" in refused:
        config = dataclasses.replace(config, lookup=ANYWHERE)
    return config if attention_of(config) == "xla" else with_attention(config, ANYWHERE)


def attention_of(config: ModelConfig) -> str:
    """Return what computes softmax attention; 'xla' for a mixer that has no choice."""
    return getattr(config.mixer_options, "attention", "xla")


def with_attention(config: ModelConfig, implementation: str) -> ModelConfig:
    """Return the config with softmax attention computed so; other mixers stay."""
    if not hasattr(config.mixer_options, "attention"):
        return config
    options = dataclasses.replace(config.mixer_options, attention=implementation)
    return dataclasses.replace(config, mixer_options=options)


def _refusals(config, platform, capability) -> dict[str, tuple[str, str]]:
    """{field: (value, reason)}; nothing is known of the platform 'abstract'."""
    if platform == "abstract":
        return {}
    dtype = jnp.dtype(config.dtype)
    reasons = {}
    platform = GPUS.get(platform, platform)
    if parts.has_tables(config):
        reason = lookup.why_not(config.lookup, dtype, platform, capability)
        reasons["lookup"] = config.lookup, reason
    if hasattr(config.mixer_options, "attention"):
        length = config.seq_len
        if config.recurrence != "none":
            length = recurrence.capacity(config)
        shape = (1, length, config.num_heads, config.head_dim)
        q = jax.ShapeDtypeStruct(shape, dtype)
        chosen = attention_of(config)
        reason = attention.why_not(chosen, q, platform)
        reasons["mixer_options.attention"] = chosen, reason
    return {field: refusal for field, refusal in reasons.items() if refusal[1]}
