"""Mamba-2 (Dao and Gu 2024): a state per head that forgets by its own step, behind a short filter.

    [x', B', C'] = silu(filter of W tokens ([x, B, C]))
    dt_t = softplus(dt + dt_bias),      a_t = exp(-dt_t exp(A_log))              one scalar a head
    S_t  = a_t S_{t-1} + dt_t B'_t (x) x'_t,      y_t = C'_t . S_t + D x'_t      S: [N, P]
    out  = W_out( norm(y * silu(z)) )

One call of `ops.prefix` with a decay. `SSD` holds what a head needs beside its projections,
for recurrent heads elsewhere too (recurformer.py). Start at `Mamba2`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.config import field
from memoryformer.model.mixers import base
from memoryformer.notation import Activations, Array, Float
from memoryformer.ops import collectives, prefix, remat, window

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig

NORM_EPS = 1e-5  # added to the mean square, as published
STEPS = (1e-3, 1e-1)  # dt at first, drawn evenly in its logarithm
STEP_FLOOR = 1e-4
DECAYS = (1.0, 16.0)  # exp(A_log) at first, drawn evenly


class SSDState(NamedTuple):
    """The sums [B, H, N, P] and what the filter saw of the last tokens."""

    sums: prefix.PrefixState
    tail: window.Tail


class SSD(nnx.Module):
    """S and y of H heads: the decay, the step and the weight D of a token's own x."""

    def __init__(self, num_heads: int, chunk_size: int, *, rngs: nnx.Rngs):
        self.chunk_size = chunk_size

        def uniform(low, high):
            return jax.random.uniform(
                rngs.params(), (num_heads,), minval=low, maxval=high
            )

        def per_head(value):
            return nnx.Param(value, spec="last_axis", decay=False)

        steps = jnp.exp(uniform(math.log(STEPS[0]), math.log(STEPS[1])))
        steps = jnp.maximum(steps, STEP_FLOOR)
        self.dt_bias = per_head(steps + jnp.log(-jnp.expm1(-steps)))  # softplus^-1
        self.a_log = per_head(jnp.log(uniform(*DECAYS)))
        self.skip = per_head(jnp.ones(num_heads))  # D

    def __call__(
        self,
        x: Float[Array, "B L H P"],
        b: Float[Array, "B L H N"],
        c: Float[Array, "B L H N"],
        dt: Float[Array, "B L H"],
        seq: base.SeqInfo,
        state: prefix.PrefixState | None,
    ) -> tuple[Float[Array, "B L H P"], prefix.PrefixState]:
        """Return y and the sums after it; dt is what the projection puts out."""
        dt_bias, a_log, skip = (
            p[...].astype(x.dtype)[None, None]
            for p in (self.dt_bias, self.a_log, self.skip)
        )
        dt = jax.nn.softplus(dt + dt_bias)
        decay = -dt * jnp.exp(a_log)
        y, state = prefix.prefix(c, dt[..., None] * b, x, seq.segment_ids, state,
                                 decay=decay, chunk_size=self.chunk_size)  # fmt: skip
        return y + skip[..., None] * x, state


def short_filter(taps: window.Taps, kernel: Array, bias: Array) -> Array:
    """silu(bias + sum_i w_i x_{t-W+1+i}), kernel [W, ..] and rows [B, L, ..] of one shape."""
    total = jnp.zeros_like(taps[0][0]) + bias[None, None]
    for (rows, inside), weight in zip(taps, kernel, strict=True):
        inside = inside.reshape(*inside.shape, *(1,) * (rows.ndim - 2))
        total = total + jnp.where(inside, rows * weight[None, None], 0)
    return jax.nn.silu(total)


def filter_params(
    rngs: nnx.Rngs, width: int, shape: tuple[int, ...], spec: str
) -> tuple[nnx.Param, nnx.Param]:
    """Draw a kernel [W, *shape] and a bias [*shape], as a depthwise convolution's."""
    bound = width**-0.5

    def uniform(*shape):
        return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)

    kernel = nnx.Param(uniform(width, *shape), spec=spec, decay=True)
    return kernel, nnx.Param(uniform(*shape), spec=spec, decay=False)


def gated_norm(
    y: Array, z: Array, scale: Array, mean_square: Callable[[Array], Array]
) -> Array:
    """norm(y * silu(z)): divided by the root of `mean_square` and multiplied by `scale`."""
    y = y * jax.nn.silu(z)
    return y * jax.lax.rsqrt(mean_square(y**2) + NORM_EPS) * scale.astype(y.dtype)


class Mamba2(base.SequenceMixer):
    """H heads of width P = `expand` E; B and C, N wide, are the same for all heads.

    It has no code for positions, and always projects back (W_out), from `expand` D to D. The
    published sizes are P = 64, so H = D / 32, and N = 128.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(base.PrefixOptions):
        """And the sizes of state and filter."""

        state_size: int = field("numbers", 64, doc="N, what each value is stored by.")
        expand: int = field("numbers", 2, doc="Width inside, over D.")
        width: int = field("numbers", 4, doc="W, tokens of the filter.")

        def __post_init__(self):
            super().__post_init__()
            base.at_least(self, 1, "state_size", "expand", "width")

    EXAMPLES: ClassVar = {"mamba2": {}}
    ABOUT = base.About(
        "a state [N, P] that decays by its own step, behind a filter of W tokens; I = `expand` D = H P",
        "2 N I + W (I + 2 N)",
        "N P + (W - 1) (I + 2 N) / H",
        "the decay",
    )

    @classmethod
    def projections(cls, config: "ModelConfig") -> dict[str, tuple[int, int]]:
        """z and x; B, C and dt; and back."""
        width, inner = config.embed_dim, config.mixer_options.expand * config.embed_dim
        return {
            "inner": (width, 2 * inner),
            "steps": (width, 2 * config.mixer_options.state_size + config.num_heads),
            "out": (inner, width),
        }

    @classmethod
    def cost(cls, config: "ModelConfig", length: int) -> base.Cost:
        """2 N I per token for the state, written and read, and W (I + 2 N) for the filter."""
        options = config.mixer_options
        inner = options.expand * config.embed_dim
        channels = inner + 2 * options.state_size
        per_token = 2 * options.state_size * inner + options.width * channels
        tail = (options.width - 1) * channels
        return base.Cost(
            multiply_adds=length * per_token,
            state_values=options.state_size * inner + tail,
            parameters=(options.width + 1) * channels + 3 * config.num_heads + inner,
            state_value_bytes=4,
        )

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        options = config.mixer_options
        self.num_heads, self.state_size = config.num_heads, options.state_size
        self.width, self.inner_dim = options.width, options.expand * config.embed_dim
        width, inner = config.embed_dim, self.inner_dim
        self.inner = project(width, (2, inner))
        self.steps = project(width, 2 * self.state_size + self.num_heads)
        self.out = project(inner, width, output=True)
        # Heads are last: the axis that a device has its part of. B and C are everybody's.
        self.kernel, self.bias = filter_params(rngs, self.width, (inner,), "last_axis")
        shared = (2 * self.state_size,)
        self.shared_kernel, self.shared_bias = filter_params(
            rngs, self.width, shared, "whole"
        )
        self.ssd = SSD(self.num_heads, options.prefix_chunk, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((inner,)), spec="last_axis", decay=False)

    def __call__(
        self, x: Activations, seq: base.SeqInfo, state: SSDState | None = None
    ) -> tuple[Activations, SSDState | None]:
        """[B, L, D] -> [B, L, D] and the state after it."""
        inner = base.wide(self.inner(x))  # [B, L, 2, I]
        z, value = inner[:, :, 0], inner[:, :, 1]
        shared, dt = self._shared(x)
        rows = jnp.concatenate([value, shared], axis=-1)
        sums, tail = (None, None) if state is None else state
        rows, tail = window.slide(
            self._filter, rows, seq.segment_ids, tail, width=self.width
        )
        heads = (*x.shape[:2], dt.shape[-1], -1)
        value, b, c = jnp.split(rows, [z.shape[-1], z.shape[-1] + self.state_size], -1)
        b, c = (
            jnp.broadcast_to(v[:, :, None], (*dt.shape, self.state_size))
            for v in (b, c)
        )
        y, sums = self.ssd(value.reshape(heads), b, c, dt, seq, sums)
        y = remat.name(y.astype(x.dtype), "attended")
        y = gated_norm(base.wide(y).reshape(z.shape), z, self.scale[...][None, None],
                       lambda y: collectives.mean(y, collectives.MODEL_AXIS))  # fmt: skip
        y = self.out(y.astype(x.dtype))
        return y, None if state is None else SSDState(sums, tail)

    def _shared(self, x):
        """B and C before the filter [B, L, 2 N], and dt of this device's heads [B, L, H]."""
        steps = base.wide(self.steps(x))
        steps = collectives.all_gather(steps, collectives.MODEL_AXIS, -1)
        heads = self.num_heads // collectives.axis_size(collectives.MODEL_AXIS)
        first = 2 * self.state_size
        first += heads * collectives.axis_index(collectives.MODEL_AXIS)
        dt = jax.lax.dynamic_slice_in_dim(steps, first, heads, axis=-1)
        return steps[..., : 2 * self.state_size], dt

    def _filter(self, taps):
        dtype = taps[0][0].dtype
        kernel = jnp.concatenate([self.kernel[...], self.shared_kernel[...]], axis=-1)
        bias = jnp.concatenate([self.bias[...], self.shared_bias[...]])
        return short_filter(taps, kernel.astype(dtype), bias.astype(dtype))

    def init_state(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> SSDState:
        """Sums and the filter's tail in float32, for any length."""
        devices = collectives.axis_size(collectives.MODEL_AXIS)
        heads, inner = self.num_heads // devices, self.inner_dim // devices
        channels = inner + 2 * self.state_size
        return SSDState(
            prefix.init_state(
                batch_size, heads, self.state_size, self.inner_dim // self.num_heads
            ),
            window.init_tail(batch_size, self.width, channels),
        )
