"""ConvLuna (after Yorsh et al. 2024, causal): Luna behind a filter over a few tokens."""

import dataclasses
import functools
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.model.mixers import base, luna
from memoryformer.notation import Array
from memoryformer.ops import window

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
        tail = None
        if state is not None:
            shape = (rows.shape[0], self.tail_length, *rows.shape[2:])
            tail = window.Tail(state.tail.reshape(shape), state.tail_segments)
        ahead = 0 if self.causal else self.filter_width // 2
        filtered, tail = window.slide(self._over_window, rows, seq.segment_ids, tail,
                                      width=self.filter_width, ahead=ahead)  # fmt: skip
        flat = tail.rows.reshape(*tail.rows.shape[:2], 2, -1)
        return filtered[:, :, 0], filtered[:, :, 1], (flat, tail.segment_ids)

    def _over_window(self, taps: window.Taps) -> Array:
        terms = []
        for i, (rows, inside) in enumerate(taps):
            inside = inside[..., None, None, None]
            if self.kind == "conv":
                weight = self.kernel[...][i].astype(rows.dtype)
                weight = weight[None, None, None, :, None]
                terms.append(jnp.where(inside, rows * weight, 0))
            else:
                terms.append(jnp.where(inside, rows, -jnp.inf))
        add = jnp.add if self.kind == "conv" else jnp.maximum
        return functools.reduce(add, terms)

    @property
    def tail_length(self) -> int:
        """W - 1."""
        return self.filter_width - 1
