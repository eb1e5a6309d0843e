"""What a model costs, counted from its config: operations, parameters, bytes.

    memory layer    K tables of 2^tau rows, F wide:   K (tau + F) multiply-adds per token   (below Eq. 11)
    mix before it   D x D, or D log2 n additions:     D^2 or D log2 n multiply-adds         (`model.front`)
    dense layer     D x F:                            D F multiply-adds per token           (Eq. 1)
    softmax mixer   scores and weighted values:       2 L^2 D multiply-adds per sequence    (section 2.4)
    n-grams         N - 1 rows of D added:            (N - 1) D per token                   (`model.ngrams`)
    tokens' rows    added to Q, K and V of a block:   3 D per token and block               (`model.token_rows`)
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
from collections.abc import Sequence

from memoryformer.accounting.layers import Layer, project, projections
from memoryformer.model import ModelConfig, mixers, ngrams, parts, recurrence
from memoryformer.ops import hashing

PAPER_FEED_FORWARD = 3  # the paper's rounded 2.25 beside Q, K and V, in units of K L D


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
    """Multiply-adds of one block over one sequence of L tokens; the mean, where they differ."""

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
    table_bytes_read_per_token: int  # rows gathered: in blocks, of n-grams, of tokens
    dense_bytes: int  # kernels and head, read whole by every forward pass
    decode_state_bytes: int  # per sequence at context L
    decode_bytes_per_token: int  # all that one token reads: rows, dense, head, state


def count(model: ModelConfig, *, value_bytes: int = 2) -> Accounting:
    """Count what a model costs.

    `value_bytes` is the width of a stored value: 2 for fp16 and bf16 (as the paper
    counts), 4 for float32. Where blocks differ, `block` is their mean.
    """
    configs = [mixers.of_layer(model, i) for i in range(model.num_layers)]
    layers = [tuple(projections(model, i).values()) for i in range(model.num_layers)]
    per_block = sum(layer.multiply_adds for block in layers for layer in block)
    per_block //= model.num_layers
    memory = recurrence.cost(model, per_block, lambda f: project(model, f))
    # The mixer with the longest state that it has to keep.
    states = [mixers.cost(c, recurrence.capacity(model)) for c in configs]
    blocks = [_block(*pair) for pair in zip(configs, layers, strict=True)]
    parameters = _parameters(configs, layers, memory)
    head = model.embed_dim * model.vocab_size
    sequence = sum(block.total_exact for block in blocks) + memory.multiply_adds
    of_tokens = ngrams.num_values(model) + mixers.token_row_values(model)
    sequence += model.seq_len * (head + of_tokens)
    per_token = sequence // model.seq_len
    rows = sum(layer.values_read for block in layers for layer in block) + of_tokens
    dense = parameters.dense + head
    state_bytes = sum(state.state_bytes(value_bytes) for state in states)
    state_bytes += value_bytes * memory.state_values
    return Accounting(
        parameters=parameters,
        block=_mean(blocks),
        head_multiply_adds=model.seq_len * head,
        recurrence_multiply_adds=memory.multiply_adds,
        multiply_adds_per_token=per_token,
        flops_per_token=2 * per_token,
        training_flops_per_token=6 * per_token,
        value_bytes=value_bytes,
        table_bytes=value_bytes * parameters.tables,
        table_bytes_read_per_token=value_bytes * rows,
        dense_bytes=value_bytes * dense,
        decode_state_bytes=state_bytes,
        decode_bytes_per_token=value_bytes * (rows + dense) + state_bytes,
    )


def _mean(blocks: Sequence[Block]) -> Block:
    names = [field.name for field in dataclasses.fields(Block)]
    sums = {name: sum(getattr(block, name) for block in blocks) for name in names}
    return Block(**{name: total // len(blocks) for name, total in sums.items()})


def _block(model: ModelConfig, layers: Sequence[Layer]) -> Block:
    length, chunk = model.seq_len, recurrence.chunk_size(model)
    mixing = mixers.cost(model, chunk).multiply_adds * length // chunk
    exact = length * sum(layer.products for layer in layers)
    hashed = length * sum(layer.hashing for layer in layers)
    paper = exact
    if model.projection == "memory":
        # Q, K and V are 3 K L D; the paper has no output projection, which is one more.
        shapes = mixers.projections(model).values()
        paper = PAPER_FEED_FORWARD * model.num_tables * length * model.embed_dim
        paper += sum(length * (d // model.code_bits) * f for d, f in shapes)
        paper *= model.projection_options.rows_read
    return Block(
        projections_exact=exact,
        projections_paper=paper,
        hashing=hashed,
        mixing=mixing,
        total_exact=exact + hashed + mixing,
        total_paper=paper + mixing,
    )


def _parameters(
    configs: Sequence[ModelConfig],
    layers: Sequence[tuple[Layer, ...]],
    memory: recurrence.Cost,
) -> Parameters:
    model, width = configs[0], configs[0].embed_dim
    norm = width * (2 if model.norm == "layernorm" else 1)
    inner = 0
    for i in range(model.num_layers):
        if (ffn := parts.of_layer(model, i).ffn).kind == "memory":
            # Between the FFN's two memory layers: always a LayerNorm, scale and bias.
            wide = ffn.code_bits + model.projection_options.extra_bits
            inner += 2 * width // ffn.code_bits * wide
    norms = 1 if model.residual == "eq13" else 2  # Eq. 13 norms once for both halves
    blocks = [layer for block in layers for layer in block]
    every, scalars = [*blocks, *memory.projections], 0
    if hashing.is_learned(model.score):
        scalars = 2 * sum(layer.memory_layers for layer in every)  # beta and gamma
    all_norms = (norms * model.num_layers + memory.norms + 1) * norm  # 1: the last
    biases = sum(layer.biases for layer in every)
    mixing = [mixers.cost(c, model.seq_len) for c in configs]
    groups = {
        "embedding": model.vocab_size * (width + mixers.token_row_values(model))
        + ngrams.num_values(model) * model.projection_options.ngram_rows,
        "tables": sum(layer.tables for layer in every),
        "dense": sum(layer.dense for layer in every),
        "norms_and_biases": all_norms + inner + biases + scalars,
        "mixers": sum(cost.parameters for cost in mixing)
        + mixing[0].shared_parameters
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
