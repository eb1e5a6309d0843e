"""What a model costs, counted from its config: operations, parameters, bytes.

    memory layer    K tables of 2^tau rows, F wide:   K (tau + F) multiply-adds per token   (below Eq. 11)
    dense layer     D x F:                            D F multiply-adds per token           (Eq. 1)
    softmax mixer   scores and weighted values:       2 L^2 D multiply-adds per sequence    (section 2.4)
    other mixers    accounting/mixers.py                    linear in L
    a memory        accounting/recurrence.py               beside the blocks, which mix over chunks

Two conventions. The paper calls one multiply-add one FLOP: every `multiply_adds` here.
The plain convention counts the multiplication and the addition: every `flops` here is
twice that. Attention is counted over the whole L x L square, as in the paper, although
half of it is masked. Norms, activations, rotary and softmax are not counted.

For a memory block the paper rounds its projections to 6 K L D, that is (6/tau) L D^2.
The sum of its own terms is 3 (Q, K, V) + (tau+2)/tau (FFN up) + 1 (FFN down), 5.25 K L D
at tau = 8. Both are here: `projections_paper` and `projections_exact`.

    python -m memoryformer.accounting --config=configs/quickstart.py [--json]

Start at `count`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from memoryformer import config as config_lib
from memoryformer import errors
from memoryformer.accounting import mixers as mixer_costs
from memoryformer.accounting import recurrence as recurrence_costs
from memoryformer.ops import hashing

PAPER_PROJECTIONS = 6  # the paper's rounded 5.25, in units of K L D


@dataclasses.dataclass(frozen=True)
class Shape:
    """The fields of a model config that decide what it costs.

    A section may leave out what has a default here; the defaults are the model's own.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    seq_len: int
    mixer: str = "softmax"
    projection: str = "memory"
    code_bits: int = 8
    extra_bits: int = 2
    score: str = "softmax"
    norm: str = "rmsnorm"
    residual: str = "sequential"
    ffn_multiple: int = 4
    output_projection: bool = False
    memory_bias: bool = False
    tie_embeddings: bool = False
    logit_transform: str = "none"
    dape_width: int = 32
    trained_kernel_layers: int = 3
    performer_features: int = 256
    linformer_slots: int = 64
    linformer_max_len: int = 0
    luna_slots: int = 64
    conv_luna_filter: str = "conv"
    conv_luna_width: int = 4
    recurrence: str = "none"
    recurrence_chunk: int = 0
    recurrence_slots: int = 16

    @classmethod
    def of(cls, section: Any) -> "Shape":
        """Read the fields from a config section or from any object that has them.

        Fields of `section` that cost nothing are ignored. Raises `ConfigError` for a
        missing field, an unknown choice, or a width that tau does not divide.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if isinstance(section, Mapping) or hasattr(section, "items"):
            values = {name: section[name] for name in names if name in section}
        else:
            values = {
                name: getattr(section, name) for name in names if hasattr(section, name)
            }
        shape = config_lib.build(cls, values, "model")
        config_lib.choose(shape.mixer, mixer_costs.MIXERS, "model.mixer")
        config_lib.choose(shape.projection, ("memory", "dense"), "model.projection")
        config_lib.choose(shape.score, hashing.SCORES, "model.score")
        config_lib.choose(shape.norm, ("rmsnorm", "layernorm"), "model.norm")
        if shape.projection == "memory" and shape.embed_dim % shape.code_bits:
            raise errors.ConfigError(
                f"model.embed_dim={shape.embed_dim}: not divisible by "
                f"model.code_bits={shape.code_bits}; choose a multiple of it."
            )
        return shape

    @property
    def num_tables(self) -> int:
        """K, the tables of one memory layer."""
        return self.embed_dim // self.code_bits

    @property
    def head_dim(self) -> int:
        """E."""
        return self.embed_dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class Layer:
    """Cost of one layer: multiply-adds and values read per token, parameters in all."""

    hashing: int  # multiply-adds that form codes and scores
    products: int  # multiply-adds that form the output
    tables: int
    dense: int
    biases: int
    values_read: int  # table rows gathered for one token, in values

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per token, the paper's K (tau + F) for a memory layer."""
        return self.hashing + self.products


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters of the whole model by group."""

    embedding: int
    tables: int
    dense: int
    norms_and_biases: int  # and the two scalars of a learned score
    mixers: int
    head: int
    total: int


@dataclasses.dataclass(frozen=True)
class Block:
    """Multiply-adds of one block over one sequence of L tokens."""

    projections_exact: int
    projections_paper: int
    hashing: int
    mixing: int
    total_exact: int  # projections_exact + hashing + mixing
    total_paper: int  # projections_paper + mixing, as in the paper's Table 1 and Fig. 1


@dataclasses.dataclass(frozen=True)
class Accounting:
    """Everything `count` knows about one config.

    Bytes hold `value_bytes` per value. Per-token figures are for the whole model, its
    head included, at full context L.
    """

    parameters: Parameters
    block: Block
    head_multiply_adds: int  # over one sequence of L tokens
    recurrence_multiply_adds: int  # likewise: what a memory adds to all blocks
    multiply_adds_per_token: int
    flops_per_token: int  # 2 per multiply-add
    training_flops_per_token: int  # forward, and twice as much backward
    value_bytes: int
    table_bytes: int
    table_bytes_read_per_token: int  # the rows gathered in the blocks
    dense_bytes: int  # kernels and head, read whole by every forward pass
    decode_state_bytes: int  # per sequence at context L


def memory_layer(
    num_tables: int, code_bits: int, features: int, *, bias: bool = False
) -> Layer:
    """Cost of `y = sum_k s(z_k) T_k[h(z_k)]` with tables [K, 2^tau, F] (Eqs. 7 and 11)."""
    return Layer(
        hashing=num_tables * code_bits,
        products=num_tables * features,
        tables=num_tables * 2**code_bits * features,
        dense=0,
        biases=features if bias else 0,
        values_read=num_tables * features,
    )


def dense_layer(in_features: int, features: int) -> Layer:
    """Cost of `y = x W + b` with W [D, F] (Eq. 1)."""
    return Layer(
        hashing=0,
        products=in_features * features,
        tables=0,
        dense=in_features * features,
        biases=features,
        values_read=0,
    )


def projections(model: Any) -> dict[str, Layer]:
    """The layers of one block by name, Q, K and V as one.

    `model` is a config section, a `ModelConfig` or a `Shape`. A memory block hashes once
    for Q, K and V, which read rows of width 3 D.
    """
    shape = Shape.of(model)
    width = shape.embed_dim
    if shape.projection == "dense":
        hidden = shape.ffn_multiple * width
        layers = {
            "mixer.qkv": dense_layer(width, 3 * width),
            "ffn.up": dense_layer(width, hidden),
            "ffn.down": dense_layer(hidden, width),
        }
        out = dense_layer(width, width)
    else:
        tables, tau, bias = shape.num_tables, shape.code_bits, shape.memory_bias
        wide = tau + shape.extra_bits
        layers = {
            "mixer.qkv": memory_layer(tables, tau, 3 * width, bias=bias),
            "ffn.up": memory_layer(tables, tau, tables * wide, bias=bias),
            "ffn.down": memory_layer(tables, wide, width, bias=bias),
        }
        out = memory_layer(tables, tau, width, bias=bias)
    return layers | ({"mixer.out": out} if shape.output_projection else {})


def _project(shape: Shape, features: int) -> Layer:
    """A projection from D, of the block's kind."""
    if shape.projection == "dense":
        return dense_layer(shape.embed_dim, features)
    sizes = (shape.num_tables, shape.code_bits, features)
    return memory_layer(*sizes, bias=shape.memory_bias)


def count(model: Any, *, value_bytes: int = 2) -> Accounting:
    """Count what the model of a config section costs.

    `model` is `config.model`, a `ModelConfig`, or anything with the fields of `Shape`.
    `value_bytes` is the width of a stored value: 2 for fp16 and bf16 (as the paper
    counts), 4 for float32. Raises `ConfigError` as `Shape.of` does.
    """
    shape = Shape.of(model)
    layers = list(projections(shape).values())
    mixer = mixer_costs.MIXERS[shape.mixer](shape)
    memory = recurrence_costs.count(shape, layers, lambda f: _project(shape, f))
    block = _block(shape, layers)
    parameters = _parameters(shape, layers, mixer, memory)
    length, width = shape.seq_len, shape.embed_dim
    head = length * width * shape.vocab_size
    sequence = shape.num_layers * block.total_exact + memory.multiply_adds + head
    per_token = sequence // length
    rows = shape.num_layers * sum(layer.values_read for layer in layers)
    decoder = recurrence_costs.decode_mixer(shape)
    head_values = width * shape.vocab_size
    return Accounting(
        parameters=parameters,
        block=block,
        head_multiply_adds=head,
        recurrence_multiply_adds=memory.multiply_adds,
        multiply_adds_per_token=per_token,
        flops_per_token=2 * per_token,
        training_flops_per_token=6 * per_token,
        value_bytes=value_bytes,
        table_bytes=value_bytes * parameters.tables,
        table_bytes_read_per_token=value_bytes * rows,
        dense_bytes=value_bytes * (parameters.dense + head_values),
        decode_state_bytes=(decoder.state_value_bytes or value_bytes)
        * shape.num_layers
        * decoder.state_values
        + value_bytes * memory.state_values,
    )


def _block(shape: Shape, layers: Sequence[Layer]) -> Block:
    length, mixing = shape.seq_len, recurrence_costs.mixing(shape)
    exact = length * sum(layer.products for layer in layers)
    hashing = length * sum(layer.hashing for layer in layers)
    paper = exact
    if shape.projection == "memory":
        # The paper has no output projection; one more of them is one more K L D.
        units = PAPER_PROJECTIONS + shape.output_projection
        paper = units * shape.num_tables * length * shape.embed_dim
    return Block(
        projections_exact=exact,
        projections_paper=paper,
        hashing=hashing,
        mixing=mixing,
        total_exact=exact + hashing + mixing,
        total_paper=paper + mixing,
    )


def _parameters(
    shape: Shape,
    layers: Sequence[Layer],
    mixer: mixer_costs.Mixer,
    memory: recurrence_costs.Recurrence,
) -> Parameters:
    width = shape.embed_dim
    norm = width * (2 if shape.norm == "layernorm" else 1)
    inner = 0
    if shape.projection == "memory":
        # Between the FFN's two memory layers: always a LayerNorm, scale and bias.
        inner = 2 * shape.num_tables * (shape.code_bits + shape.extra_bits)
    norms = 1 if shape.residual == "eq13" else 2  # Eq. 13 norms once for both halves
    other = norms * norm + inner + sum(layer.biases for layer in layers)
    every, scalars = (*layers * shape.num_layers, *memory.layers), 0
    if hashing.is_learned(shape.score):
        scalars = 2 * sum(layer.tables > 0 for layer in every)  # beta and gamma
    own = memory.norms * norm + sum(layer.biases for layer in memory.layers)
    groups = {
        "embedding": shape.vocab_size * width,
        "tables": sum(layer.tables for layer in every),
        "dense": sum(layer.dense for layer in every),
        "norms_and_biases": shape.num_layers * other + own + scalars + norm,
        "mixers": shape.num_layers * mixer.parameters + memory.slots,
        "head": 0 if shape.tie_embeddings else width * shape.vocab_size,
    }
    return Parameters(**groups, total=sum(groups.values()))


def table(accounting: Accounting) -> str:
    """`accounting` as lines of text to read."""
    rows: list[tuple[str, int, str]] = []
    for name, value in dataclasses.asdict(accounting.parameters).items():
        rows.append((f"parameters: {name.replace('_', ' ')}", value, ""))
    for name, value in dataclasses.asdict(accounting.block).items():
        unit = "multiply-adds per sequence"
        rows.append((f"one block: {name.replace('_', ' ')}", value, unit))
    units = {
        "head_multiply_adds": "multiply-adds per sequence",
        "multiply_adds_per_token": "multiply-adds",
        "flops_per_token": "FLOPs, 2 per multiply-add",
        "training_flops_per_token": "FLOPs, 2 per multiply-add",
    }
    for field in dataclasses.fields(accounting):
        value = getattr(accounting, field.name)
        if field.name != "value_bytes" and isinstance(value, int):
            unit = units.get(field.name, f"bytes, {accounting.value_bytes} per value")
            rows.append((field.name.replace("_", " "), value, unit))
    return "\n".join(
        f"{name:<36}{value:>22,}  {unit}".rstrip() for name, value, unit in rows
    )
