"""A model's architecture as one frozen config, checked as a whole. Start at `ModelConfig`."""

import dataclasses
import functools
from typing import Any

import jax

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.model import layers, mixers, stack
from memoryformer.model import recurrence as recurrence_lib
from memoryformer.ops import hashing, lookup

NORMS = {"rmsnorm": layers.RMSNorm, "layernorm": layers.LayerNorm}
RESIDUALS = ("sequential", "parallel", "eq13")
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

# What the repository of the released code turns off or on beside the paper is a field here;
# docs/paper_differences.md has the whole list.


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's architecture; every field can be set as `--config.model.FIELD=...`.

    What `field` declares may change while a run goes on, and for an evaluation (`fields`).
    """

    vocab_size: int
    embed_dim: int  # D
    num_layers: int
    num_heads: int  # H
    seq_len: int  # longest sequence trained on, and the default cache length
    mixer: str = "softmax"
    projection: str = "memory"  # memory | dense
    # Memory layers.
    code_bits: int = 8  # tau
    extra_bits: int = 2  # the second feed-forward layer hashes tau + extra_bits bits
    score: str = "softmax"  # paper: softmax; released code: l1_softmax
    temperature: float = 1.0
    lookup: str = field("rounding", "auto")
    memory_bias: bool = False  # paper: none; released code: one per layer
    # Block.
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-8
    residual: str = "sequential"  # sequential | parallel | eq13 (Eq. 13 to the letter)
    ffn_activation: str = "none"  # none | gelu | gelu_tanh; dense blocks need one
    ffn_multiple: int = 4  # hidden width of a dense feed-forward layer over D
    output_projection: bool = False  # W_O
    rotary_fraction: float = 0.25
    rotary_base: float = 10_000.0
    tie_embeddings: bool = False
    # Positions worked on at a time, recomputed for the gradient: same result. 0: whole rows.
    sequence_chunk: int = field("rounding", 0)
    # What layers keep for the gradient: see ops/remat.py.
    remat: str = field("rounding", "none")
    # Compile one layer and loop, instead of every layer.
    scan_layers: bool = field("rounding", False)
    # Standard deviations at initialisation.
    embed_std: float = 0.02
    head_std: float = 0.02
    mixer_std: float = 0.02  # Q, K, V
    ffn_std: float = 0.02  # feed-forward layers
    output_std: float = 0.02  # W_O and the second dense feed-forward layer
    bias_std: float = 0.0  # biases of memory layers
    causal: bool = True  # False, for encoders: see mixers.BIDIRECTIONAL
    # Mixers, each field named after its mixer; see memoryformer/model/mixers.
    # Of softmax: xla | cudnn (GPU) | splash (TPU) | auto.
    attention: str = field("rounding", "xla")
    logit_transform: str = "none"  # of softmax: none | dape_v2
    dape_width: int = 32
    # Tokens per matrix product of the linear-time mixers.
    prefix_chunk: int = field("rounding", 64)
    cosformer_max_len: int = 0  # M; 0: seq_len
    trained_kernel_layers: int = 3
    performer_features: int = 256
    performer_redraw_every: int = 0  # training steps; 0: never
    performer_seed: int = 0  # + the run's own seed
    performer_draw: int = 0  # + the run's redraws
    linformer_slots: int = 64
    linformer_max_len: int = 0  # positions; 0: seq_len
    luna_slots: int = 64  # also of conv_luna
    conv_luna_filter: str = "conv"  # conv | pool
    conv_luna_width: int = 4  # tokens
    # A memory carried over chunks of the sequence; see memoryformer/model/recurrence.
    recurrence: str = "none"  # none | rmt | memformer
    recurrence_chunk: int = 0  # tokens; 0: a quarter of seq_len
    recurrence_slots: int = 16
    recurrence_bptt: int = 0  # chunks that gradients cross; 0: all
    memformer_temperature: float = 0.5  # of writing
    dtype: str = "float32"  # of the computation; parameters have their own

    def __post_init__(self):
        config_lib.choose(self.mixer, mixers.MIXERS, "model.mixer")
        config_lib.choose(self.projection, ("memory", "dense"), "model.projection")
        config_lib.choose(self.score, hashing.SCORES, "model.score")
        config_lib.choose(self.lookup, lookup.IMPLEMENTATIONS, "model.lookup")
        config_lib.choose(self.norm, NORMS, "model.norm")
        config_lib.choose(self.residual, RESIDUALS, "model.residual")
        config_lib.choose(self.ffn_activation, ACTIVATIONS, "model.ffn_activation")
        config_lib.choose(self.dtype, ("float32", "bfloat16", "float64"), "model.dtype")
        sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "seq_len")
        for name in (*sizes, "prefix_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)}: must be >= 1.")
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} does not divide "
                f"model.embed_dim={self.embed_dim}: choose a divisor."
            )
        if self.sequence_chunk < 0:
            raise ConfigError(
                f"model.sequence_chunk={self.sequence_chunk}: must be >= 0."
            )
        if self.projection == "memory":
            self._check_memory()
        mixers.validate(self)
        stack.validate_stack(self)
        recurrence_lib.validate(self)

    def _check_memory(self):
        bits = self.code_bits
        if not 1 <= bits <= 16 or not 0 <= self.extra_bits <= 16 - bits:
            raise ConfigError(
                f"model.code_bits={bits}, model.extra_bits={self.extra_bits}: need "
                "1 <= code_bits and code_bits + extra_bits <= 16."
            )
        if self.embed_dim % bits:
            below = self.embed_dim // bits * bits
            raise ConfigError(
                f"model.embed_dim={self.embed_dim} is not a multiple of "
                f"model.code_bits={bits}: chunks of {bits} values cannot cover it; "
                f"try embed_dim={below or bits} or {below + bits}."
            )
        if self.temperature <= 0:
            raise ConfigError(f"model.temperature={self.temperature}: must be > 0.")

    @classmethod
    def from_config(cls, section: Any) -> "ModelConfig":
        """Check a config section and freeze it; raises `ConfigError`."""
        return config_lib.build(cls, section, "model")

    @property
    def head_dim(self) -> int:
        """E."""
        return self.embed_dim // self.num_heads

    @property
    def num_tables(self) -> int:
        """K."""
        return self.embed_dim // self.code_bits
