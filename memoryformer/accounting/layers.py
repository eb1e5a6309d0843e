"""What one layer costs, dense or memory, and which layers a block has. Start at `projections`."""

import dataclasses

from memoryformer.model import ModelConfig, mixers, parts
from memoryformer.ops import hadamard


@dataclasses.dataclass(frozen=True)
class Layer:
    """Cost of one layer: multiply-adds and values read per token, parameters in all."""

    hashing: int  # multiply-adds that form codes and scores
    products: int  # multiply-adds that form the output
    tables: int
    dense: int
    biases: int
    values_read: int  # table rows gathered for one token, in values
    memory_layers: int = 0  # how many are added up

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per token, the paper's K (tau + F) for a memory layer."""
        return self.hashing + self.products


def memory_layer(
    num_tables: int,
    code_bits: int,
    features: int,
    *,
    bias: bool = False,
    mix: str = "none",
    thresholds: bool = False,
    rows_read: int = 1,
) -> Layer:
    """Cost of `y = sum_k s(z_k) T_k[h(z_k)]` with tables [K, 2^tau, F] (Eqs. 7 and 11).

    A rotation before the hash counts as dense, what else stands there with the biases. A
    second row costs one more product for its score.
    """
    width = num_tables * code_bits
    rotation = width**2 if mix == "orthogonal" else 0
    additions = width * (hadamard.block_size(width).bit_length() - 1)
    vectors = thresholds + (mix in ("hadamard", "grouped"))
    return Layer(
        hashing=width
        + rotation
        + (additions if mix == "hadamard" else 0)
        + num_tables * (rows_read - 1),
        products=rows_read * num_tables * features,
        tables=num_tables * 2**code_bits * features,
        dense=rotation,
        biases=(features if bias else 0) + vectors * width,
        values_read=rows_read * num_tables * features,
        memory_layers=1,
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
    """The layers of block `layer` by name, those of its mixer (`projections`) as they are made.

    A memory block hashes once for Q, K and V, which read rows of width 3 D.
    """
    width, options = model.embed_dim, model.projection_options
    chosen = parts.of_layer(model, layer)
    ffn = chosen.ffn
    if ffn.kind == "dense":
        hidden = options.ffn_multiple * width
        block = {
            "ffn.up": dense_layer(width, hidden),
            "ffn.down": dense_layer(hidden, width),
        }
    elif ffn.kind == "memory_block":
        block = {"ffn": project(model, width, ffn)}
    else:
        wide = ffn.code_bits + options.extra_bits
        hidden = width // ffn.code_bits * wide
        down = dataclasses.replace(ffn, code_bits=wide)
        block = {
            "ffn.up": project(model, hidden, ffn),
            "ffn.down": project(model, width, down, in_features=hidden),
        }
    shapes = mixers.projections(mixers.of_layer(model, layer))
    for name, (inputs, features) in shapes.items():
        part = chosen.output if name == "out" else chosen.qkv
        block[f"mixer.{name}"] = project(model, features, part, inputs)
    return block


def project(
    model: ModelConfig,
    features: int,
    part: parts.Part | None = None,
    in_features: int = 0,
) -> Layer:
    """A projection, from D unless said, a sum as a whole; without a part of the model's kind."""
    part = part or parts.usual(model)
    width = in_features or model.embed_dim
    if part.kind == "dense":
        return dense_layer(width, features)
    terms = [
        memory_layer(
            width // part.code_bits,
            part.code_bits,
            features,
            bias=model.projection_options.memory_bias and number == 0,
            mix=mix,
            thresholds=part.thresholds,
            rows_read=model.projection_options.rows_read,
        )
        for number, mix in enumerate(part.mixes)
    ]
    costs = [dataclasses.asdict(term) for term in terms]
    return Layer(**{name: sum(cost[name] for cost in costs) for name in costs[0]})
