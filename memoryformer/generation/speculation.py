"""Exact self-speculation of one stream: several tokens from one pass over the weights.

    t                 chosen after what was read, as always
    d_1 .. d_N        drafted: what followed the text's last tokens where they stood before
    l_0 .. l_N        logits after t, d_1, .., d_N, of one pass (`model.positions`)
    a_j               chosen from l_j with the key that token would be drawn with
    kept              t, d_1 .. d_m, where d_j = a_{j-1} for j = 1 .. m; the state is set back

The tokens are those of `sampler.Generator` bit for bit, greedy or drawn: a draft only decides
how many are read at once. Before a stream of a new length, one pass is compared with
tokens read one by one; if XLA gives other bits here, nothing is speculated.

While it runs it measures: `drafts.Pace` goes back to plain decoding where passes accept too little
for what they cost, and watches the text for when they would pay. Start at `Speculator`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.errors import ConfigError
from memoryformer.generation import drafts, sampler
from memoryformer.model import mixers, positions
from memoryformer.notation import Array

MAX_DRAFT = positions.MAX_POSITIONS - 1  # N
# Of so many plain calls, one is looked through for what passes would have accepted.
WATCH = 4
MEASURE = 16  # of so many calls, one is plain, so that its time stays known


@dataclasses.dataclass
class Report:
    """What was read how: tokens, passes over drafts, and the drafted tokens they accepted."""

    tokens: int = 0
    passes: int = 0
    accepted: int = 0
    cost: float = 0.0  # of a pass, in tokens read one at a time; 0: not measured
    refused: str = ""  # why nothing is speculated

    def __str__(self):
        if self.refused:
            return f"no speculation: {self.refused}"
        if not self.passes:
            return "no speculation: no pass over a draft"
        read = (self.passes + self.accepted) / self.tokens
        cost = f" for the time of {self.cost:.1f}" if self.cost else ""
        return (
            f"{1 + self.accepted / self.passes:.2f} tokens a pass over a draft{cost}, "
            f"{100 * read:.0f} % of tokens so"
        )


class Speculator:
    """A `Generator` for one stream that reads drafts too; `text.complete` takes it as one.

    num_drafts: N, at most `MAX_DRAFT`. always: never go back to plain decoding. Raises
    `ConfigError` for a model that cannot be read so.
    """

    def __init__(
        self,
        generator: sampler.Generator,
        num_drafts: int = MAX_DRAFT,
        *,
        always: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ):
        check(num_drafts)
        self.model_config = generator.model_config
        if reason := positions.why_not(self.model_config):
            raise ConfigError(
                f"--speculate={num_drafts}: {reason}; leave --speculate=0."
            )
        self.report = Report()
        self._generator, self._num_drafts, self._clock = generator, num_drafts, clock
        self._always, self._pace = always, drafts.Pace()
        self._calls = 0
        self._checked: dict[int, bool] = {}  # by the length of the history
        self._speculate = jax.jit(self._passes, donate_argnums=(1, 2))

    def stream_batch(
        self, prompts: Sequence[Sequence[int]], sampling: sampler.SamplingConfig
    ) -> Iterator[list[int]]:
        """Yield [token], as `Generator.stream_batch` does for this one prompt."""
        if len(prompts) != 1:
            raise ConfigError(
                f"--speculate={self._num_drafts}: reads one text at a time, not "
                f"{len(prompts)}; use --batch_size=1."
            )
        read = self._generator.begin(prompts, sampling)
        length, left = len(prompts[0]), sampling.max_tokens
        step = sampler.CACHE_STEP  # so that few programs are compiled, as for caches
        history = np.zeros(-(-(length + left) // step) * step, np.int32)
        history[:length] = prompts[0]
        exact = self._check_bits(read, history, left, sampling)
        while left > 0:
            self._calls += 1
            due = self._calls % MEASURE == 0 and not self._always
            if exact and not due and (self._always or self._pace.pays):
                tokens, read = self._call_passes(read, history, length, left, sampling)
                history[length : length + len(tokens)] = tokens
            else:
                tokens, read = self._call_plain(read, left, sampling)
                history[length : length + len(tokens)] = tokens
                if self._calls % WATCH == 0:
                    text = history[: length + len(tokens)]
                    seen = drafts.accepted(text, length, self._num_drafts)
                    self._pace.watched(*seen)
            length, left = length + len(tokens), left - len(tokens)
            self.report.tokens += len(tokens)
            yield from ([token] for token in tokens.tolist())

    def _call_plain(self, read, left, sampling):
        """At most LOOP tokens, one after another: (tokens, what goes on)."""
        count = min(sampler.LOOP, left)
        start = self._clock()
        chosen, read = self._generator.decode(read, count, sampling)
        tokens = np.asarray(chosen)[:count, 0]
        self._pace.plain(count, self._clock() - start)
        return tokens, read

    def _call_passes(self, read, history, length, left, sampling):
        """LOOP tokens or a few more, drafts among them: (tokens, what goes on)."""
        start = self._clock()
        tokens, counts, read = self._run(
            read, history, length, min(sampler.LOOP, left), left, sampling
        )
        count, passes, accepted = counts
        plain = count - passes - accepted
        self._pace.speculated(plain, passes, accepted, self._clock() - start)
        self.report.passes += passes
        self.report.accepted += accepted
        self.report.cost = self._pace.cost
        return tokens, read

    def _run(self, read, history, length, least, left, sampling):
        knobs = (jnp.float32(sampling.temperature), jnp.float32(sampling.top_p))
        tokens, counts, *after = self._speculate(
            self._generator.params, *read, history, length, least, left, *knobs
        )
        counts = np.asarray(counts).tolist()
        return np.asarray(tokens)[: counts[0]], counts, sampler.Read(*after)

    def _check_bits(self, read, history, left, sampling) -> bool:
        """Whether a pass over right drafts gives what single tokens give, in all bits."""
        width = self._num_drafts + 1
        if len(history) in self._checked or left < width:
            return self._checked.get(len(history), False)
        plain, chosen = jax.tree.map(jnp.copy, read), []
        for _ in range(width):
            token, plain = self._generator.decode(plain, 1, sampling)
            chosen.append(int(token[0, 0]))
        # A made-up history, in which the right tokens follow what no text holds.
        mark = [-1] * (drafts.LONGEST - 1)
        made_up = np.zeros_like(history)
        made_up[: width + 2 * len(mark)] = [*mark, *chosen, *mark]
        tokens, _, passed = self._run(
            jax.tree.map(jnp.copy, read),
            made_up,
            width + 2 * len(mark),
            1,
            left,
            sampling,
        )
        same = tokens.tolist() == chosen and all(
            np.array_equal(_bits(a), _bits(b))
            for a, b in zip(*map(jax.tree.leaves, (plain, passed)), strict=True)
        )
        self._checked[len(history)] = same
        if not same:
            self.report.refused = (
                f"{width} tokens read at once give other bits than one by one here"
            )
        return same

    def _passes(
        self, params, state, logits, position, keys, history, length, least, left,
        temperature, top_p,
    ):  # fmt: skip
        """Choose and read at least `least` and at most `left` tokens.

        Returns them, int32 [LOOP + N + 1], how many there are, the passes over drafts, the
        drafted tokens accepted, and what goes on. `history` holds `length` tokens read.
        """
        width = self._num_drafts + 1
        knobs = (temperature, top_p)
        # Room for what is written behind the last token and never read.
        history = jnp.pad(history, (0, width))
        tokens = jnp.zeros(sampler.LOOP + width, jnp.int32)
        counts = jnp.zeros(3, jnp.int32)
        carry = (state, logits, position, keys, history, length, tokens, counts)
        body = functools.partial(self._step, params, left, knobs)
        carry = jax.lax.while_loop(lambda c: c[-1][0] < least, body, carry)
        *read, _, _, tokens, counts = carry
        return tokens, counts, *read

    def _step(self, params, left, knobs, carry):
        """Choose a token, and read it with its draft or, where there is none, alone."""
        state, logits, position, keys, history, length, tokens, counts = carry
        width, generator = self._num_drafts + 1, self._generator
        later, draws = _key_chain(keys, width)
        token = generator.choose_tokens(params, logits, draws[:1], *knobs)[:, 0]
        history = jax.lax.dynamic_update_slice(history, token, (length,))
        drafted, worth = drafts.draft(history, length + 1, width - 1)
        row = jnp.concatenate([token, drafted])
        worth &= counts[0] + width <= left

        def many(carry):
            places = position[:, None] + jnp.arange(width)[None]
            seq = mixers.SeqInfo(places, jnp.ones_like(row[None]))
            x, states = positions.read(
                self.model_config, params, carry[0], row[None], seq
            )
            after = generator.to_choose(params, x)
            chosen = generator.choose_tokens(params, after[:-1], draws[1:], *knobs)
            right = jnp.cumprod(chosen[:, 0] == drafted).sum().astype(jnp.int32)
            state = positions.keep(states, width, right + 1)
            return state, after[right][None], right, True

        def one(carry):
            seq = mixers.SeqInfo(position[:, None], jnp.ones_like(row[None, :1]))
            logits, state = generator.read_tokens(params, carry[0], row[None, :1], seq)
            return state, logits, jnp.int32(0), True

        # Loops of one step and not a `cond`, for which XLA copies caches.
        carry = (state, logits, jnp.int32(0), False)
        carry = jax.lax.while_loop(lambda c: worth & ~c[3], many, carry)
        carry = jax.lax.while_loop(lambda c: ~worth & ~c[3], one, carry)
        state, logits, right, _ = carry
        history = jax.lax.dynamic_update_slice(history, drafted, (length + 1,))
        tokens = jax.lax.dynamic_update_slice(tokens, row, (counts[0],))
        counts += jnp.stack([right + 1, worth.astype(jnp.int32), right])
        read = (state, logits, position + right + 1, later[right][None])
        return *read, history, length + right + 1, tokens, counts


def check(num_drafts: int) -> None:
    """Raise `ConfigError` for a number of drafted tokens that no pass reads."""
    if not 1 <= num_drafts <= MAX_DRAFT:
        raise ConfigError(
            f"--speculate={num_drafts}: must be in [1, {MAX_DRAFT}], or 0 for none."
        )


def _key_chain(keys: Array, count: int) -> tuple[Array, Array]:
    """The keys after 1 .. count splits of keys [1], and what the splits give to draw with."""
    later, draws = [], []
    for _ in range(count):
        keys, draw = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        later.append(keys)
        draws.append(draw)
    return jnp.concatenate(later), jnp.concatenate(draws)


def _bits(array: Any) -> np.ndarray:
    """The bytes of an array, or of keys."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array).reshape(-1).view(np.uint8)
