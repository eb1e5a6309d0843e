"""The language model: embedding, blocks, final norm, head.

    a = x + Mixer(norm1(x))          y = a + FFN(norm2(a))            (residual='sequential')

A memory block's projections are `layers.MemoryLayer`s: Q, K and V share one hash, there is no
output projection and no activation, and FFN = MemoryLayer(D -> K (tau+2)), LayerNorm,
MemoryLayer(K chunks of tau+2 bits -> D). Its dense twin is Pythia's block.

Start at `Transformer`; from outside, at `init` and `forward`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer import config as config_lib
from memoryformer import layers, mixers, recurrence
from memoryformer.errors import ConfigError
from memoryformer.notation import Activations, Array, Float, Params, Tokens
from memoryformer.ops import hashing, lookup

# What the repository of the released code turns off or on beside the paper is a field here;
# docs/paper_differences.md has the whole list.


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's architecture; every field can be set as `--config.model.FIELD=...`."""

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
    lookup: str = "auto"
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
    sequence_chunk: int = 0
    remat: str = "none"  # what layers keep for the gradient: see ops/depth.py
    scan_layers: bool = False  # compile one layer and loop, instead of every layer
    # Standard deviations at initialisation.
    embed_std: float = 0.02
    head_std: float = 0.02
    mixer_std: float = 0.02  # Q, K, V
    ffn_std: float = 0.02  # feed-forward layers
    output_std: float = 0.02  # W_O and the second dense feed-forward layer
    bias_std: float = 0.0  # biases of memory layers
    causal: bool = True  # False, for encoders: see mixers.BIDIRECTIONAL
    # Mixers, each field named after its mixer; see memoryformer/mixers.
    attention: str = "xla"  # of softmax: xla | cudnn (GPU) | splash (TPU)
    logit_transform: str = "none"  # of softmax: none | dape_v2
    dape_width: int = 32
    prefix_chunk: int = 64  # tokens per matrix product of the linear-time mixers
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
    # A memory carried over chunks of the sequence; see memoryformer/recurrence.
    recurrence: str = "none"  # none | rmt | memformer
    recurrence_chunk: int = 0  # tokens; 0: a quarter of seq_len
    recurrence_slots: int = 16
    recurrence_bptt: int = 0  # chunks that gradients cross; 0: all
    memformer_temperature: float = 0.5  # of writing
    dtype: str = "float32"  # of the computation; parameters are float32

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
        layers.validate_stack(self)
        recurrence.validate(self)

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


def make_norm(config: ModelConfig, features: int) -> nnx.Module:
    """Make the block's norm."""
    return NORMS[config.norm](features, eps=config.norm_eps)


def make_projection(
    config: ModelConfig,
    in_features: int,
    features: int | tuple[int, ...],
    *,
    output: bool = False,
    std: float = 0.0,
    code_bits: int = 0,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Make a projection as a memory layer or a dense one: the block's one factory.

    Args:
      config: the model's.
      in_features: D.
      features: F, or several axes such as (3, D), which share one hash.
      output: the projection writes to the residual stream.
      std: of the weights; 0 takes `mixer_std` (`output_std` if `output` and dense).
      code_bits: tau of a memory layer; 0 takes the config's.
      rngs: where the weights come from.
    """
    dtype = jnp.dtype(config.dtype)
    if config.projection == "dense":
        default = config.output_std if output else config.mixer_std
        return layers.Dense(
            in_features,
            features,
            kernel_std=std or default,
            split_inputs=output,
            dtype=dtype,
            rngs=rngs,
        )
    return layers.MemoryLayer(
        in_features,
        features,
        code_bits=code_bits or config.code_bits,
        score=config.score,
        temperature=config.temperature,
        implementation=config.lookup,
        use_bias=config.memory_bias,
        table_std=std or config.mixer_std,
        bias_std=config.bias_std,
        dtype=dtype,
        rngs=rngs,
    )


class MemoryFeedForward(nnx.Module):
    """y = ML_2(LayerNorm(act(ML_1(x)))), ML_1 widening every chunk by `extra_bits`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        bits = config.code_bits + config.extra_bits
        hidden = config.num_tables * bits
        make = functools.partial(make_projection, config, std=config.ffn_std, rngs=rngs)
        self.up = make(config.embed_dim, hidden)
        self.activation = config.ffn_activation
        self.norm = layers.LayerNorm(hidden)
        self.down = make(hidden, config.embed_dim, code_bits=bits)

    def __call__(self, x: Activations) -> Activations:
        """[B, L, D] -> [B, L, D]."""
        return self.down(self.norm(ACTIVATIONS[self.activation](self.up(x))))


class DenseFeedForward(nnx.Module):
    """y = W_2 act(W_1 x + b_1) + b_2."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden = config.ffn_multiple * config.embed_dim
        make = functools.partial(make_projection, config, rngs=rngs)
        self.up = make(config.embed_dim, hidden, std=config.ffn_std)
        self.activation = config.ffn_activation
        self.down = make(hidden, config.embed_dim, output=True)

    def __call__(self, x: Activations) -> Activations:
        """[B, L, D] -> [B, L, D]."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Block(nnx.Module):
    """One layer: a sequence mixer and a feed-forward layer, each behind a norm."""

    def __init__(self, config: ModelConfig, *, layer: int = 0, rngs: nnx.Rngs):
        project = functools.partial(make_projection, config, rngs=rngs)
        feed_forward = {"memory": MemoryFeedForward, "dense": DenseFeedForward}
        self.residual = config.residual
        self.sequence_chunk = config.sequence_chunk
        self.norm1 = make_norm(config, config.embed_dim)
        self.mixer = mixers.MIXERS[config.mixer](
            config, project, rngs=rngs, layer=layer
        )
        eq13 = config.residual == "eq13"  # one norm for both
        self.norm2 = None if eq13 else make_norm(config, config.embed_dim)
        self.ffn = feed_forward[config.projection](config, rngs=rngs)

    def __call__(
        self, x: Activations, seq: mixers.SeqInfo, state: mixers.State | None = None
    ) -> tuple[Activations, mixers.State | None]:
        """[B, L, D] -> [B, L, D] and the mixer's state."""
        normed = self.norm1(x)
        mixed, state = self.mixer(normed, seq, state)
        match self.residual:
            case "sequential":
                x = x + mixed
                return x + self._feed_forward(self.norm2(x)), state
            case "parallel":  # Pythia
                return x + mixed + self._feed_forward(self.norm2(x)), state
            case "eq13":  # X = Norm(X) overwrites the residual stream
                return normed + mixed + self._feed_forward(normed), state

    def _feed_forward(self, x):
        return mixers.by_chunks(self.ffn, (x,), self.sequence_chunk)


class Transformer(nnx.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        size = (config.vocab_size, config.embed_dim)
        dtype = jnp.dtype(config.dtype)
        self.embed = layers.Embed(*size, std=config.embed_std, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [Block(config, layer=i, rngs=rngs) for i in range(config.num_layers)]
        )
        self.remat, self.scan_layers = config.remat, config.scan_layers
        self.final_norm = make_norm(config, config.embed_dim)
        head = functools.partial(layers.Head, std=config.head_std, dtype=dtype)
        self.head = None if config.tie_embeddings else head(*size[::-1], rngs=rngs)
        project = functools.partial(make_projection, config, rngs=rngs)
        norm = functools.partial(make_norm, config)
        self.recurrence = recurrence.make(config, project, norm, rngs=rngs)

    def __call__(
        self, tokens: Tokens, seq: mixers.SeqInfo, state: mixers.State | None = None
    ) -> tuple[Float[Array, "B L V"], mixers.State | None]:
        """[B, L] -> float32 logits [B, L, V] and the state after these tokens."""
        x, state = self.features(tokens, seq, state)
        return self.logits(x), state

    def features(
        self, tokens: Tokens, seq: mixers.SeqInfo, state: mixers.State | None = None
    ) -> tuple[Activations, mixers.State | None]:
        """[B, L] -> normed [B, L, D], what the head reads."""
        x = self.embed(tokens)
        if self.recurrence is not None:
            return self.recurrence(self, x, seq, state)
        return self.run_blocks(x, seq, state)

    def run_blocks(
        self,
        x: Activations,
        seq: mixers.SeqInfo,
        state: mixers.State | None = None,
        read: recurrence.Read | None = None,
    ) -> tuple[Activations, mixers.State | None]:
        """[B, L, D] through all blocks and the final norm, `read` before each block."""
        if state is None and (self.scan_layers or self.remat != "none"):
            x = layers.run_blocks(self.blocks, x, seq, self.remat, self.scan_layers)
            return self.final_norm(x), None
        new_state = []
        for i, block in enumerate(self.blocks):
            x = x if read is None else read(i, x)
            x, block_state = block(x, seq, None if state is None else state[i])
            new_state.append(block_state)
        return self.final_norm(x), None if state is None else tuple(new_state)

    def logits(self, x: Activations) -> Float[Array, "*B V"]:
        """Read the head (or the transposed embedding): [.., D] -> float32 [.., V]."""
        if self.head is not None:
            return self.head(x)
        return self.embed.attend(x)

    def init_state(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> mixers.State:
        """Return the state before any token; a recurrence has one of any length."""
        if self.recurrence is not None:
            return self.recurrence.init_state(self, batch_size, dtype)
        return self.init_blocks(batch_size, max_len, dtype)

    def init_blocks(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> mixers.State:
        """Return the state of every block, before any token."""
        return tuple(
            b.mixer.init_state(batch_size, max_len, dtype) for b in self.blocks
        )


NORMS = {"rmsnorm": layers.RMSNorm, "layernorm": layers.LayerNorm}
RESIDUALS = ("sequential", "parallel", "eq13")
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


# --------------------------------------------------------------------------------------
# Functions over a plain parameter tree.


@functools.partial(jax.jit, static_argnums=0)
def init(model_config: ModelConfig, seed: int | Array = 0) -> Params:
    """Draw the parameters: a nested dict of float32 arrays with string keys."""
    model = Transformer(model_config, rngs=nnx.Rngs(jax.random.key(seed)))
    return _rekey(nnx.to_pure_dict(nnx.state(model, nnx.Param)), str)


def merge(model_config: ModelConfig, params: Params) -> Transformer:
    """Put parameters into a `Transformer`."""
    return nnx.merge(_abstract(model_config)[0], _rekey(params, _index))


def with_tables_in(dtype: str, params: Params) -> Params:
    """Narrow tables to `dtype`, in which the layers read them; wider ones stay."""

    def narrow(path, p):
        is_table = path[-1].key == "tables"
        fewer = jnp.dtype(dtype).itemsize < p.dtype.itemsize
        return p.astype(dtype) if is_table and fewer else p

    return jax.tree.map_with_path(narrow, params)


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


def partition_specs(model_config: ModelConfig, sharding: Any) -> Any:
    """Return the PartitionSpec of every parameter under `sharding.Sharding`.

    Raises `ConfigError` for a mixer or a length that its `sequence` axis cannot split.
    """
    mixers.validate_sequence(model_config, sharding.axis_size("sequence"))
    shapes = jax.eval_shape(lambda: init(model_config))
    return sharding.param_specs(param_specs(model_config), shapes)


@functools.lru_cache(maxsize=32)
def _abstract(model_config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    model = nnx.eval_shape(lambda: Transformer(model_config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    specs = jax.tree.map(
        lambda variable: variable.get_metadata()["spec"],
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return graphdef, _rekey(nnx.to_pure_dict(specs), str)


def _rekey(tree: Any, key: Callable[[Any], Any]) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key(name): _rekey(value, key) for name, value in tree.items()}


def _index(name: str) -> str | int:
    """Undo `str`: nnx merges in the order of keys, and "10" sorts before "2"."""
    return int(name) if name.isdecimal() else name
