"""Heads of two kinds side by side: softmax over the past, and a recurrence without a cache.

After RecurFormer (Yan et al. 2024), whose heads that look at near tokens become Mamba heads; it
has no public code, and the heads, their start and their choice are ours:

    kept head        o = softmax(q . k) v                        as in softmax.py
    recurrent head   o = norm( y * silu(z + gate) ),   y = SSD(x, B, C, dt)    as in mamba2.py

with x, B, C the head's v, k, q behind a filter of W tokens, all E wide, so that a trained head has
where to begin (`memoryformer.convert.recency`). Kept heads are stored first. `head_order` says where
each head's output goes, so that a head can become recurrent and stay in its place. Start at
`Recurformer`.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.model.mixers import base, mamba2, recurrent_head, softmax
from memoryformer.notation import Activations
from memoryformer.ops import attention, collectives, remat

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class RecurformerState(NamedTuple):
    """The cache of the kept heads and the state of the others; None where there are none."""

    cache: softmax.KVCache | None
    recurrent: mamba2.SSDState | None


class Recurformer(softmax.Softmax):
    """H heads, of which `recurrent_heads` of each layer are recurrent.

    With none of them recurrent it is softmax, bit for bit.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(base.PrefixOptions):
        """Which heads are recurrent, and the sizes of those."""

        recurrent_heads: tuple = field(
            "numbers",
            (),
            doc="How many: of each layer, or one number for all; (): half of them.",
        )
        head_order: tuple = field(
            "numbers",
            (),
            doc="Place of each head, kept ones first, layer after layer; (): as stored.",
        )
        width: int = field("numbers", 4, doc="W, tokens of the filter.")
        attention: str = field(
            "rounding", "xla", doc="xla | cudnn (GPU) | splash (TPU) | auto."
        )

        def __post_init__(self):
            super().__post_init__()
            base.at_least(self, 1, "width")
            name = f"{base.OPTIONS}.attention"
            config_lib.choose(self.attention, attention.IMPLEMENTATIONS, name)
            for name in ("recurrent_heads", "head_order"):
                for value in getattr(self, name):
                    if type(value) is not int or value < 0:
                        raise ConfigError(
                            f"{base.OPTIONS}.{name}={getattr(self, name)!r}: must be "
                            "whole numbers of at least 0."
                        )

    EXAMPLES: ClassVar = {"recurformer": {}}
    ABOUT = base.About(
        "h of the H heads by a recurrence, the others as softmax",
        "2 L (D - h E) + h (2 E^2 + 3 W E)",
        "2 L E of a kept head; E^2 + 3 (W - 1) E of another",
        "rotary; the decay",
    )
    HAS_TOKEN_ROWS = False  # the recurrent heads' inputs have none
    LOOKS_AHEAD = False
    TAKES_ANY_ORDER = False

    @classmethod
    def check(cls, config: "ModelConfig") -> None:
        """Refuse counts and orders that are not those of the model's layers and heads."""
        options, name = config.mixer_options, f"{base.OPTIONS}.recurrent_heads"
        layers, heads = config.num_layers, config.num_heads
        counts, order = options.recurrent_heads, options.head_order
        if len(counts) not in (0, 1, layers) or any(n > heads for n in counts):
            raise ConfigError(
                f"{name}={counts!r}: must be one number or {layers}, one a layer, and none "
                f"above model.num_heads={heads}."
            )
        places = [order[i : i + heads] for i in range(0, len(order), heads)]
        if order and [sorted(p) for p in places] != [list(range(heads))] * layers:
            raise ConfigError(
                f"{base.OPTIONS}.head_order={order!r}: must name the places 0 to {heads - 1} "
                f"once in each of {layers} layers."
            )
        alike = {
            (recurrent_heads(config, i), head_order(config, i)) for i in range(layers)
        }
        if config.scan_layers and len(alike) > 1:
            raise ConfigError(
                f"model.scan_layers=True: {name}={counts!r} and head_order make layers that "
                "differ; use scan_layers=False."
            )

    @classmethod
    def check_sequence(cls, config: "ModelConfig") -> None:
        """Refuse a kernel of one device."""
        if config.mixer_options.attention != "xla":
            raise ConfigError(
                f"mesh: {base.OPTIONS}.attention={config.mixer_options.attention!r} cannot "
                "run over a 'sequence' axis: use attention='xla'."
            )

    @classmethod
    def of_layer(cls, config: "ModelConfig", layer: int) -> "ModelConfig":
        """As many recurrent heads in all layers as in this one."""
        count = recurrent_heads(config, layer)
        options = dataclasses.replace(
            config.mixer_options, recurrent_heads=(count,), head_order=()
        )
        return dataclasses.replace(config, mixer_options=options)

    @classmethod
    def projections(cls, config: "ModelConfig") -> dict[str, tuple[int, int]]:
        """Q, K and V of kept heads; q, k, v, z and dt of the others; and back."""
        width, count = config.embed_dim, recurrent_heads(config, 0)
        kept = (config.num_heads - count) * config.head_dim
        layers = {
            "qkv": (width, 3 * kept),
            "recurrent.inputs": (width, count * (4 * config.head_dim + 1)),
        }
        layers = {name: shape for name, shape in layers.items() if shape[1]}
        return layers | ({"out": (width, width)} if config.output_projection else {})

    @classmethod
    def cost(cls, config: "ModelConfig", length: int) -> base.Cost:
        """Of the mean layer: 2 L E per token and kept head, 2 E^2 + 3 W E per other head."""
        layers, width = config.num_layers, config.head_dim
        count = sum(recurrent_heads(config, i) for i in range(layers))
        kept = layers * config.num_heads - count
        taps, blocks = (
            config.mixer_options.width,
            length + -length % attention.CACHE_BLOCK,
        )
        recurrent = 2 * width**2 + 3 * taps * width
        parameters = 3 * (taps + 1) * width + 3 + 2 * width
        return base.Cost(
            multiply_adds=length
            * (kept * 2 * length * width + count * recurrent)
            // layers,
            state_values=2 * blocks * kept * width // layers,
            parameters=count * parameters // layers,
            sums=count * (width**2 + 3 * (taps - 1) * width) // layers,
        )

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        count, width = recurrent_heads(config, layer), config.embed_dim
        self.total_heads, self.head_dim = config.num_heads, config.head_dim
        self.num_heads = config.num_heads - count  # those that `Softmax` has
        self.stored_at = _inverse(head_order(config, layer))
        kept = self.num_heads * self.head_dim
        qkv: Any = project(width, (3, kept)) if kept else None
        self.qkv = qkv
        needs_out = config.output_projection
        self.out = project(width, width, output=True) if needs_out else None
        self.rotary, self.transform = base.Rotary(config), None
        self.implementation = config.mixer_options.attention
        self.sequence_chunk, self.causal = config.sequence_chunk, True
        self.recurrent = (
            recurrent_head.RecurrentHeads(config, project, count, rngs=rngs)
            if count
            else None
        )

    def __call__(
        self, x: Activations, seq: base.SeqInfo, state: RecurformerState | None = None
    ) -> tuple[Activations, RecurformerState | None]:
        """[B, L, D] -> [B, L, D] and the state after it."""
        cache, before = (None, None) if state is None else state
        parts = []
        if self.num_heads:
            q, k, v = self.split(x, seq)
            y, cache = self.read(q, k, v, seq, cache)
            y = y.astype(x.dtype)
            whole = collectives.axis_size(collectives.SEQUENCE_AXIS) == 1
            parts.append(remat.name(y, "attended") if whole else y)
        if self.recurrent is not None:
            y, before = self.recurrent(x, seq, before)
            parts.append(remat.name(y.astype(x.dtype), "attended"))
        y = self._project_back(self._in_place(parts))
        return y, None if state is None else RecurformerState(cache, before)

    def _in_place(self, parts):
        """Put all heads, kept ones first, where they belong: [B, L, H, E], of a device."""
        if len(parts) == 1 and self.stored_at is None:
            return parts[0]
        axis = collectives.MODEL_AXIS
        y = jnp.concatenate([collectives.all_gather(y, axis, 2) for y in parts], axis=2)
        if self.stored_at is not None:
            y = jnp.take(y, jnp.array(self.stored_at), axis=2)
        share = self.total_heads // collectives.axis_size(axis)
        first = share * collectives.axis_index(axis)
        return jax.lax.dynamic_slice_in_dim(y, first, share, axis=2)

    def init_state(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> RecurformerState:
        """A cache for `max_len` tokens of the kept heads, and sums of the others."""
        cache = recurrent = None
        if self.num_heads:
            cache = super().init_state(batch_size, max_len, dtype)
        if self.recurrent is not None:
            devices = collectives.axis_size(collectives.MODEL_AXIS)
            heads = (self.total_heads - self.num_heads) // devices
            recurrent = self.recurrent.init_state(batch_size, heads)
        return RecurformerState(cache, recurrent)


def recurrent_heads(config: "ModelConfig", layer: int) -> int:
    """Return how many heads of a layer are recurrent."""
    counts = config.mixer_options.recurrent_heads or (config.num_heads // 2,)
    return counts[layer] if len(counts) > 1 else counts[0]


def head_order(config: "ModelConfig", layer: int) -> tuple[int, ...]:
    """Return the place of each head of a layer, kept ones first."""
    heads = config.num_heads
    order = config.mixer_options.head_order[layer * heads : (layer + 1) * heads]
    return order or tuple(range(heads))


def _inverse(order):
    """Which stored head stands at each place; None where all stand as they are stored."""
    if list(order) == sorted(order):
        return None
    return tuple(sorted(range(len(order)), key=lambda head: order[head]))
