"""Energy and time of one token of a model, row by row.

    dense layer     a product with [D, F]
    memory layer    'rows':      K rows of F values from a memory, and K tau comparisons  (M1)
                    'crossbar':  its tables inside crossbars, one row of each driven      (M2)
    the rest        mixing, caches, norms, softmax, embedding: digital, the same for both

Shapes are those of the model itself (`model.merge`), mixing and caches of `accounting`. A token is
one of `batch` that are decoded together, each at the end of a context of `seq_len` tokens. Values
of digital hardware have 8 bits. Start at `per_token`.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
from flax import nnx

from memoryformer import accounting
from memoryformer import config as config_lib
from memoryformer import model as model_lib
from memoryformer.cim import technologies
from memoryformer.cim.constants import CONSTANTS
from memoryformer.cim.technologies import TECHNOLOGIES, VALUE_BITS, Work
from memoryformer.errors import ConfigError
from memoryformer.model import layers, parts

MAPPINGS = ("rows", "crossbar")


@dataclasses.dataclass(frozen=True)
class Row:
    """What all layers of one kind cost for one token; energy in pJ, time in ns.

    ns is the sum over layers that run one after another, as far as it is known; nodes and
    sources are those of the technology.
    """

    technology: str
    batch: int
    layer: str
    kind: str
    mapping: str
    layers: int
    read_pj: float
    arithmetic_pj: float
    hash_pj: float
    conversion_pj: float
    total_pj: float
    ns: float | None
    stored_bits: int
    nodes: str
    sources: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer of the model: its kind and the shape of its weights, features as one axis."""

    name: str
    kind: str  # 'memory' | 'dense' | 'norm'
    shape: tuple[int, ...]  # [K, C, F] | [D, F] | [D]


def per_token(
    model_config: model_lib.ModelConfig,
    technology: str,
    batch: int = 1,
    tables: str = "rows",
) -> tuple[Row, ...]:
    """Return the rows of a model on one of `TECHNOLOGIES`.

    tables: where those of memory layers are, one of `MAPPINGS`. Raises `ConfigError` for a
    name or a batch that cannot be, and for tables in the crossbars of a plain memory.
    """
    config_lib.choose(technology, TECHNOLOGIES, "--technology")
    config_lib.choose(tables, MAPPINGS, "--tables")
    if batch < 1:
        raise ConfigError(f"--batch={batch}: must be >= 1.")
    parts.check_one_row(model_config, "the energy of a token")
    machine = TECHNOLOGIES[technology]
    if tables == "crossbar" and isinstance(machine, technologies.Memory):
        raise ConfigError(
            f"--tables=crossbar: {technology!r} has no crossbars; use --tables=rows."
        )
    found = collections.Counter(_layers(model_config))
    rows = [
        _layer_row(layer, count, technology, batch, tables)
        for layer, count in found.items()
        if layer.kind != "norm"
    ]
    norms = sum(
        count * layer.shape[0] for layer, count in found.items() if layer.kind == "norm"
    )
    return (*rows, *_digital_rows(model_config, technology, batch, norms))


def total(rows: Sequence[Row]) -> float:
    """Energy of a token, pJ."""
    return sum(row.total_pj for row in rows)


def _layers(model_config: model_lib.ModelConfig) -> Iterator[_Layer]:
    """The layers of the model, named without the number of their block.

    Those of a recurrence do not see every token: `accounting` counts them.
    """
    shapes = jax.eval_shape(lambda: model_lib.init(model_config))
    model = model_lib.merge(model_config, shapes)
    for path, module in nnx.iter_modules(model, graph=False):
        if path[:1] == ("recurrence",):
            continue
        name = ".".join(
            str(part) for part in path[2 if path[:1] == ("blocks",) else 0 :]
        )
        if isinstance(module, layers.MemoryLayer):
            num_tables, num_buckets, *features = module.tables.get_value().shape
            yield _Layer(name, "memory", (num_tables, num_buckets, math.prod(features)))
        elif isinstance(module, layers.Dense | layers.Head):
            width, *features = module.kernel.get_value().shape
            yield _Layer(name, "dense", (width, math.prod(features)))
        elif isinstance(module, layers.RMSNorm | layers.LayerNorm):
            yield _Layer(name, "norm", module.scale.get_value().shape)
    if model_config.tie_embeddings:
        yield _Layer("head", "dense", (model_config.embed_dim, model_config.vocab_size))


def _layer_row(layer, count, technology, batch, tables) -> Row:
    machine = TECHNOLOGIES[technology]
    bits = machine.weight_bits
    if layer.kind == "dense":
        width, features = layer.shape
        analog = not isinstance(machine, technologies.Memory)
        kind, mapping = "dense layer", "crossbar" if analog else "read"
        work = machine.product(width, features, batch)
    else:
        kind, mapping = "memory layer", tables
        code_bits = layer.shape[1].bit_length() - 1
        sizes = (*layer.shape, code_bits)
        work = technologies.rows(machine.memory, sizes, batch)
        if isinstance(machine, technologies.Memory) or tables == "rows":
            bits = VALUE_BITS
        else:
            inside = machine.tables(*layer.shape)
            work = dataclasses.replace(inside, hashing=work.hashing)
    return _row(
        *(layer.name, kind, mapping, count, work, technology, batch),
        shape=layer.shape,
        bits=bits,
    )


def _digital_rows(model_config, technology, batch, norms) -> Iterator[Row]:
    """What stays digital: a token's own cache is read whole, whatever the batch."""
    memory = TECHNOLOGIES[technology].memory
    costs = accounting.count(model_config, value_bytes=VALUE_BITS // 8)
    length, depth = model_config.seq_len, model_config.num_layers

    def row(name, work, stored=()):
        head = (name, "digital", "-", 1)
        return _row(*head, work, technology, batch, shape=stored, bits=VALUE_BITS)

    state = costs.decode_state_bytes * 8 // VALUE_BITS
    mixing = memory.reading(state)
    products = technologies.multiply_adds(depth * costs.block.mixing / length)
    mixing = dataclasses.replace(mixing, arithmetic=products)
    yield row("mixing and its state", mixing, (state,))
    if costs.recurrence_multiply_adds:
        work = technologies.multiply_adds(costs.recurrence_multiply_adds / length)
        yield row("recurrence", Work(arithmetic=work))
    values = norms
    if model_config.mixer == "softmax":
        values += depth * model_config.num_heads * length
    fp16 = technologies.pj("fp16_mul") + technologies.pj("fp16_add")
    operations = values * technologies.pj("vector_operations")
    yield row("norms and softmax", Work(arithmetic=operations * fp16))
    size = (model_config.vocab_size, model_config.embed_dim)
    stored = () if model_config.tie_embeddings else size
    yield row("embedding", memory.reading(model_config.embed_dim), stored)


def _row(name, kind, mapping, count, work, technology, batch, shape, bits) -> Row:
    parts = (work.read, work.arithmetic, work.hashing, work.conversion)
    used = [CONSTANTS[key] for key in TECHNOLOGIES[technology].constants]
    return Row(
        technology=technology,
        batch=batch,
        layer=name,
        kind=kind,
        mapping=mapping,
        layers=count,
        read_pj=count * work.read,
        arithmetic_pj=count * work.arithmetic,
        hash_pj=count * work.hashing,
        conversion_pj=count * work.conversion,
        total_pj=count * sum(parts),
        ns=None if work.ns is None else count * work.ns,
        stored_bits=count * bits * math.prod(shape) if shape else 0,
        nodes=", ".join(dict.fromkeys(c.node for c in used if c.node != "-")),
        sources=tuple(dict.fromkeys(constant.source for constant in used)),
    )
