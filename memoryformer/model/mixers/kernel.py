"""Kernel attention: softmax's exp(q . k) becomes a product of features, phi(q) . phi(k).

    o_t = phi(q_t) . S_t / phi(q_t) . z_t,   S_t = sum phi(k_s) (x) v_s,   z_t = sum phi(k_s)

over the document so far: one call of `ops.prefix`, linear in the length of the sequence, with
a state of fixed size. The variants differ in phi and in how they guard the denominator;
cosformer and trained_kernel have files of their own.

    linear          elu(x) + 1                                    Katharopoulos et al. 2020
    cosformer       [relu(x) cos i, relu(x) sin i], i = pi t / 2M      Qin et al. 2022
    trained_kernel  three gated layers of a head's own            Yorsh and Kovalenko 2022
    performer       exp(w . x - |x|^2 / 2), random w              Choromanski et al. 2020

Start at `KernelAttention`.
"""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.model.mixers import base
from memoryformer.notation import Activations, Array, Params
from memoryformer.ops import document_max, prefix, random_features

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class KernelAttention(base.MultiHead):
    """The equation above; a subclass defines `features`, `width` and `guard`."""

    Options = base.PrefixOptions
    HAS_TOKEN_ROWS = True

    @classmethod
    def cost(cls, config: "ModelConfig", length: int) -> base.Cost:
        """2 R D per token to write and read the sums, beside what the features cost."""
        return feature_cost(config, length, config.head_dim)

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project, rngs=rngs)
        self.chunk_size = config.mixer_options.prefix_chunk

    def __call__(
        self, x: Activations, seq: base.SeqInfo, state: prefix.PrefixState | None = None
    ) -> tuple[Activations, prefix.PrefixState | None]:
        """[B, L, D] -> [B, L, D] and the state after it."""
        q, k, v = (base.wide(a) for a in self.split(x, seq))  # [B, L, H, E]
        q, k, shift = self.features(q, k, seq, state)  # [B, L, H, R], shift [B, L, H]
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        o, new_state = prefix.prefix(
            q, k, v, seq.segment_ids, state, shift=shift, chunk_size=self.chunk_size
        )
        y = _ratio(o[..., :-1], self.guard(o[..., -1:]))
        return self.join(y, x.dtype), None if state is None else new_state

    def features(
        self, q: Array, k: Array, seq: base.SeqInfo, state: prefix.PrefixState | None
    ) -> tuple[Array, Array, Array | None]:
        """Return phi(q), phi(k) and the shift of the sums, if they need one."""
        raise NotImplementedError

    def guard(self, z: Array) -> Array:
        """Keep a denominator from being 0; one below 1e-30 reads next to nothing."""
        return jnp.where(z < 1e-30, 1, z)

    @property
    def width(self) -> int:
        """R, the number of features."""
        return self.head_dim

    def init_state(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> prefix.PrefixState:
        """Sums [B, H, R, E + 1] in float32, for any length."""
        return prefix.init_state(
            batch_size, self.local_heads, self.width, self.head_dim + 1
        )


def feature_cost(
    config: "ModelConfig",
    length: int,
    num_features: int,
    per_token: int = 0,
    parameters: int = 0,
    extra: int = 0,
) -> base.Cost:
    """Count kernel attention with R features a head, which cost `per_token` and `extra` values of state."""
    per_token += 2 * num_features * config.embed_dim
    return base.Cost(
        multiply_adds=length * per_token,
        state_values=config.num_heads * (num_features * (config.head_dim + 1) + extra),
        parameters=parameters,
        state_value_bytes=4,
    )


def _ratio(numerator: Array, z: Array) -> Array:
    """numerator / z with the gradient (dn - y dz) / z: autodiff's 1 / z^2 overflows."""
    fixed = jax.lax.stop_gradient(z)
    y = jax.lax.stop_gradient(numerator / z)
    return (numerator - y * (z - fixed)) / fixed


class Linear(KernelAttention):
    """phi(x) = elu(x) + 1 after rotary positions; 1e-6 is added to the denominator.

    With `feature_map='identity'`, o_t = sum_s (q_t . k_s) v_s: phi is the identity and there is
    no denominator, as in theory (`memoryformer.identifiability`).
    """

    @dataclasses.dataclass(frozen=True)
    class Options(base.PrefixOptions):
        """And what phi is."""

        feature_map: str = field(
            "numbers", "elu", doc="elu | identity: phi; identity has no denominator."
        )

        def __post_init__(self):
            super().__post_init__()
            config_lib.choose(
                self.feature_map, ("elu", "identity"), f"{base.OPTIONS}.feature_map"
            )

    EXAMPLES: ClassVar = {"linear": {}}
    ABOUT = base.About("elu(x) + 1 features", "2 E D", "E (E + 1)", "rotary")

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project, rngs=rngs, layer=layer)
        self.rotary = base.Rotary(config)
        self.is_identity = config.mixer_options.feature_map == "identity"

    def features(
        self, q: Array, k: Array, seq: base.SeqInfo, state: prefix.PrefixState | None
    ) -> tuple[Array, Array, Array | None]:
        """Rotate first: phi must stay positive."""
        q, k = self.rotary(q, k, seq)
        if self.is_identity:
            return q, k, None
        return jax.nn.elu(q) + 1, jax.nn.elu(k) + 1, None

    def guard(self, z: Array) -> Array:
        """z + 1e-6; 1 where there is no denominator."""
        return jnp.ones_like(z) if self.is_identity else z + 1e-6


class Performer(KernelAttention):
    """Random features of the softmax kernel (FAVOR+), causal and exact in its sums.

    Every query is shifted by its own largest log feature, every key by the running maximum
    of its document, which the state carries: nothing of the future enters, unlike in the
    published code (a maximum over all positions, a seed from the sum of all queries, a
    denominator raised to 1e-6).

    The features w are parameters that are not trained: drawn with the model, `redraw` puts
    others in their place while it trains, and checkpoints hold them.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(base.PrefixOptions):
        """And how many random features there are, for how long."""

        num_features: int = field("numbers", 256, doc="M, random features of a layer.")
        redraw_every: int = field(
            "numbers", 0, doc="Training steps between two draws of them; 0: never."
        )

        def __post_init__(self):
            super().__post_init__()
            base.at_least(self, 1, "num_features")
            base.at_least(self, 0, "redraw_every")

    EXAMPLES: ClassVar = {  # the paper states neither; 'matched' to its Table 2 at 410M: 26.7G
        "performer": {"num_features": 256, "redraw_every": 1000},
        "performer_matched": {"num_features": 112, "redraw_every": 1000},
    }
    ABOUT = base.About("M random features (FAVOR+)", "4 M D", "M (E + 1) + 1", "rotary")

    @classmethod
    def cost(cls, config: "ModelConfig", length: int) -> base.Cost:
        """4 M D per token: projections of queries and keys, and sums; a running maximum."""
        num_features = config.mixer_options.num_features
        projections = 2 * num_features * config.embed_dim
        return feature_cost(
            config, length, num_features, per_token=projections, extra=1
        )

    @classmethod
    def redraw(
        cls, config: "ModelConfig", fixed: Params, seed: Array | int, step: Array
    ) -> Params:
        """Draw other random features every `redraw_every` steps."""
        every = config.mixer_options.redraw_every
        if not every:
            return fixed
        due = (step % every == 0) & (step > 0)

        def draw():  # and keep what else is fixed: the mixes of memory layers
            rows = traverse_util.flatten_dict(random_rows(config, seed, step // every))
            flat = traverse_util.flatten_dict(fixed) | rows
            return traverse_util.unflatten_dict(flat)

        return jax.lax.cond(due, draw, lambda: fixed)

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project, rngs=rngs, layer=layer)
        self.rotary = base.Rotary(config)
        self.num_features = config.mixer_options.num_features
        # The key itself, and none of its stream: whatever else is drawn stays the same.
        key = _row_key(rngs.params.key[...], layer, 0)
        rows = random_features.draw(key, self.num_features, self.head_dim)
        self.random_rows = nnx.Param(rows, spec="whole", trained=False)

    def features(
        self, q: Array, k: Array, seq: base.SeqInfo, state: prefix.PrefixState | None
    ) -> tuple[Array, Array, Array | None]:
        """exp(log features - shift)."""
        q, k = self.rotary(q, k, seq)
        rows = self.random_rows[...]  # [M, E], the same for all heads
        q, k = (random_features.log_features(x, rows) for x in (q, k))
        highest = jax.lax.stop_gradient(jnp.max(k, axis=-1))  # [B, L, H]
        shift = document_max.so_far(highest, seq.segment_ids, state)
        q = q - jax.lax.stop_gradient(jnp.max(q, axis=-1, keepdims=True))
        # The shift of padding is not its own: keep its exponent from overflowing.
        real = (seq.segment_ids != 0)[..., None, None]
        k = jnp.where(real, k - shift[..., None], 0)
        return jnp.exp(q), jnp.exp(k), shift

    @property
    def width(self) -> int:
        """The number of random features."""
        return self.num_features


def random_rows(
    config: "ModelConfig", seed: Array | int, number: Array | int
) -> Params:
    """Draw the rows w of every layer, as a part of the parameters; both may be traced."""

    def rows(layer):
        key = _row_key(jax.random.key(seed), layer, number)
        return random_features.draw(
            key, config.mixer_options.num_features, config.head_dim
        )

    layers = range(config.num_layers)
    return {"blocks": {str(i): {"mixer": {"random_rows": rows(i)}} for i in layers}}


def _row_key(key, layer, number):
    return jax.random.fold_in(jax.random.fold_in(key, layer), number)
