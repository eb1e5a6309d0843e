"""Kernel attention: softmax's exp(q . k) becomes a product of features, phi(q) . phi(k).

    o_t = phi(q_t) . S_t / phi(q_t) . z_t,   S_t = sum phi(k_s) (x) v_s,   z_t = sum phi(k_s)

over the document so far: one call of `ops.prefix`, linear in the length of the sequence, with
a state of fixed size. The variants differ in phi and in how they guard the denominator.

    linear          elu(x) + 1                                    Katharopoulos et al. 2020
    cosformer       [relu(x) cos i, relu(x) sin i], i = pi t / 2M      Qin et al. 2022
    trained_kernel  three gated layers of a head's own            Yorsh and Kovalenko 2022
    performer       exp(w . x - |x|^2 / 2), random w              Choromanski et al. 2020

Start at `KernelAttention`.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.model.mixers import base
from memoryformer.notation import Activations, Array, Float
from memoryformer.ops import prefix, random_features


class KernelAttention(base.MultiHead):
    """The equation above; a subclass defines `features`, `width` and `guard`."""

    Options = base.PrefixOptions

    @classmethod
    def cost(cls, config, length):
        """2 R D per token to write and read the sums, beside what the features cost."""
        return _cost(config, length, config.head_dim)

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project)
        self.chunk_size = config.mixer_options.prefix_chunk

    def __call__(
        self, x: Activations, seq: base.SeqInfo, state: prefix.PrefixState | None = None
    ) -> tuple[Activations, prefix.PrefixState | None]:
        """[B, L, D] -> [B, L, D] and the state after it."""
        q, k, v = (base.wide(a) for a in self.split(x))  # [B, L, H, E]
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


def _cost(config, length, num_features, per_token=0, parameters=0, extra=0):
    """Cost with R features a head, which cost `per_token` and `extra` values of state."""
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
    """phi(x) = elu(x) + 1 after rotary positions; 1e-6 is added to the denominator."""

    EXAMPLES: ClassVar = {"linear": {}}
    ABOUT = base.About("elu(x) + 1 features", "2 E D", "E (E + 1)", "rotary")

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project, rngs=rngs, layer=layer)
        self.rotary = base.Rotary(config)

    def features(self, q, k, seq, state):
        """Rotate first: phi must stay positive."""
        q, k = self.rotary(q, k, seq)
        return jax.nn.elu(q) + 1, jax.nn.elu(k) + 1, None

    def guard(self, z):
        """z + 1e-6."""
        return z + 1e-6


class CosFormer(base.LimitedPositions, KernelAttention):
    """A_ts = relu(q_t) . relu(k_s) cos(pi (t - s) / 2M), its own code for positions.

    M is a constant of the model, not the length of the input as in the published code, so
    that training, prefill and decoding agree; beyond M the weights would be negative.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(base.PrefixOptions):
        """And M."""

        max_len: int = field("numbers", 0, doc="M, positions; 0: model.seq_len.")

        def __post_init__(self):
            super().__post_init__()
            base.at_least(self, 0, "max_len")

    EXAMPLES: ClassVar = {"cosformer": {}}
    ABOUT = base.About(
        "relu features, weighted by cos(pi (t - s) / 2M)",
        "4 E D",
        "2 E (E + 1)",
        "its own, up to `max_len` = M",
    )

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project, rngs=rngs, layer=layer)
        self.max_len = self.max_length(config)

    @classmethod
    def cost(cls, config, length):
        """4 E D per token."""
        return _cost(config, length, 2 * config.head_dim)

    def features(self, q, k, seq, state):
        """[relu(x) cos i, relu(x) sin i], whose products are cos(i_t - i_s)."""
        angle = seq.positions.astype(q.dtype) * (np.pi / (2 * self.max_len))
        angle = angle[..., None, None]  # [B, L, 1, 1]
        turn = jnp.cos(angle), jnp.sin(angle)
        q, k = (
            jnp.concatenate([jax.nn.relu(x) * turn[0], jax.nn.relu(x) * turn[1]], -1)
            for x in (q, k)
        )
        return q, k, None

    def guard(self, z):
        """max(z, 1e-6): a query of which relu leaves nothing reads 0."""
        return jnp.maximum(z, 1e-6)

    @property
    def width(self):
        """2 E."""
        return 2 * self.head_dim

    def init_state(self, batch_size, max_len, dtype=jnp.float32):
        """As in every kernel mixer, but not for more than M tokens."""
        base.check_length(self.max_len, max_len)
        return super().init_state(batch_size, max_len, dtype)


class TrainedKernel(KernelAttention):
    """phi is a small feed-forward network, the same for queries and keys of a head.

        x <- act(x W) * sigmoid(x A B)      W [E, E], orthogonal at first; A, B rank E / 4

    with act = identity but softplus in the last layer, so that phi is positive. The
    published 1 / sqrt(E) after phi cancels in the ratio; its orthogonality penalty is not
    added to the loss.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(base.PrefixOptions):
        """And the size of the network."""

        depth: int = field("numbers", 3, doc="Layers of the network of a head.")

        def __post_init__(self):
            super().__post_init__()
            base.at_least(self, 1, "depth")

    EXAMPLES: ClassVar = {"trained_kernel": {}}
    ABOUT = base.About(
        "a head's own gated network as features", "2 E D + 9 E D", "E (E + 1)", "rotary"
    )

    @classmethod
    def cost(cls, config, length):
        """2 E D per token, and the network of queries and of keys."""
        width = config.head_dim
        network = config.num_heads * config.mixer_options.depth
        network *= width * width + 2 * width * max(1, width // 4)
        return _cost(config, length, width, per_token=2 * network, parameters=network)

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project, rngs=rngs, layer=layer)
        self.rotary = base.Rotary(config)
        self.depth = config.mixer_options.depth
        width, heads = config.head_dim, config.num_heads
        rank = max(1, width // 4)

        def normal(*shape):
            return jax.random.normal(rngs.params(), shape) * shape[1] ** -0.5

        # Heads last: the axis that a device has its part of.
        shape = (self.depth, heads)
        w = random_features.orthogonal(rngs.params(), width, shape)
        w = jnp.moveaxis(w, 1, 3)  # [depth, E, E, H]
        a = normal(self.depth, width, rank, heads)
        b = normal(self.depth, rank, width, heads)
        self.w, self.a, self.b = (
            nnx.Param(weights, spec="last_axis", decay=True) for weights in (w, a, b)
        )

    def features(self, q, k, seq, state):
        """Both through the network, after rotary positions."""
        q, k = self.rotary(q, k, seq)
        return self._network(q), self._network(k), None

    def _network(self, x):
        layers = zip(self.w[...], self.a[...], self.b[...], strict=True)
        for i, (w, a, b) in enumerate(layers):
            value = jnp.einsum("blhe,efh->blhf", x, w)
            gate = jnp.einsum("blhe,erh->blhr", x, a)
            gate = jax.nn.sigmoid(jnp.einsum("blhr,rfh->blhf", gate, b))
            last = i == self.depth - 1
            x = (jax.nn.softplus(value) if last else value) * gate
        return x


class Performer(KernelAttention):
    """Random features of the softmax kernel (FAVOR+), causal and exact in its sums.

    Every query is shifted by its own largest log feature, every key by the running maximum
    of its document, which the state carries: nothing of the future enters, unlike in the
    published code (a maximum over all positions, a seed from the sum of all queries, a
    denominator raised to 1e-6).

    The features w are no parameters and are not stored: they follow from a seed, the number
    of the draw and the layer. A model outside a run uses those of its config,
    `performer_seed` and `performer_draw`; a run adds its own seed and its schedule (`in_use`),
    and whatever reads a checkpoint takes the config after its last step (`with_draw`): a
    model scores well only with the features that it was trained on.
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
    def cost(cls, config, length):
        """4 M D per token: projections of queries and keys, and sums; a running maximum."""
        num_features = config.mixer_options.num_features
        projections = 2 * num_features * config.embed_dim
        return _cost(config, length, num_features, per_token=projections, extra=1)

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project, rngs=rngs, layer=layer)
        self.rotary = base.Rotary(config)
        self.num_features = config.mixer_options.num_features
        self.own = (*in_use(config), config.num_layers)
        self.layer = layer

    @classmethod
    def check(cls, config) -> None:
        """Refuse a seed or a draw out of range, and blocks that must be alike."""
        if config.scan_layers:
            raise ConfigError(
                "model.scan_layers=True: the performer's random features differ by layer "
                "and are no parameters; use scan_layers=False."
            )
        for name in ("performer_seed", "performer_draw"):
            if not 0 <= getattr(config, name) < 2**31:
                raise ConfigError(
                    f"model.{name}={getattr(config, name)}: must be in [0, 2^31)."
                )

    def features(self, q, k, seq, state):
        """exp(log features - shift)."""
        q, k = self.rotary(q, k, seq)
        rows = self.rows(seq)
        q, k = (random_features.log_features(x, rows) for x in (q, k))
        highest = jax.lax.stop_gradient(jnp.max(k, axis=-1))  # [B, L, H]
        shift = prefix.running_max(highest, seq.segment_ids, state)
        q = q - jax.lax.stop_gradient(jnp.max(q, axis=-1, keepdims=True))
        # The shift of padding is not its own: keep its exponent from overflowing.
        real = (seq.segment_ids != 0)[..., None, None]
        k = jnp.where(real, k - shift[..., None], 0)
        return jnp.exp(q), jnp.exp(k), shift

    def rows(self, seq: base.SeqInfo) -> Array:
        """The w in use: [M, E], the same for all heads of a layer."""
        features = seq.features
        if features is None:
            features = _fixed_rows(*self.own, self.num_features, self.head_dim)
        return features[self.layer]

    @property
    def width(self):
        """The number of random features."""
        return self.num_features


def in_use(config, seed=0, step=0):
    """Return (seed, number) of the draw in use after `step` steps of a run with `seed`.

    seed = performer_seed + the run's, number = performer_draw + (step - 1) // redraw_every:
    after a step its features stay in use until the next one. All may be traced.
    """
    seed = (config.performer_seed + seed) & 0x7FFFFFFF
    number = config.performer_draw
    redraw_every = config.mixer_options.redraw_every
    if redraw_every:
        done = step - 1 + (step == 0)  # the last step's index
        number = number + done // redraw_every
    return seed, number


def draw(config, seed: Array | int, step: Array | int) -> Float[Array, "N M E"]:
    """Draw the rows w of every layer that are in use after `step` steps (`in_use`).

    Of plain numbers a constant, a numpy array of no mesh.
    """
    sizes = config.num_layers, config.mixer_options.num_features, config.head_dim
    constant = isinstance(seed, int) and isinstance(step, int)
    return (_fixed_rows if constant else _rows)(*in_use(config, seed, step), *sizes)


@functools.partial(jax.jit, static_argnames=("num_layers", "num_features", "head_dim"))
def _rows(seed, number, num_layers, num_features, head_dim):
    def of_layer(layer):
        key = jax.random.fold_in(jax.random.key(seed), layer)
        key = jax.random.fold_in(key, number)
        return random_features.draw(key, num_features, head_dim)

    return jax.vmap(of_layer)(jnp.arange(num_layers))


@functools.lru_cache(maxsize=16)
def _fixed_rows(seed, number, num_layers, num_features, head_dim):
    # Also while a program of a mesh is traced: these numbers are of no mesh.
    no_mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with no_mesh, jax.ensure_compile_time_eval():
        rows = _rows(seed, number, num_layers, num_features, head_dim)
        return np.asarray(rows)
