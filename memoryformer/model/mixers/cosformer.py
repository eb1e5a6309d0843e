"""cosFormer (Qin et al. 2022): kernel attention whose weights fall with the distance."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memoryformer.config import field
from memoryformer.model.mixers import base, kernel, limited
from memoryformer.notation import Array
from memoryformer.ops import prefix

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class CosFormer(limited.LimitedPositions, kernel.KernelAttention):
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
    def cost(cls, config: "ModelConfig", length: int) -> base.Cost:
        """4 E D per token."""
        return kernel.feature_cost(config, length, 2 * config.head_dim)

    def features(
        self, q: Array, k: Array, seq: base.SeqInfo, state: prefix.PrefixState | None
    ) -> tuple[Array, Array, Array | None]:
        """[relu(x) cos i, relu(x) sin i], whose products are cos(i_t - i_s)."""
        angle = seq.positions.astype(q.dtype) * (np.pi / (2 * self.max_len))
        angle = angle[..., None, None]  # [B, L, 1, 1]
        turn = jnp.cos(angle), jnp.sin(angle)
        q, k = (
            jnp.concatenate([jax.nn.relu(x) * turn[0], jax.nn.relu(x) * turn[1]], -1)
            for x in (q, k)
        )
        return q, k, None

    def guard(self, z: Array) -> Array:
        """max(z, 1e-6): a query of which relu leaves nothing reads 0."""
        return jnp.maximum(z, 1e-6)

    @property
    def width(self) -> int:
        """2 E."""
        return 2 * self.head_dim

    def init_state(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> prefix.PrefixState:
        """As in every kernel mixer, but not for more than M tokens."""
        limited.check_length(self.max_len, max_len)
        return super().init_state(batch_size, max_len, dtype)
