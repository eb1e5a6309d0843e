"""Multi-head softmax attention with rotary positions and a key-value cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.errors import ConfigError
from memoryformer.model.mixers import base, dape
from memoryformer.notation import Activations, Array
from memoryformer.ops import attention, collectives, ring


class KVCache(NamedTuple):
    """Keys and values of the tokens seen; H is a device's share of the heads.

    By head, so that a product reads them as they lie; M is whole blocks of `over_cache`.
    """

    keys: Array  # [B, H, M, E]
    values: Array  # [B, H, M, E]
    segment_ids: Array  # [B, M] int32; 0 where nothing is stored yet
    length: Array  # [] int32, tokens stored


class Softmax(base.MultiHead):
    """o = MHA(Q(x), K(x), V(x)): every query looks at its own document's past."""

    def __init__(self, config, project: base.Project, *, rngs: nnx.Rngs, layer: int):
        super().__init__(config, project)
        self.rotary = base.Rotary(config)
        self.implementation = config.attention
        self.sequence_chunk = config.sequence_chunk
        self.causal = config.causal
        uses_dape = config.logit_transform == "dape_v2"
        self.transform = dape.DapeV2(config, rngs=rngs) if uses_dape else None

    @staticmethod
    def validate(config) -> None:
        """Refuse a transform of logits that are never formed."""
        transform = config.logit_transform
        if transform != "none" and config.attention != "xla":
            raise ConfigError(
                f"model.attention={config.attention!r} never forms the logits that "
                f"model.logit_transform={transform!r} changes: use attention='xla'."
            )
        if not config.causal and (transform != "none" or config.attention != "xla"):
            raise ConfigError(
                "model.causal=False: only with attention='xla' and logit_transform='none'."
            )
        base.check_positive(config, "dape_width")

    @staticmethod
    def validate_sequence(config) -> None:
        """Refuse what needs a query's logits side by side, or a kernel of one device."""
        if config.logit_transform != "none" or config.attention != "xla":
            raise ConfigError(
                f"mesh: model.attention={config.attention!r} with model.logit_transform="
                f"{config.logit_transform!r} cannot run over a 'sequence' axis: ring "
                "attention needs attention='xla' and logit_transform='none'."
            )

    def __call__(
        self, x: Activations, seq: base.SeqInfo, state: KVCache | None = None
    ) -> tuple[Activations, KVCache | None]:
        """[B, L, D] -> [B, L, D]; with a cache, the new tokens follow the stored ones."""
        batch_size, seq_len = x.shape[:2]
        q, k, v = self.split(x)  # [B, L, H, E]
        q, k = self.rotary(q, k, seq)
        if not self.causal:
            base.refuse_state(state)
        if collectives.axis_size(collectives.SEQUENCE_AXIS) > 1:
            y = self._around(q, k, v, seq, state)
            return self.join_kept(y, x.dtype), None
        if state is None and self.implementation != "xla":
            y = attention.fused(q, k, v, seq.segment_ids, self.implementation)
            return self.join(y, x.dtype), None
        if state is not None and self.transform is None:
            y, state = self._continue(q, k, v, seq, state)
            return self.join(y, x.dtype), state
        if state is None:
            keys, values, key_segments, start = k, v, seq.segment_ids, 0
        else:
            start = state.length
            state = _append(state, k, v, seq.segment_ids)
            keys, values = (
                jnp.swapaxes(a, 1, 2).astype(q.dtype)
                for a in (state.keys, state.values)
            )
            key_segments = state.segment_ids
        query_index = _indices(seq_len, batch_size) + start
        key_index = _indices(keys.shape[1], batch_size)
        place = query_index  # where a query's own key stands
        if self.transform is not None:
            # Its windows run over neighbouring keys: padding must not stand between them.
            real = key_segments != 0
            order = jnp.argsort(~real, axis=1, stable=True)
            past = key_index[:, None] <= query_index[:, :, None]
            place = jnp.sum(past & real[:, None], axis=-1) - 1
            keys, values, key_segments, key_index = (
                base.take_rows(x, order)
                for x in (keys, values, key_segments, key_index)
            )
        key_place = _indices(keys.shape[1], batch_size)

        def attend(q, index, segments, place):
            mask = attention.causal_mask(
                index, segments, key_index, key_segments, causal=self.causal
            )
            transform = None
            if self.transform is not None:
                transform = functools.partial(
                    self.transform, query_index=place, key_index=key_place
                )
            return attention.softmax(q, keys, values, mask, transform)

        queries = (q, query_index, seq.segment_ids, place)
        y = base.by_chunks(attend, queries, self.sequence_chunk)
        return self.join(y, x.dtype), state

    def _continue(self, q, k, v, seq, state):
        """Append [B, L, H, E] to the cache, and read what it then holds."""
        query_index = _indices(q.shape[1], q.shape[0]) + state.length
        state = _append(state, k, v, seq.segment_ids)

        def attend(q, index, segments):
            return attention.over_cache(q, state.keys, state.values, index, segments,
                                        state.segment_ids, state.length)  # fmt: skip

        queries = (q, query_index, seq.segment_ids)
        return base.by_chunks(attend, queries, self.sequence_chunk), state

    def _around(self, q, k, v, seq, state):
        """Read the parts of the row that lie on other devices."""
        if state is not None:
            raise ConfigError("mesh: a `sequence` axis trains; decode without one.")
        return ring.attend(
            q,
            k,
            v,
            seq.segment_ids,
            seq.positions,
            causal=self.causal,
            tile=self.sequence_chunk or ring.TILE,
        )

    def init_state(
        self, batch_size: int, max_len: int, dtype: jnp.dtype = jnp.float32
    ) -> KVCache:
        """Return an empty cache for `max_len` tokens."""
        max_len += -max_len % attention.CACHE_BLOCK
        shape = (batch_size, self.local_heads, max_len, self.head_dim)
        return KVCache(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.zeros((batch_size, max_len), jnp.int32),
            jnp.zeros((), jnp.int32),
        )


def _append(cache: KVCache, k: Array, v: Array, segment_ids: Array) -> KVCache:
    def write(stored, new, axis):
        new = new.astype(stored.dtype)
        return jax.lax.dynamic_update_slice_in_dim(stored, new, cache.length, axis)

    return KVCache(
        write(cache.keys, jnp.swapaxes(k, 1, 2), 2),
        write(cache.values, jnp.swapaxes(v, 1, 2), 2),
        write(cache.segment_ids, segment_ids, 1),
        cache.length + k.shape[1],
    )


def _indices(length: int, batch_size: int) -> Array:
    return jnp.broadcast_to(
        jnp.arange(length, dtype=jnp.int32)[None], (batch_size, length)
    )
