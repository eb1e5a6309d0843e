"""Kernel attention with a learned phi (Yorsh and Kovalenko 2022): gated layers of a head's own."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.config import field
from memoryformer.model.mixers import base, kernel
from memoryformer.notation import Array
from memoryformer.ops import prefix, random_features

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class TrainedKernel(kernel.KernelAttention):
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
    def cost(cls, config: "ModelConfig", length: int) -> base.Cost:
        """2 E D per token, and the network of queries and of keys."""
        width = config.head_dim
        network = config.num_heads * config.mixer_options.depth
        network *= width * width + 2 * width * max(1, width // 4)
        return kernel.feature_cost(
            config, length, width, per_token=2 * network, parameters=network
        )

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

    def features(
        self, q: Array, k: Array, seq: base.SeqInfo, state: prefix.PrefixState | None
    ) -> tuple[Array, Array, Array | None]:
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
