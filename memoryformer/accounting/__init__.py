"""What a model costs, counted from its config: operations, parameters, bytes.

    memory layer    K tables of 2^tau rows, F wide:   K (tau + F) multiply-adds per token   (below Eq. 11)
    mix before it   D x D, or D log2 n additions:     D^2 or D log2 n multiply-adds         (`model.front`)
    dense layer     D x F:                            D F multiply-adds per token           (Eq. 1)
    softmax mixer   scores and weighted values:       2 L^2 D multiply-adds per sequence    (section 2.4)
    other mixers    `cost` of each in model/mixers:      linear in L
    a memory        `cost` of each in model/recurrence:  beside the blocks, which mix over chunks

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
import itertools
from collections.abc import Sequence

from memoryformer.model import ModelConfig, mixers, parts, recurrence
from memoryformer.ops import hadamard, hashing

PAPER_PROJECTIONS = 6  # the paper's rounded 5.25, in units of K L D


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
    """Multiply-adds of one block, the first, over one sequence of L tokens."""

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
    num_tables: int,
    code_bits: int,
    features: int,
    *,
    bias: bool = False,
    mix: str = "none",
    thresholds: bool = False,
) -> Layer:
    """Cost of `y = sum_k s(z_k) T_k[h(z_k)]` with tables [K, 2^tau, F] (Eqs. 7 and 11).

    A rotation before the hash counts as dense, what else stands there with the biases.
    """
    width = num_tables * code_bits
    rotation = width**2 if mix == "orthogonal" else 0
    additions = width * (hadamard.block_size(width).bit_length() - 1)
    vectors = thresholds + (mix in ("hadamard", "grouped"))
    return Layer(
        hashing=width + rotation + (additions if mix == "hadamard" else 0),
        products=num_tables * features,
        tables=num_tables * 2**code_bits * features,
        dense=rotation,
        biases=(features if bias else 0) + vectors * width,
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


def projections(model: ModelConfig, layer: int = 0) -> dict[str, Layer]:
    """The layers of block `layer` by name, Q, K and V as one.

    A dense block has a layer each for Q, K and V; a memory block hashes once
    for Q, K and V, which read rows of width 3 D (`num_projections` where there are others).
    """
    width, options = model.embed_dim, model.projection_options
    chosen = parts.of_layer(model, layer)
    ffn = chosen.ffn
    if ffn.kind == "dense":
        hidden = options.ffn_multiple * width
        feed_forward = {
            "ffn.up": dense_layer(width, hidden),
            "ffn.down": dense_layer(hidden, width),
        }
    elif ffn.kind == "memory_block":
        feed_forward = {"ffn": _project(model, width, ffn)}
    else:
        wide = ffn.code_bits + options.extra_bits
        hidden = width // ffn.code_bits * wide
        down = dataclasses.replace(ffn, code_bits=wide)
        feed_forward = {
            "ffn.up": _project(model, hidden, ffn),
            "ffn.down": _project(model, width, down, in_features=hidden),
        }
    count = mixers.MIXERS[model.mixer].num_projections(model)
    qkv = _project(model, count * width, chosen.qkv)
    layers = {"mixer.qkv": qkv} | feed_forward
    if model.output_projection:
        layers["mixer.out"] = _project(model, width, chosen.output)
    return layers


def _project(
    model: ModelConfig,
    features: int,
    part: parts.Part | None = None,
    in_features: int = 0,
) -> Layer:
    """A projection, from D unless said; without a part of the model's kind."""
    part = part or parts.usual(model)
    width = in_features or model.embed_dim
    if part.kind == "dense":
        return dense_layer(width, features)
    return memory_layer(
        width // part.code_bits,
        part.code_bits,
        features,
        bias=model.projection_options.memory_bias,
        mix=part.mix,
        thresholds=part.thresholds,
    )


def count(model: ModelConfig, *, value_bytes: int = 2) -> Accounting:
    """Count what a model costs.

    `value_bytes` is the width of a stored value: 2 for fp16 and bf16 (as the paper
    counts), 4 for float32.
    """
    layers = range(model.num_layers)
    blocks = [tuple(projections(model, i).values()) for i in layers]
    per_token = sum(layer.multiply_adds for layer in blocks[0])
    memory = recurrence.cost(model, per_token, lambda f: _project(model, f))
    # The mixer with the longest state that it has to keep.
    state = mixers.cost(model, recurrence.capacity(model))
    counted = {layers: _block(model, layers) for layers in set(blocks)}
    parameters = _parameters(model, blocks, memory)
    head = model.embed_dim * model.vocab_size
    sequence = sum(counted[layers].total_exact for layers in blocks)
    sequence += memory.multiply_adds
    sequence += model.seq_len * head
    per_token = sequence // model.seq_len
    rows = sum(layer.values_read for layers in blocks for layer in layers)
    state_bytes = (state.state_value_bytes or value_bytes) * state.state_values
    return Accounting(
        parameters=parameters,
        block=counted[blocks[0]],
        head_multiply_adds=model.seq_len * head,
        recurrence_multiply_adds=memory.multiply_adds,
        multiply_adds_per_token=per_token,
        flops_per_token=2 * per_token,
        training_flops_per_token=6 * per_token,
        value_bytes=value_bytes,
        table_bytes=value_bytes * parameters.tables,
        table_bytes_read_per_token=value_bytes * rows,
        dense_bytes=value_bytes * (parameters.dense + head),
        decode_state_bytes=model.num_layers * state_bytes
        + value_bytes * memory.state_values,
    )


def _block(model: ModelConfig, layers: Sequence[Layer]) -> Block:
    length, chunk = model.seq_len, recurrence.chunk_size(model)
    mixing = mixers.cost(model, chunk).multiply_adds * length // chunk
    exact = length * sum(layer.products for layer in layers)
    hashed = length * sum(layer.hashing for layer in layers)
    paper = exact
    if all(layer.tables for layer in layers):
        # The paper has no output projection; one more of them is one more K L D.
        units = PAPER_PROJECTIONS + model.output_projection
        paper = units * model.num_tables * length * model.embed_dim
    return Block(
        projections_exact=exact,
        projections_paper=paper,
        hashing=hashed,
        mixing=mixing,
        total_exact=exact + hashed + mixing,
        total_paper=paper + mixing,
    )


def _parameters(
    model: ModelConfig, blocks: Sequence[Sequence[Layer]], memory: recurrence.Cost
) -> Parameters:
    width = model.embed_dim
    norm = width * (2 if model.norm == "layernorm" else 1)
    inner = 0
    for i in range(model.num_layers):
        if (ffn := parts.of_layer(model, i).ffn).kind == "memory":
            # Between the FFN's two memory layers: always a LayerNorm, scale and bias.
            wide = ffn.code_bits + model.projection_options.extra_bits
            inner += 2 * width // ffn.code_bits * wide
    norms = 1 if model.residual == "eq13" else 2  # Eq. 13 norms once for both halves
    every = (*itertools.chain(*blocks), *memory.projections)
    scalars = 0
    if hashing.is_learned(model.score):
        scalars = 2 * sum(layer.tables > 0 for layer in every)  # beta and gamma
    all_norms = (norms * model.num_layers + memory.norms + 1) * norm  # 1: the last
    biases = sum(layer.biases for layer in every)
    mixing = mixers.cost(model, model.seq_len)
    groups = {
        "embedding": model.vocab_size * width,
        "tables": sum(layer.tables for layer in every),
        "dense": sum(layer.dense for layer in every),
        "norms_and_biases": all_norms + inner + biases + scalars,
        "mixers": model.num_layers * mixing.parameters
        + mixing.shared_parameters
        + memory.parameters,
        "head": 0 if model.tie_embeddings else width * model.vocab_size,
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
        "recurrence_multiply_adds": "multiply-adds per sequence",
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
