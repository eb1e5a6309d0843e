"""What all recurrences share: the scan over chunks, and decoding. Start at `Recurrence`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.model import codes, mixers
from memoryformer.notation import Activations, Array, Bool, Float, Int

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig

Read = Callable[[int, Activations], Activations]  # (block, x) -> x
Memory = Float[Array, "B m D"]
OPTIONS = "model.recurrence_options"


class Trunk(Protocol):
    """What the recurrence is around: a `model.Transformer`, whose `recurrence` this is."""

    def run_blocks(
        self,
        x: Activations,
        seq: mixers.SeqInfo,
        state: mixers.State | None = None,
        read: Read | None = None,
    ) -> tuple[Activations, mixers.State | None]:
        """Blocks and final norm, `read` before each block."""

    def init_blocks(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> Any:
        """The state of every block, before any token."""


class RecurrentState(NamedTuple):
    """The memory, and the chunk that is open; its size does not depend on the length."""

    memory: Memory  # [B, m, D], what the open chunk reads
    slots: Int[Array, ""]  # places taken in the open chunk, padding's too
    tokens: Int[Array, " B"]  # real tokens among them
    blocks: mixers.State
    chunk: Any  # what else the kind keeps of the open chunk


def chunk_size(config: "ModelConfig") -> int:
    """S, the tokens of a chunk; a whole row without a recurrence."""
    if config.recurrence == "none":
        return config.seq_len
    return config.recurrence_options.chunk_size or config.seq_len // 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a memory adds to a model over one sequence of L tokens, all blocks together."""

    multiply_adds: int = 0
    parameters: int = 0  # m D, beside its projections and norms
    projections: tuple[Any, ...] = ()  # what `project` made
    norms: int = 0
    state_values: int = 0  # kept beside the open chunk's state of the mixers


class Recurrence(nnx.Module):
    """The scan over chunks, and decoding; a subclass is a kind of memory."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """What every kind of memory can be told."""

        chunk_size: int = field(
            "numbers", 0, doc="S, tokens of a chunk; 0: a quarter of model.seq_len."
        )
        num_slots: int = field("numbers", 16, doc="m, vectors carried on.")
        bptt_chunks: int = field(
            "numbers",
            0,
            doc="Chunks that gradients cross, from the row's start; 0: all.",
        )

        def __post_init__(self):
            config_lib.at_least(self, OPTIONS, 0, "chunk_size", "bptt_chunks")
            config_lib.at_least(self, OPTIONS, 1, "num_slots")

    EXAMPLES: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    before = 0  # memory tokens in front of a chunk

    @classmethod
    def capacity_of(cls, config: "ModelConfig") -> int:
        """Return the positions that the trunk sees of one chunk."""
        return chunk_size(config)

    @classmethod
    def cost(
        cls, config: "ModelConfig", block: int, project: Callable[[int], Any]
    ) -> Cost:
        """Count what the memory adds.

        block: multiply-adds per token of a block's projections. project(F): the cost of a
        projection from D to F, with `multiply_adds` per token.
        """
        raise NotImplementedError

    def __init__(self, config, project: Callable, norm: Callable, *, rngs: nnx.Rngs):
        self.chunk_size = chunk_size(config)
        self.capacity = self.capacity_of(config)
        self.num_slots = config.recurrence_options.num_slots
        self.bptt_chunks = config.recurrence_options.bptt_chunks

    def __call__(
        self,
        trunk: Trunk,
        x: Activations,
        seq: mixers.SeqInfo,
        state: RecurrentState | None = None,
    ) -> tuple[Activations, RecurrentState | None]:
        """[B, L, D] -> [B, L, D]; without a state the row's first token opens a chunk."""
        if state is None:
            return self._scan(trunk, x, seq)[0], None
        whole = x.shape[1] // self.chunk_size * self.chunk_size
        ys, piece = [], functools.partial(self._piece, trunk)
        arrays = (x, seq.positions, seq.segment_ids)
        if whole:
            chunks = [_chunks(a[:, :whole], self.chunk_size) for a in arrays]
            state, y = jax.lax.scan(piece, state, tuple(chunks))
            ys.append(_joined(y))
        if whole < x.shape[1]:
            state, y = piece(state, tuple(a[:, whole:] for a in arrays))
            ys.append(y)
        return jnp.concatenate(ys, axis=1), state

    def init_state(
        self, trunk: Trunk, batch_size: int, dtype: jnp.dtype = jnp.float32
    ) -> RecurrentState:
        """Return the state that has seen nothing, for any length."""
        memory = self._initial(batch_size).astype(dtype)
        blocks = trunk.init_blocks(batch_size, self.capacity, dtype)
        tokens = jnp.zeros((batch_size,), jnp.int32)
        state = RecurrentState(memory, jnp.int32(0), tokens, blocks, ())
        return state._replace(chunk=self.init_chunk(state))

    def memory_after(self, trunk: Trunk, x: Activations, seq: mixers.SeqInfo) -> Memory:
        """[B, L, D] -> [B, m, D], what the chunk after whole rows would be handed."""
        return self._scan(trunk, x, seq)[1]

    def initial(self) -> Float[Array, "m D"]:
        """Return the memory where a document starts."""
        raise NotImplementedError

    def whole(
        self, trunk: Trunk, memory: Memory, x: Activations, real: Bool[Array, "B S"]
    ) -> tuple[Activations, Memory]:
        """Run a whole chunk [B, S, D]: y and the memory after it."""
        raise NotImplementedError

    def open(
        self, trunk: Trunk, state: RecurrentState, dtype: jnp.dtype
    ) -> RecurrentState:
        """Prepare for a chunk's first token."""
        raise NotImplementedError

    def extend(
        self,
        trunk: Trunk,
        state: RecurrentState,
        x: Activations,
        real: Bool[Array, "B P"],
    ) -> tuple[Activations, RecurrentState]:
        """Run some tokens of a chunk, after those in the state."""
        raise NotImplementedError

    def close(self, trunk: Trunk, state: RecurrentState, dtype: jnp.dtype) -> Memory:
        """Return the memory after a chunk's last token."""
        raise NotImplementedError

    def init_chunk(self, state: RecurrentState) -> Any:
        """Return what the kind keeps of an open chunk."""
        return ()

    def _scan(self, trunk, x, seq):
        """Training: chunk by chunk, each run again for its gradient."""

        def chunk_of(trunk, memory, x, real):
            return trunk.recurrence.whole(trunk, memory, x, real)

        whole, params = codes.pure(trunk, chunk_of)

        def body(memory, chunk):
            index, x, positions, segment_ids = chunk
            if self.bptt_chunks:
                cut = index % self.bptt_chunks == 0
                memory = jnp.where(cut, jax.lax.stop_gradient(memory), memory)
            memory = self._reset(memory, positions, segment_ids)
            real = segment_ids != 0
            (y, written), read = whole(params, memory, x, real)
            end = self.before + self.chunk_size
            read = {path: part[:, self.before : end] for path, part in read.items()}
            return _where_any(real, written, memory), (y, read)

        chunks = [
            _chunks(a, self.chunk_size) for a in (x, seq.positions, seq.segment_ids)
        ]
        index = jnp.arange(len(chunks[0]))
        memory = self._initial(x.shape[0]).astype(x.dtype)
        memory, (y, read) = jax.lax.scan(jax.checkpoint(body), memory, (index, *chunks))
        length = x.shape[1]
        codes.give(
            trunk, {path: _joined(part)[:, :length] for path, part in read.items()}
        )
        return _joined(y)[:, :length], memory

    def _piece(self, trunk, state, arrays):
        """Continue with [B, P, ..], P <= S, which may reach into the next chunk."""
        append = functools.partial(self._append, trunk)
        length = arrays[0].shape[1]
        if length == 1:
            return append(state, arrays)

        def one_by_one(state, arrays):
            state, y = jax.lax.scan(append, state, tuple(_chunks(a, 1) for a in arrays))
            return state, _joined(y)

        fits = state.slots + length <= self.chunk_size
        return jax.lax.cond(fits, append, one_by_one, state, arrays)

    def _append(self, trunk, state, arrays):
        """Continue with tokens of one chunk."""
        x, positions, segment_ids = arrays
        real = segment_ids != 0

        def opened(state):
            memory = self._reset(state.memory, positions, segment_ids)
            dtype = memory.dtype
            blocks = trunk.init_blocks(x.shape[0], self.capacity, dtype)
            tokens = jnp.zeros_like(state.tokens)
            state = state._replace(memory=memory, blocks=blocks, tokens=tokens)
            return self.open(trunk, state, x.dtype)

        def closed(state):
            written = self.close(trunk, state, x.dtype).astype(state.memory.dtype)
            seen = (state.tokens > 0)[:, None]
            memory = _where_any(seen, written, state.memory)
            return state._replace(memory=memory, slots=jnp.zeros_like(state.slots))

        state = jax.lax.cond(state.slots == 0, opened, lambda state: state, state)
        y, state = self.extend(trunk, state, x, real)
        state = state._replace(
            slots=state.slots + x.shape[1],
            tokens=state.tokens + jnp.sum(real, axis=1, dtype=jnp.int32),
        )
        full = state.slots == self.chunk_size
        return jax.lax.cond(full, closed, lambda state: state, state), y

    def _initial(self, batch_size):
        memory = self.initial()
        return jnp.broadcast_to(memory[None], (batch_size, *memory.shape))

    def _reset(self, memory, positions, segment_ids):
        """Forget where the chunk's first token begins a document."""
        begins = (positions[:, :1] == 0) & (segment_ids[:, :1] != 0)
        fresh = self._initial(memory.shape[0]).astype(memory.dtype)
        return _where_any(begins, fresh, memory)

    def sequence(
        self, real: Bool[Array, "B P"], tokens: Array | int = 0
    ) -> mixers.SeqInfo:
        """Describe tokens of a chunk after `tokens` real ones: one document, no padding."""
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32) + _column(tokens)
        positions = jnp.maximum(count - 1, 0)
        return mixers.SeqInfo(positions, real.astype(jnp.int32))


def _chunks(x, size):
    """[B, L, ..] -> [L / S, B, S, ..], with zeros where the last chunk is not full."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _joined(y):
    """[L / S, B, S, ..] -> [B, L, ..]."""
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])


def _where_any(rows, new, old):
    """Take the new memory in the rows [B, P] where anything holds."""
    return jnp.where(jnp.any(rows, axis=1)[:, None, None], new, old)


def _column(tokens):
    return tokens if isinstance(tokens, int) else tokens[:, None]
