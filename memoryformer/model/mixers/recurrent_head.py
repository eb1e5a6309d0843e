"""Recurrent heads as wide as heads of attention, for mixers that have both: see recurformer.py."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import nnx

from memoryformer.model.mixers import base, mamba2
from memoryformer.notation import Activations, Array
from memoryformer.ops import prefix, window

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class RecurrentHeads(nnx.Module):
    """N recurrent heads of width E; one projection of D makes q, k, v, z and dt of each."""

    def __init__(
        self,
        config: "ModelConfig",
        project: base.Project,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
    ):
        options = config.mixer_options
        self.width, self.head_dim = options.width, config.head_dim
        values = num_heads * self.head_dim
        # Head by head, as a device has its share of them.
        self.inputs = project(config.embed_dim, num_heads * (4 * self.head_dim + 1))
        self.kernel, self.bias = mamba2.filter_params(
            rngs, self.width, (3, values), "last_axis"
        )
        self.ssd = mamba2.SSD(num_heads, options.prefix_chunk, rngs=rngs)
        self.gate = nnx.Param(jnp.zeros(values), spec="last_axis", decay=False)
        self.scale = nnx.Param(jnp.ones(values), spec="last_axis", decay=False)

    def __call__(
        self, x: Activations, seq: base.SeqInfo, state: mamba2.SSDState | None
    ) -> tuple[Array, mamba2.SSDState]:
        """[B, L, D] -> what the heads put out, [B, L, N, E], and the state after it."""
        size = 4 * self.head_dim + 1
        inputs = base.wide(self.inputs(x)).reshape(*x.shape[:2], -1, size)
        values, dt = (
            inputs[..., :-1].reshape(*inputs.shape[:-1], 4, -1),
            inputs[..., -1],
        )
        rows = jnp.moveaxis(values[..., :3, :], 3, 2)  # [B, L, 3, N, E]
        z = values[..., 3, :]
        sums, tail = (None, None) if state is None else state
        flat = rows.reshape(*rows.shape[:3], -1)
        flat, tail = window.slide(
            self._filter, flat, seq.segment_ids, tail, width=self.width
        )
        c, b, value = jnp.moveaxis(flat.reshape(rows.shape), 2, 0)
        y, sums = self.ssd(value, b, c, dt, seq, sums)
        shape = (1, 1, *z.shape[2:])
        gate, scale = (p[...].reshape(shape) for p in (self.gate, self.scale))
        y = mamba2.gated_norm(y, z + gate.astype(z.dtype), scale,
                              lambda y: jnp.mean(y, axis=-1, keepdims=True))  # fmt: skip
        return y, mamba2.SSDState(sums, tail)

    def init_state(self, batch_size: int, num_heads: int) -> mamba2.SSDState:
        """Return the state before any token, of a device's heads."""
        width = self.head_dim
        return mamba2.SSDState(
            prefix.init_state(batch_size, num_heads, width, width),
            window.init_tail(batch_size, self.width, 3, num_heads * width),
        )

    def _filter(self, taps):
        dtype = taps[0][0].dtype
        kernel, bias = self.kernel[...].astype(dtype), self.bias[...].astype(dtype)
        return mamba2.short_filter(taps, kernel, bias)
