"""What a memory carried over chunks adds to the cost of a model; see `recurrence`.

Multiply-adds of one chunk of S tokens with m slots, per block:

    rmt         2 m tokens more through the block, and mixing over S + 2 m instead of S
    memformer   projections of S queries and m keys and values, 2 S m D for reading

and once, memformer's writer: projections of m queries and S + m keys and values, and
2 m (S + 1) D. Blocks themselves mix over S tokens at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from memoryformer.accounting import mixers as mixer_costs

Shape = Any  # an `accounting.Shape`
Layer = Any  # an `accounting.Layer`


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """Cost of a memory over one sequence of L tokens, all blocks together."""

    multiply_adds: int = 0
    slots: int = 0  # parameters m D
    layers: tuple[Layer, ...] = ()  # its own projections
    norms: int = 0
    state_values: int = 0  # kept beside the open chunk's state of the mixers


def chunk(shape: Shape) -> int:
    """S; the whole sequence without a recurrence."""
    if shape.recurrence == "none":
        return shape.seq_len
    return shape.recurrence_chunk or shape.seq_len // 4


def mixing(shape: Shape) -> int:
    """Multiply-adds of one block's mixer over a sequence, chunk by chunk."""
    size = chunk(shape)
    return _mixer(shape, size).multiply_adds * shape.seq_len // size


def decode_mixer(shape: Shape) -> mixer_costs.Mixer:
    """The mixer with the longest state that it has to keep."""
    memory = 2 * shape.recurrence_slots if shape.recurrence == "rmt" else 0
    return _mixer(shape, chunk(shape) + memory)


def count(
    shape: Shape, block: Sequence[Layer], project: Callable[[int], Layer]
) -> Recurrence:
    """Count a memory; `block` are a block's layers, `project(F)` one from D to F."""
    size, m, width = chunk(shape), shape.recurrence_slots, shape.embed_dim
    chunks = shape.seq_len // size
    if shape.recurrence == "rmt":
        longer = _mixer(shape, size + 2 * m).multiply_adds
        longer -= _mixer(shape, size).multiply_adds
        longer += 2 * m * sum(layer.multiply_adds for layer in block)
        return Recurrence(
            multiply_adds=chunks * shape.num_layers * longer,
            slots=m * width,
            state_values=m * width,
        )
    if shape.recurrence == "memformer":
        q, kv = project(width), project(2 * width)
        out = (project(width),) if shape.output_projection else ()
        read = size * sum(layer.multiply_adds for layer in (q, *out))
        read += m * kv.multiply_adds + 2 * size * m * width
        write = m * q.multiply_adds + (size + m) * kv.multiply_adds
        write += 2 * m * (size + 1) * width
        return Recurrence(
            multiply_adds=chunks * (shape.num_layers * read + write),
            slots=m * width,
            layers=(q, kv, *out) * shape.num_layers + (q, kv),
            norms=2 * shape.num_layers + 1,
            state_values=(m + 2 * m * shape.num_layers + size) * width,
        )
    return Recurrence()


def _mixer(shape, length):
    return mixer_costs.MIXERS[shape.mixer](dataclasses.replace(shape, seq_len=length))
