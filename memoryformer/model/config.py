"""A model's architecture as one frozen config, checked as a whole. Start at `ModelConfig`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.model import layers, mixers, parts, stack
from memoryformer.model import recurrence as recurrence_lib
from memoryformer.notation import Array
from memoryformer.ops import hashing, lookup
from memoryformer.runs import old_configs

NORMS = {"rmsnorm": layers.RMSNorm, "layernorm": layers.LayerNorm}
RESIDUALS = ("sequential", "parallel", "eq13")
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class TokenOptions:
    """Rows that tokens alone address, beside any projection: `model.ngrams`, `.token_rows`."""

    ngram_rows: int = field(
        "numbers",
        0,
        doc="Rows of hashed n-grams added to the embedding, for each n; 0: none.",
    )
    ngram_order: int = field("numbers", 3, doc="The largest n; the smallest is 2.")
    token_rows: bool = field(
        "numbers",
        False,
        doc="A row of each block and token beside Q, K and V.",
    )

    def __post_init__(self):
        config_lib.at_least(self, "model.projection_options", 0, "ngram_rows")
        config_lib.at_least(self, "model.projection_options", 2, "ngram_order")


@dataclasses.dataclass(frozen=True)
class MemoryOptions(TokenOptions):
    """Memory layers."""

    extra_bits: int = field(
        "numbers", 2, doc="The second feed-forward layer hashes tau and so many bits."
    )
    temperature: float = field("numbers", 1.0, doc="t of the score.")
    memory_bias: bool = field(
        "numbers",
        False,
        doc="A bias for each memory layer; paper: none, released code: one.",
    )
    bias_std: float = field("numbers", 0.0, doc="Of these biases at first.")
    rows_read: int = field(
        "numbers",
        1,
        doc="Rows read of each table; 2: also that across the least certain bit.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rows_read not in (1, 2):
            raise ConfigError(
                f"model.projection_options.rows_read={self.rows_read}: must be 1 or 2."
            )
        if self.temperature <= 0:
            raise ConfigError(
                f"model.projection_options.temperature={self.temperature}: must be > 0."
            )


@dataclasses.dataclass(frozen=True)
class DenseOptions(TokenOptions):
    """Dense layers, as Pythia's."""

    ffn_multiple: int = field(
        "numbers", 4, doc="Hidden width of the feed-forward layer over D."
    )
    output_std: float = field(
        "numbers",
        0.02,
        doc="Of W_O and of the second feed-forward layer at first.",
    )


@dataclasses.dataclass(frozen=True)
class MixedOptions(MemoryOptions, DenseOptions):
    """Dense blocks, parts of which are memory layers: see `model.parts`."""

    parts: str = field(
        "numbers",
        "",
        doc="The memory layers, by part and layer: 'qkv@0,2-4=memory,bits=4; ..'.",
    )


PROJECTIONS = {"memory": MemoryOptions, "dense": DenseOptions, "mixed": MixedOptions}

# What the repository of the released code turns off or on beside the paper is a field here;
# docs/paper_differences.md has the whole list.


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's architecture; every field can be set as `--config.model.FIELD=...`.

    `X_options` are given as a mapping, `{"num_slots": 5}`, and are the frozen dataclass of what
    `X` names: the mixer, the recurrence, the projection.
    """

    vocab_size: int = field("numbers", doc="V, tokens.")
    embed_dim: int = field("numbers", doc="D, the width.")
    num_layers: int = field("numbers", doc="Blocks.")
    num_heads: int = field("numbers", doc="H; must divide D.")
    seq_len: int = field(
        "numbers",
        doc="L, the longest sequence trained on, and the default length of a cache.",
    )
    mixer: str = field(
        "numbers", "softmax", doc="The sequence mixer: a name of model.mixers.MIXERS."
    )
    projection: str = field(
        "numbers",
        "memory",
        doc="memory | dense | mixed: what projects inside of a block.",
    )
    # Memory layers.
    code_bits: int = field("numbers", 8, doc="tau, bits of a code; must divide D.")
    score: str = field(
        "numbers",
        "softmax",
        doc="s(z), a name of ops.hashing.SCORES; released code: l1_softmax.",
    )
    lookup: str = field(
        "rounding",
        "auto",
        doc="auto, or which implementation of ops.lookup reads tables.",
    )
    # Block.
    norm: str = field("numbers", "rmsnorm", doc="rmsnorm | layernorm.")
    norm_eps: float = field("numbers", 1e-8, doc="Added to the variance.")
    residual: str = field(
        "numbers",
        "sequential",
        doc="sequential | parallel | eq13 (Eq. 13 to the letter).",
    )
    ffn_activation: str = field(
        "numbers", "none", doc="none | gelu | gelu_tanh; dense blocks need one."
    )
    output_projection: bool = field(
        "numbers", False, doc="Whether a mixer ends in W_O."
    )
    rotary_fraction: float = field(
        "numbers", 0.25, doc="Part of a head that rotary positions turn."
    )
    rotary_base: float = field(
        "numbers", 10_000.0, doc="Slowest wave length of rotary positions."
    )
    tie_embeddings: bool = field(
        "numbers", False, doc="Whether the head is the transposed embedding."
    )
    sequence_chunk: int = field(
        "rounding",
        0,
        doc="Positions worked on at a time, recomputed for the gradient; 0: whole rows.",
    )
    remat: str = field(
        "rounding",
        "none",
        doc="What blocks keep for the gradient: a name of ops.remat.REMAT.",
    )
    scan_layers: bool = field(
        "rounding", False, doc="Compile one block and loop, instead of every block."
    )
    # Standard deviations at initialisation.
    embed_std: float = field("numbers", 0.02, doc="Of the embedding at first.")
    head_std: float = field("numbers", 0.02, doc="Of the head at first.")
    mixer_std: float = field("numbers", 0.02, doc="Of Q, K and V at first.")
    ffn_std: float = field("numbers", 0.02, doc="Of feed-forward layers at first.")
    causal: bool = field(
        "numbers",
        True,
        key=False,
        doc="False: every token sees the whole document (encoders, of tasks).",
    )
    projection_options: Any = field(
        "numbers", None, doc="Options of the projection.", options=PROJECTIONS
    )
    mixer_options: Any = field(
        "numbers", None, doc="Options of the mixer.", options=mixers.MIXERS
    )
    recurrence: str = field(
        "numbers",
        "none",
        doc="A memory carried over chunks: none, or a name of model.recurrence.KINDS.",
    )
    recurrence_options: Any = field(
        "numbers", None, doc="Options of the recurrence.", options=recurrence_lib.KINDS
    )
    dtype: str = field(
        "numbers",
        "float32",
        doc="Of the computation: float32 | bfloat16 | float64; parameters stay float32.",
    )

    def __post_init__(self):
        config_lib.freeze(self, "model")
        config_lib.choose(self.score, hashing.SCORES, "model.score")
        config_lib.choose(self.lookup, lookup.IMPLEMENTATIONS, "model.lookup")
        config_lib.choose(self.norm, NORMS, "model.norm")
        config_lib.choose(self.residual, RESIDUALS, "model.residual")
        config_lib.choose(self.ffn_activation, ACTIVATIONS, "model.ffn_activation")
        config_lib.choose(self.dtype, ("float32", "bfloat16", "float64"), "model.dtype")
        sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "seq_len")
        config_lib.at_least(self, "model", 1, *sizes)
        config_lib.at_least(self, "model", 0, "sequence_chunk")
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} does not divide "
                f"model.embed_dim={self.embed_dim}: choose a divisor."
            )
        if self.projection == "memory":
            self._check_memory()
        self._check_rows_read()
        parts.check(self)
        mixers.check(self)
        stack.validate_stack(self)
        recurrence_lib.check(self)

    def _check_memory(self):
        bits, extra = self.code_bits, self.projection_options.extra_bits
        if bits < 1 or not 0 <= extra <= 16 - bits:
            raise ConfigError(
                f"model.code_bits={bits}, model.projection_options.extra_bits={extra}: "
                "need 1 <= code_bits and code_bits + extra_bits <= 16."
            )
        if self.embed_dim % bits:
            below = self.embed_dim // bits * bits
            raise ConfigError(
                f"model.embed_dim={self.embed_dim} is not a multiple of "
                f"model.code_bits={bits}: chunks of {bits} values cannot cover it; "
                f"try embed_dim={below or bits} or {below + bits}."
            )

    def _check_rows_read(self):
        rows = getattr(self.projection_options, "rows_read", 1)
        if rows > 1 and not hashing.has_probability(self.score):
            able = [name for name in hashing.SCORES if hashing.has_probability(name)]
            raise ConfigError(
                f"model.projection_options.rows_read={rows}: model.score={self.score!r} has "
                f"no probability to weigh a second row by; use {', '.join(able)}."
            )

    @classmethod
    def from_config(cls, section: Any) -> "ModelConfig":
        """Check a config section and freeze it; raises `ConfigError`."""
        old_configs.refuse(section, "model")
        return config_lib.build(cls, section, "model")

    @property
    def head_dim(self) -> int:
        """E."""
        return self.embed_dim // self.num_heads

    @property
    def num_tables(self) -> int:
        """K."""
        return self.embed_dim // self.code_bits
