"""Luna: attention through a memory of m slots that every token packs into and reads from.

    slots_t = 1/t sum_{s <= t, same document} c_s (x) w_s    [E, m], a running sum
    o_t     = slots_t . softmax(q_t . slots_t / tau)         over the m slots

Two calls of `ops.prefix`. The variants differ in what is written (conv_luna.py is the second):

    luna        w = elu(x W_pack . P) + 1                                Ma et al. 2021
    conv_luna   luna whose inputs to the memory are filtered over a few tokens, with learned
                temperatures                                  after Yorsh et al. 2024, causal

With `causal=False` (whole documents, no state) the sums run over past and future, and Luna packs
by a softmax over the document,

    Y_P = softmax_s(P . pack(x_s) / tau_pack) c_s,     o_t = softmax(q_t . Y_P / tau) Y_P

where P is each layer's own. With `stream` it is one for the model and goes through depth, as in
the paper, for rows of one document:

    P_{i+1} = unit(P_i + Y_P),     unit: every head of a slot scaled to a mean square of 1

Luna has no code for positions, and takes no rotary ones. Start at `Luna`.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.model.mixers import base
from memoryformer.notation import Activations, Array, Float, Int
from memoryformer.ops import document_max, prefix

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class LunaState(NamedTuple):
    """The memory [B, H, E, m] and, for a filter, the last tokens' inputs to it."""

    memory: prefix.PrefixState
    tail: Float[Array, "B W 2 D"]  # W = filter width - 1 rows
    tail_segments: Int[Array, "B W"]


class Luna(base.MultiHead):
    """Causal Luna with tied keys and values: one matrix [E, m] a head is all its state.

        omega_t = elu(pack(x_t) . P / tau_pack) + 1                           in R^m
        A_t     = 1/t sum_{s <= t} c_s (x) omega_s
        o_t     = A_t . softmax(q_t . A_t / tau)

    P is a parameter of the layer and stands for the projected P W_pq of the paper. c is a third
    projection of x or, without `values`, x itself.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(base.PrefixOptions):
        """And what the memory is."""

        num_slots: int = field("numbers", 64, doc="m, slots of the memory.")
        temperature: str = field(
            "numbers",
            "sqrt",
            doc="sqrt | unit | learn: tau and tau_pack are sqrt(E), 1, or learned from 1 on.",
        )
        values: bool = field(
            "numbers", True, doc="Whether c is projected; False: c is x itself."
        )
        stream: bool = field(
            "numbers", False, doc="One memory through depth; needs causal=False."
        )

        def __post_init__(self):
            super().__post_init__()
            base.at_least(self, 1, "num_slots")
            name = f"{base.OPTIONS}.temperature"
            config_lib.choose(self.temperature, ("sqrt", "unit", "learn"), name)

    EXAMPLES: ClassVar = {"luna": {"num_slots": 64}}
    ABOUT = base.About(
        "m slots written by content, tied keys and values", "4 m D", "m E", "none"
    )
    LOOKS_AHEAD = True
    HAS_SLOTS = True

    @classmethod
    def cost(cls, config: "ModelConfig", length: int) -> base.Cost:
        """4 m D per token: the slots, written once and read twice, and the logits of packing."""
        options, width = config.mixer_options, config.embed_dim
        slots = options.num_slots * width
        return base.Cost(
            multiply_adds=length * 4 * slots,
            state_values=slots,
            parameters=slots * (not options.stream)
            + 2 * (options.temperature == "learn"),
            shared_parameters=slots * options.stream,
            state_value_bytes=4,
        )

    @classmethod
    def streams(cls, config: "ModelConfig") -> bool:
        """As the option says."""
        return config.mixer_options.stream

    @classmethod
    def num_projections(cls, config: "ModelConfig") -> int:
        """q, pack and, with `values`, c."""
        return 2 + config.mixer_options.values

    @classmethod
    def check(cls, config: "ModelConfig") -> None:
        """Refuse a stream where there is nothing that it could go through."""
        if not config.mixer_options.stream:
            return
        if config.causal or config.scan_layers or config.remat != "none":
            raise ConfigError(
                f"{base.OPTIONS}.stream=True: a memory through depth sees whole rows; set "
                "model.causal=False, model.scan_layers=False and model.remat='none'."
            )

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project)  # q, c and pack share one hash
        options = config.mixer_options
        self.chunk_size, self.num_slots = options.prefix_chunk, options.num_slots
        self.stream, self.causal = options.stream, config.causal
        if not self.stream or layer == 0:
            shape = (self.num_slots, config.embed_dim)
            p = jax.random.normal(rngs.params(), shape)
            self.memory = nnx.Param(p, spec="last_axis", decay=True)  # P: [m, D]
        self.temperature = options.temperature
        if self.temperature == "learn":
            self.log_tau = nnx.Param(jnp.zeros(()), spec="whole", decay=False)
            self.log_tau_pack = nnx.Param(jnp.zeros(()), spec="whole", decay=False)

    def __call__(
        self, x: Activations, seq: base.SeqInfo, state: Any = None
    ) -> tuple[Activations, Any]:
        """[B, L, D] -> [B, L, D] and the state after it, a `LunaState`.

        With `stream` the state is P [B, m, H, E], None before the first layer.
        """
        if self.stream:
            return self._from_stream(x, seq, state)
        q, c, logits, tail = self._inputs(x, seq, state)
        if not self.causal:
            base.refuse_state(state)
            y = self._both_directions(q, c, logits, seq.segment_ids)
            return self.join(y, x.dtype), None
        omega = jax.nn.elu(logits) + 1
        average = 1 / (seq.positions + 1).astype(c.dtype)[..., None, None]
        written = None if state is None else state.memory
        rest = {"chunk_size": self.chunk_size}
        logits, memory = prefix.prefix(q, c, omega, seq.segment_ids, written, **rest)
        weights = jax.nn.softmax(logits * average, axis=-1)
        if written is not None:  # the same sums, read from the other side
            written = written._replace(sums=written.sums.mT)
        y, _ = prefix.prefix(weights, omega, c, seq.segment_ids, written, **rest)
        state = None if state is None else LunaState(memory, *tail)
        return self.join(y * average, x.dtype), state

    def _inputs(self, x, seq, state, memory=None):
        """q / tau, c and the logits of writing pack . P / tau_pack [B, L, H, m]; the tail."""
        q, *c, pack = (base.wide(a) for a in self.split(x, seq))  # [B, L, H, E]
        values = c[0] if c else base.wide(x).reshape(q.shape)
        values, pack, tail = self.filter(values, pack, seq, state)
        unpack_scale, pack_scale = self.scales()
        p, pack = self._slots(memory).astype(pack.dtype), pack * pack_scale
        spec = "blhe,mhe->blhm" if p.ndim == 3 else "blhe,bmhe->blhm"
        return q * unpack_scale, values, jnp.einsum(spec, pack, p), tail

    def _slots(self, memory):
        """P of this layer: its own [m, H, E], or what the layer before returned [B, m, H, E]."""
        if memory is not None:
            return memory
        return self.memory[...].reshape(self.num_slots, -1, self.head_dim)

    def _from_stream(self, x, seq, memory):
        """Read what the row packs by P, and return P of the next layer."""
        if memory is None:
            p = self._slots(None)[None]
            memory = jnp.broadcast_to(p, (x.shape[0], *p.shape[1:]))
        q, *_ = self._inputs(x, seq, None, memory)
        packed = self.packed(x, seq, memory)
        weights = jax.nn.softmax(jnp.einsum("blhe,bmhe->blhm", q, packed), axis=-1)
        y = jnp.einsum("blhm,bmhe->blhe", weights, packed)
        total = memory + packed
        square = jnp.mean(jnp.square(total), axis=-1, keepdims=True)
        return self.join(y, x.dtype), total * jax.lax.rsqrt(square + 1e-8)

    def packed(
        self, x: Activations, seq: base.SeqInfo, memory: Array | None = None
    ) -> Float[Array, "B m H E"]:
        """Y_P of the two-sided form: what the tokens of a row's last document read."""
        _, c, logits, _ = self._inputs(x, seq, None, memory)
        real = seq.segment_ids != 0
        last = x.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1, keepdims=True)
        own = seq.segment_ids == jnp.take_along_axis(seq.segment_ids, last, axis=1)
        inside = (own & real)[..., None, None]
        logits = jnp.where(inside, logits, jnp.finfo(logits.dtype).min)
        weights = jnp.where(inside, jax.nn.softmax(logits, axis=1), 0)
        return jnp.einsum("blhm,blhe->bmhe", weights, c)

    def _both_directions(self, q, c, logits, segment_ids):
        """Pack with a softmax over the document, and read what was packed."""
        flat = logits.reshape(*logits.shape[:2], -1)
        highest = document_max.whole(jax.lax.stop_gradient(flat), segment_ids)
        real = (segment_ids != 0)[..., None, None]
        logits = jnp.where(real, logits - highest.reshape(logits.shape), 0)
        omega, ones = jnp.exp(logits), jnp.ones_like(c[..., :1])
        sums = functools.partial(
            prefix.total, segment_ids=segment_ids, chunk_size=self.chunk_size
        )
        mass = sums(ones, ones, omega)  # [B, L, H, m], of the token's document
        mass = jnp.where(real, mass, 1)
        weights = jax.nn.softmax(sums(q, c, omega) / mass, axis=-1)
        return sums(weights / mass, omega, c)

    def scales(self) -> tuple[Array | float, Array | float]:
        """Return 1 / tau of reading and of writing; learned ones are exp(log tau)."""
        if self.temperature == "learn":
            return jnp.exp(-self.log_tau[...]), jnp.exp(-self.log_tau_pack[...])
        scale = self.head_dim**-0.5 if self.temperature == "sqrt" else 1.0
        return scale, scale

    def filter(
        self, c: Array, pack: Array, seq: base.SeqInfo, state: LunaState | None
    ) -> tuple[Array, Array, tuple[Array, Array] | None]:
        """Return what enters the memory, and the tail that the next call needs."""
        return c, pack, None if state is None else state[1:]

    @property
    def tail_length(self) -> int:
        """Tokens before a call that its first token's filter sees."""
        return 0

    def init_state(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> LunaState:
        """Return an empty memory, for any length."""
        shape = (batch_size, self.tail_length)
        return LunaState(
            prefix.init_state(
                batch_size, self.local_heads, self.head_dim, self.num_slots
            ),
            jnp.zeros((*shape, 2, self.local_heads * self.head_dim), jnp.float32),
            jnp.zeros(shape, jnp.int32),
        )
