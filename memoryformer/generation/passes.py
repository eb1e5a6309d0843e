"""A compiled loop that reads tokens with their drafts, several by one pass over the weights.

    t                 chosen after what was read, as always
    d_1 .. d_N        drafted: what followed the text's last tokens where they stood before
    l_0 .. l_N        logits after t, d_1, .., d_N, of one pass (`model.positions`)
    a_j               chosen from l_j with the key that token would be drawn with
    kept              t, d_1 .. d_m, where d_j = a_{j-1} for j = 1 .. m; the state is set back

The text so far and what is left of it stay on the device, so that a call can begin before the
tokens of the one before are known here. Start at `Passes`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from memoryformer.generation import drafts, sampler
from memoryformer.model import mixers, positions
from memoryformer.notation import AnyArray, Array

MAX_DRAFT = positions.MAX_POSITIONS - 1  # N


class Context(NamedTuple):
    """What a call goes on from: the text so far, and how many tokens it may still get."""

    read: sampler.Read
    # int32 [M]: `length` are read, and there is room for what is left.
    history: AnyArray
    length: ArrayLike  # int32
    left: ArrayLike  # int32


class Passes:
    """The compiled loop of one generator and number of drafted tokens."""

    def __init__(self, generator: sampler.Generator, num_drafts: int):
        self._generator, self._width = generator, num_drafts + 1
        self._loop = jax.jit(self._read, donate_argnums=(1, 2, 5))

    def context(
        self, read: sampler.Read, text: np.ndarray, length: int, left: int
    ) -> Context:
        """Begin after the first `length` tokens of a text: int32 [M], with room for `left`."""
        # Arrays of numpy's, which the call itself takes over: XLA's take longer to make.
        history = np.zeros(len(text) + self._width, np.int32)  # a draft may be cut off
        history[: len(text)] = text
        return Context(read, history, np.int32(length), np.int32(left))

    def __call__(
        self,
        context: Context,
        sampling: sampler.SamplingConfig,
        least: int = sampler.LOOP,
    ) -> tuple[Array, Array, Context]:
        """Choose and read `least` tokens or a few more, but no more than are left.

        Returns them, int32 [LOOP + N + 1]; int32 [3]: how many there are, the passes over
        drafts, and the drafted tokens that were right; and what goes on.
        """
        read, *text = context
        tokens, counts, *after = self._loop(
            self._generator.params, *read, *text, np.int32(least), *sampling.knobs
        )
        read = sampler.Read(*after[: len(read)])
        return tokens, counts, Context(read, *after[len(read) :])

    def _read(
        self, params, state, logits, position, keys, history, length, left, least,
        temperature, top_p,
    ):  # fmt: skip
        most = sampler.LOOP + self._width
        keys, draws = _key_chain(keys, most)
        knobs, least = (temperature, top_p), jnp.minimum(least, left)
        choose = functools.partial(self._choose, params, draws, knobs)
        text = _Text(
            history, length, choose(logits, 0), jnp.zeros(self._width - 1, jnp.int32),
            jnp.bool(False), jnp.zeros(most, jnp.int32), jnp.zeros(3, jnp.int32),
        )  # fmt: skip
        carry = (state, logits, position, text.drafted_on(left))

        def steps(width, carry):
            step = functools.partial(self._step, params, width, left, choose)
            wanted = width > 1
            return jax.lax.while_loop(
                lambda c: (c[-1].counts[0] < least) & (c[-1].worth == wanted),
                step,
                carry,
            )

        # Loops of both kinds of step and not a `cond`, for which XLA copies caches.
        carry = jax.lax.while_loop(
            lambda c: c[-1].counts[0] < least,
            lambda c: steps(1, steps(self._width, c)),
            carry,
        )
        *read, text = carry
        count = text.counts[0]
        read.append(keys[count][None])
        return text.tokens, text.counts, *read, text.history, text.length, left - count

    def _choose(self, params, draws, knobs, after, place):
        """Choose from each row of `after`, with the keys from `place` on: int32 [rows]."""
        draws = jax.lax.dynamic_slice_in_dim(draws, place, after.shape[0])
        return self._generator.choose_tokens(params, after, draws, *knobs)[:, 0]

    def _step(self, params, width, left, choose, carry):
        """Read a token and width - 1 drafted ones, and choose the next."""
        state, logits, position, text = carry
        generator = self._generator
        row = jnp.concatenate([text.token, text.drafted])[None, :width]
        places = position[:, None] + jnp.arange(width)[None]
        seq = mixers.SeqInfo(places, jnp.ones_like(row))
        if width == 1:
            logits, state = generator.read_tokens(params, state, row, seq)
            after, right = logits, jnp.int32(0)
        else:
            config = generator.model_config
            x, states = positions.read(config, params, state, row, seq)
            after = generator.to_choose(params, x)
        chosen = choose(after, text.counts[0] + 1)
        if width > 1:
            right = jnp.cumprod(chosen[:-1] == text.drafted).sum().astype(jnp.int32)
            state = positions.keep(states, width, right + 1)
            logits = after[right][None]
        text = text.read(row[0], right, chosen[right][None]).drafted_on(left)
        return state, logits, position + right + 1, text


class _Text(NamedTuple):
    """What a call knows of its text between steps."""

    history: Array  # `length` tokens, then `token` and `drafted`
    length: Array
    token: Array  # [1], chosen and not read
    drafted: Array  # [N]
    worth: Array  # whether they are to be read with it
    tokens: Array  # that this call has read, counts[0] of them
    counts: Array  # those of `Passes`

    def drafted_on(self, left):
        """With the draft that follows `token`, unless it could be more than is left."""
        history = jax.lax.dynamic_update_slice(self.history, self.token, (self.length,))
        count = len(self.drafted)
        drafted: Any
        drafted, worth = drafts.draft(history, self.length + 1, count)
        history = jax.lax.dynamic_update_slice(history, drafted, (self.length + 1,))
        worth &= self.counts[0] + count < left
        return self._replace(history=history, drafted=drafted, worth=worth)

    def read(self, row, right, token):
        """After a step over `row`, of whose drafted tokens the first `right` were right."""
        tokens = jax.lax.dynamic_update_slice(self.tokens, row, (self.counts[0],))
        passes = jnp.int32(len(row) > 1)
        return self._replace(
            length=self.length + right + 1,
            token=token,
            tokens=tokens,
            counts=self.counts + jnp.stack([right + 1, passes, right]),
        )


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees of arrays, keys among them, are equal in all bits."""
    leaves = map(jax.tree.leaves, (a, b))
    return all(np.array_equal(_bits(x), _bits(y)) for x, y in zip(*leaves, strict=True))


def _key_chain(keys: Array, count: int) -> tuple[Array, Array]:
    """The keys after 0 .. count splits of keys [1], and what the splits give to draw with."""

    def split(keys, _):
        after, draw = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        return after, (keys[0], draw[0])

    last, (before, draws) = jax.lax.scan(split, keys, length=count)
    return jnp.concatenate([before, last]), draws


def _bits(array: Any) -> np.ndarray:
    """The bytes of an array, or of keys."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array).reshape(-1).view(np.uint8)
