"""ConvLuna (after Yorsh et al. 2024, causal): Luna behind a filter over a few tokens."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.model.mixers import base, luna
from memoryformer.notation import Array
from memoryformer.ops import collectives

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class ConvLuna(luna.Luna):
    """Luna with a filter before the memory and learned temperatures.

        f_t = sum_{i < W} w_i x_{t-W+1+i}     or     max_{i < W} x_{t-i}

    on c and pack, one kernel of W weights a head, inside a document and never ahead of t
    (the published 'same' padding looks ahead; with causal=False this one is centred).
    Both temperatures are learned unless `temperature` says otherwise, as in the published code,
    where the one for reading is never learned, by mistake.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(luna.Luna.Options):
        """And the filter."""

        temperature: str = field(
            "numbers",
            "learn",
            doc="sqrt | unit | learn: tau and tau_pack are sqrt(E), 1, or learned from 1 on.",
        )
        filter: str = field("numbers", "conv", doc="conv | pool: f_t as above.")
        width: int = field("numbers", 4, doc="W, tokens of the filter.")

        def __post_init__(self):
            super().__post_init__()
            name = f"{base.OPTIONS}.filter"
            config_lib.choose(self.filter, ("conv", "pool"), name)
            base.at_least(self, 1, "width")

    EXAMPLES: ClassVar = {"conv_luna": {"num_slots": 64}}
    ABOUT = base.About(
        "luna behind a filter of W tokens, learned temperatures",
        "4 m D + 2 W D",
        "m E + 2 (W - 1) E",
        "the filter",
    )

    @classmethod
    def cost(cls, config: "ModelConfig", length: int) -> base.Cost:
        """2 W D per token more than Luna for a convolution, and the tail that it sees."""
        plain, options = super().cost(config, length), config.mixer_options
        taps = options.width if options.filter == "conv" else 0
        filters = 2 * taps * config.embed_dim * length
        tail = 2 * (options.width - 1) * config.embed_dim
        return dataclasses.replace(
            plain,
            multiply_adds=plain.multiply_adds + filters,
            state_values=plain.state_values + tail,
            parameters=plain.parameters + taps * config.num_heads,
        )

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project, rngs=rngs, layer=layer)
        self.filter_width = config.mixer_options.width
        self.kind = config.mixer_options.filter
        if self.kind == "conv":
            shape, bound = (self.filter_width, self.num_heads), self.filter_width**-0.5
            kernel = jax.random.uniform(
                rngs.params(), shape, minval=-bound, maxval=bound
            )
            self.kernel = nnx.Param(kernel, spec="last_axis", decay=True)  # [W, H]

    def filter(
        self,
        c: Array,
        pack: Array,
        seq: base.SeqInfo,
        state: luna.LunaState | None,
    ) -> tuple[Array, Array, tuple[Array, Array]]:
        """Filter both over the last W tokens of the document."""
        rows = jnp.stack([c, pack], axis=2)  # [B, L, 2, H, E]
        batch_size, length, _, *heads = rows.shape
        if state is None:
            tail = jnp.zeros((batch_size, self.tail_length, 2, *heads), rows.dtype)
            tail_segments = jnp.zeros((batch_size, self.tail_length), jnp.int32)
        else:
            tail = state.tail.reshape(batch_size, -1, 2, *heads).astype(rows.dtype)
            tail_segments = state.tail_segments
        # Padding may stand between two calls of one document, so it takes no place here.
        real = seq.segment_ids != 0
        order = jnp.argsort(~real, axis=1, stable=True)
        place = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        kept = jnp.sum(real, axis=1, keepdims=True)  # the last W - 1 after these
        kept = kept + jnp.arange(self.tail_length)[None]
        new = base.take_rows(rows, order), base.take_rows(seq.segment_ids, order)
        tails = tail, tail_segments
        if collectives.axis_size(collectives.SEQUENCE_AXIS) > 1:
            empty = jax.tree.map(jnp.zeros_like, tails)
            here = (jnp.concatenate(both, 1) for both in zip(empty, new, strict=True))
            last = tuple(base.take_rows(x, kept) for x in here)
            axis = collectives.SEQUENCE_AXIS
            tails = _later_tail(tails, collectives.scan_before(_later_tail, last, axis))
        rows, segments = (
            jnp.concatenate(both, 1) for both in zip(tails, new, strict=True)
        )
        filtered = base.take_rows(self._over_window(rows, segments, length), place)
        if state is not None:
            flat = rows.reshape(*rows.shape[:2], 2, -1)
            tails = base.take_rows(flat, kept), base.take_rows(segments, kept)
        return filtered[:, :, 0], filtered[:, :, 1], tails

    def _over_window(self, rows, segments, length):
        width, total = self.filter_width, None
        own = segments[:, width - 1 :]
        # The window of a token ends at it, or `ahead` tokens after it.
        ahead = 0 if self.causal else width // 2
        rows = jnp.pad(rows, [(0, 0), (0, ahead)] + [(0, 0)] * (rows.ndim - 2))
        segments = jnp.pad(segments, [(0, 0), (0, ahead)])
        for i in range(width):
            first = i + ahead
            window = jax.lax.slice_in_dim(rows, first, first + length, axis=1)
            inside = segments[:, first : first + length] == own
            inside = inside[..., None, None, None]
            if self.kind == "conv":
                weight = self.kernel[...][i].astype(rows.dtype)[
                    None, None, None, :, None
                ]
                term = jnp.where(inside, window * weight, 0)
                total = term if total is None else total + term
            else:
                term = jnp.where(inside, window, -jnp.inf)
                total = term if total is None else jnp.maximum(total, term)
        return total

    @property
    def tail_length(self) -> int:
        """W - 1."""
        return self.filter_width - 1


def _later_tail(left, right):
    """Tail of two runs of tokens, from those of each alone; empty places stand first."""
    (rows, segments), (right_rows, right_segments) = left, right
    size = segments.shape[1]
    count = jnp.sum(right_segments != 0, axis=1, keepdims=True)
    place = jnp.arange(size)[None]
    index = jnp.where(place < size - count, place + count, place + size)
    rows = jnp.concatenate([rows, right_rows], axis=1)
    segments = jnp.concatenate([segments, right_segments], axis=1)
    return base.take_rows(rows, index), base.take_rows(segments, index)
