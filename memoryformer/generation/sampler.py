"""Sampling: read the prompt once, then one token at a time through the mixers' state.

    p(token) ~ softmax(logits / temperature) over the smallest set with mass >= top_p

Temperature 0 takes the most likely token, which equals the argmax of the full forward pass.
A compiled loop chooses and reads up to LOOP tokens; between them nothing goes through
Python. Weights may be stored narrower (`model.narrow`). Start at `Generator`; a new way to
choose is a field of `SamplingConfig`, a line of `choosing.choose`, a flag in
`generation.__main__` and an entry in `harness.encoding`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer import model as model_lib
from memoryformer.errors import ConfigError
from memoryformer.generation import choosing
from memoryformer.model import fused, implementations, mixers, narrow, recurrence
from memoryformer.notation import Array, Params
from memoryformer.ops.lookup import screened

# Prompts are read in pieces of at most this many tokens, each a power of two, so that prompts
# of any length share a few compiled programs. A piece brings each row that it wants once.
PREFILL = 512
CACHE_STEP = 128  # caches grow in these steps, for the same reason
# Tokens of one call: the compiled loop comes back to Python only between calls.
LOOP = 16


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen, and when to stop."""

    max_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens}: must be >= 1.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature={self.temperature}: must be a finite number >= 0."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be in (0, 1].")
        if not -(2**31) <= self.seed < 2**31:
            raise ConfigError(f"seed={self.seed}: must be a number of 32 bits.")

    @property
    def knobs(self) -> tuple[np.float32, np.float32]:
        """What `choose` takes: (temperature, top_p). As arrays they would take longer to make."""
        return np.float32(self.temperature), np.float32(self.top_p)


class Read(NamedTuple):
    """What was read so far, and all that goes on from it."""

    state: mixers.State
    logits: Array  # [B, V], of the next token
    position: Array  # [B] int32, tokens read of each row
    keys: Array  # [B], to draw with


class Generator:
    """Continue token sequences with one model; compiled steps are kept between calls.

    params: as they are read.
    """

    def __init__(
        self,
        model_config: model_lib.ModelConfig,
        params: Params,
        kinds: narrow.WeightKinds | None = None,
    ):
        self.model_config = model_config = implementations.readable(model_config)
        # On CPU float32 weights are laid out for reading too.
        if kinds is not None or jax.default_backend() == "cpu":
            kinds = kinds or narrow.WeightKinds()
            params = narrow.prepare(model_config, params, kinds)
        weights = model_config.vocab_size * model_config.embed_dim
        is_screened = kinds is not None and kinds.head == narrow.SCREENED
        self._screened = is_screened and weights >= screened.FEWEST_WEIGHTS
        self.params = jax.tree.map(jnp.asarray, params)
        self._empty = jax.jit(self._make_state, static_argnums=(1, 2))
        self._prefill = jax.jit(self.read_tokens, donate_argnums=1)
        self._decode = jax.jit(self._sample_and_read, donate_argnums=(1, 2))

    def read_tokens(
        self, params: Params, state: mixers.State, tokens: Array, seq: mixers.SeqInfo
    ) -> tuple[Array, mixers.State]:
        """Read tokens [B, L]: what the next is chosen from (`to_choose`), and the state."""
        model = model_lib.merge(self.model_config, params)
        x, state = fused.features(self.model_config, model, tokens, seq, state)
        return self.to_choose(params, x[:, -1]), state

    def to_choose(self, params: Params, x: Array) -> Array:
        """What `choose_tokens` takes of features [B, D]: their logits [B, V].

        Of a screened head the features, for `choose_tokens` reads the head.
        """
        if self._screened:
            return x
        return model_lib.merge(self.model_config, params).logits(x)

    def choose_tokens(
        self,
        params: Params,
        carried: Array,
        keys: Array,
        temperature: Array,
        top_p: Array,
    ) -> Array:
        """Choose a token for each row of what `to_choose` gives: int32 [B, 1]."""
        choose_each = jax.vmap(choosing.choose, (0, 0, None, None))
        if not self._screened:
            return choose_each(carried[:, None], keys, temperature, top_p)
        head: Any = model_lib.merge(self.model_config, params).head

        def sampled(x):
            return choose_each(head(x)[:, None], keys, temperature, top_p)

        def greedy(x):
            return head.most_likely(x)[:, None]

        return jax.lax.cond(temperature > 0, sampled, greedy, carried)

    def _sample_and_read(
        self, params, state, logits, position, keys, count, temperature, top_p
    ):
        """Choose and read `count` <= LOOP tokens: int32 [LOOP, B] and what goes on."""

        def next_token(i, carry):
            state, logits, position, keys, tokens = carry
            keys, draws = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
            token = self.choose_tokens(
                params, logits, draws, temperature, top_p
            )  # [B, 1]
            seq = mixers.SeqInfo(position[:, None], jnp.ones_like(token))
            logits, state = self.read_tokens(params, state, token, seq)
            tokens = tokens.at[i].set(token[:, 0])
            return state, logits, position + 1, keys, tokens

        tokens = jnp.zeros((LOOP, logits.shape[0]), jnp.int32)
        carry = (state, logits, position, keys, tokens)
        *carry, tokens = jax.lax.fori_loop(0, count, next_token, carry)
        return tokens, *carry

    def stream(
        self, prompt: Sequence[int], sampling: SamplingConfig, eot_id: int = -1
    ) -> Iterator[int]:
        """Yield the tokens that follow `prompt`, up to and without `eot_id`."""
        for (token,) in self.stream_batch([prompt], sampling):
            if token == eot_id:
                return
            yield token

    def stream_batch(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig
    ) -> Iterator[list[int]]:
        """Yield one token for each of `prompts`, `sampling.max_tokens` times.

        Row i draws with seed + i, so that it gives what it would give alone. LOOP tokens are
        handed out while the next are computed.
        """
        if self.model_config.recurrence != "none" and len(set(map(len, prompts))) > 1:
            # Padding would move a row's chunks.
            yield from self._one_by_one(prompts, sampling)
            return
        read = self.begin(prompts, sampling)
        pending: tuple[Sequence | Array, int] = [], 0
        for done in range(0, sampling.max_tokens, LOOP):
            count = min(LOOP, sampling.max_tokens - done)
            chosen, read = self.decode(read, count, sampling)
            yield from to_host(*pending)
            pending = chosen, count
        yield from to_host(*pending)

    def begin(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> Read:
        """Read prompts, of one length if there is a recurrence.

        The state has room for `sampling.max_tokens` more.
        """
        self._check(prompts)
        longest, chunk = max(map(len, prompts)), 0
        if self.model_config.recurrence != "none":
            chunk = recurrence.chunk_size(self.model_config)
        state = self._init_state(len(prompts), longest + sampling.max_tokens)
        # Prompts end together: what stands before a shorter one is padding.
        tokens = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[longest - len(prompt) :] = prompt
        sizes = np.array([[len(prompt)] for prompt in prompts])
        positions = np.arange(longest)[None] - (longest - sizes)
        segment_ids = (positions >= 0).astype(np.int32)
        positions = np.maximum(positions, 0).astype(np.int32)
        start = 0
        for size in _pieces(longest, chunk):
            part = np.s_[:, start : start + size]
            seq = mixers.SeqInfo(positions[part], segment_ids[part])
            logits, state = self._prefill(self.params, state, tokens[part], seq)
            start += size
        position = jnp.asarray(sizes[:, 0], jnp.int32)
        return Read(state, logits, position, _keys(sampling.seed, len(prompts)))

    def decode(
        self, read: Read, count: int, sampling: SamplingConfig
    ) -> tuple[Array, Read]:
        """Choose and read `count` <= LOOP tokens: int32 [LOOP, B] and what goes on."""
        numbers = (np.int32(count), *sampling.knobs)
        tokens, *after = self._decode(self.params, *read, *numbers)
        return tokens, Read(*after)

    def _one_by_one(self, prompts, sampling):
        """The same tokens from a state for each prompt."""
        streams = [
            self.stream_batch([prompt], dataclasses.replace(sampling, seed=seed))
            for seed, prompt in enumerate(prompts, sampling.seed)
        ]
        for tokens in zip(*streams, strict=True):
            yield [token for (token,) in tokens]

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        vocab_size = self.model_config.vocab_size
        for prompt in prompts:
            if not len(prompt):
                raise ConfigError("prompt: empty; give at least one token.")
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                raise ConfigError(
                    f"prompt: token ids must be in [0, {vocab_size}), got "
                    f"{min(prompt)}..{max(prompt)}: is this the model's tokenizer?"
                )

    def _init_state(self, batch_size: int, length: int) -> mixers.State:
        seq_len = self.model_config.seq_len
        max_len = -(-length // CACHE_STEP) * CACHE_STEP
        # Some mixers have no position beyond a length: do not round up over it.
        limit = seq_len if length <= seq_len else mixers.max_length(self.model_config)
        if limit:
            max_len = max(length, min(max_len, limit))
        return self._empty(self.params, batch_size, max_len)

    def _make_state(self, params, batch_size, max_len):
        model = model_lib.merge(self.model_config, params)
        dtype = jnp.dtype(self.model_config.dtype)
        return model.init_state(batch_size, max_len, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _keys(seed, count):
    """One key for each row, of its own seed."""
    return jax.vmap(jax.random.key)(seed + jnp.arange(count))


def to_host(tokens: Sequence | Array, count: int) -> list:
    """The first `count` of tokens, once they are computed. A slice of XLA's takes longer."""
    return np.asarray(tokens)[:count].tolist()


def _pieces(length: int, chunk: int = 0) -> list[int]:
    """Cut a prompt into powers of two, largest first: 300 -> [256, 32, 8, 4].

    With chunks of a recurrence, whole ones first: no piece then crosses a chunk's end.
    """
    pieces = [chunk] * (length // chunk) if chunk else []
    length -= sum(pieces)
    while length:
        size = min(PREFILL, 1 << (length.bit_length() - 1))
        pieces.append(size)
        length -= size
    return pieces
