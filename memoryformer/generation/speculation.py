"""Exact self-speculation of one stream: several tokens from one pass over the weights.

The tokens are those of `sampler.Generator` bit for bit, greedy or drawn: a draft only decides
how many are read at once (`passes`). Before a stream of a new length, one pass is compared with
tokens read one by one; if XLA gives other bits here, nothing is speculated.

A call begins while the tokens of the one before are handed out, as in plain decoding. The time
from one call's end to the next one's is what `drafts.Pace` compares: where calls with drafts
read a token no faster than plain ones, it goes back to those, and watches the text for when
drafts would pay. Start at `Speculator`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.errors import ConfigError
from memoryformer.generation import drafts, passes, sampler
from memoryformer.model import positions
from memoryformer.notation import Array

MAX_DRAFT = passes.MAX_DRAFT


@dataclasses.dataclass
class Report:
    """What was read how: tokens, passes over drafts, and the drafted tokens they accepted."""

    tokens: int = 0
    passes: int = 0
    accepted: int = 0
    # Tokens a step of the last calls; a step is a token and its draft.
    reads: float = 0.0
    cost: float = 0.0  # of a step, in plain tokens; 0: not measured
    refused: str = ""  # why nothing is speculated

    def __str__(self):
        if self.refused:
            return f"no speculation: {self.refused}"
        if not self.passes:
            return "no speculation: no pass over a draft"
        read = (self.passes + self.accepted) / self.tokens
        cost = f" for the time of {self.cost:.2f}" if self.cost else ""
        return (
            f"{1 + self.accepted / self.passes:.2f} tokens a pass over a draft, "
            f"{100 * read:.0f} % of tokens so; {self.reads:.2f} tokens a step{cost}"
        )


@dataclasses.dataclass
class _Call:
    """A call that was begun."""

    tokens: Array
    count: int  # tokens that it reads; with drafts, at least
    timed: bool  # it began behind another, so that it took the time between their ends
    counts: Array | None = None  # those of `Passes`
    context: passes.Context | None = None


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
        self._passes = passes.Passes(generator, num_drafts)
        self._checked: dict[int, bool] = {}  # by the room for a text

    def stream_batch(
        self, prompts: Sequence[Sequence[int]], sampling: sampler.SamplingConfig
    ) -> Iterator[list[int]]:
        """Yield [token], as `Generator.stream_batch` does for this one prompt."""
        if len(prompts) != 1:
            raise ConfigError(
                f"--speculate={self._num_drafts}: reads one text at a time, not "
                f"{len(prompts)}; use --batch_size=1."
            )
        text = _Text(self._generator, self._passes, prompts[0], sampling)
        exact = self._check_bits(text, sampling)
        watch, unwatched = drafts.Watch(self._num_drafts), prompts[0]
        pending: _Call | None = None
        ended = 0.0
        while text.left > 0:
            speculate = exact and (self._always or self._pace.speculates)
            call = None
            # Another kind of call waits for the tokens of the one before.
            if pending is None or speculate == (pending.counts is not None):
                call = text.begin(pending, speculate)
            watch.read(unwatched)  # while the first call is computed
            unwatched = ()
            if pending is not None:
                tokens, counts = text.end(pending)
                began, ended = ended, self._clock()
                steps = watch.read(tokens)
                self._note(pending, counts, steps, ended - began)
                yield from ([token] for token in tokens)
            pending = call

    def _note(self, call, counts, steps, seconds):
        """A call has ended; `steps` of passes over its text, made or not."""
        count, passed, accepted = counts
        speculated, report = call.counts is not None, self.report
        steps = count - accepted if speculated else steps
        self._pace.called(speculated, steps, count, seconds if call.timed else None)
        report.tokens, report.passes = report.tokens + count, report.passes + passed
        report.accepted += accepted
        if speculated:
            report.reads, report.cost = self._pace.reads, self._pace.cost

    def _check_bits(self, text, sampling) -> bool:
        """Whether a pass over right drafts gives what single tokens give, in all bits."""
        width = self._num_drafts + 1
        if text.room in self._checked or text.left < width:
            return self._checked.get(text.room, False)
        plain, chosen = jax.tree.map(jnp.copy, text.read), []
        for _ in range(width):
            token, plain = self._generator.decode(plain, 1, sampling)
            chosen.append(int(token[0, 0]))
        # A made-up history, in which the right tokens follow what no text holds.
        mark = [-1] * (drafts.LONGEST - 1)
        history = np.array([*mark, *chosen, *mark], np.int32)
        made_up = np.pad(history, (0, text.room - len(history)))
        read = jax.tree.map(jnp.copy, text.read)
        context = self._passes.context(read, made_up, len(history), text.left)
        tokens, counts, context = self._passes(context, sampling, 1)
        same = (
            int(counts[0]) == width
            and np.asarray(tokens)[:width].tolist() == chosen
            and passes.same_bits(plain, context.read)
        )
        self._checked[text.room] = same
        if not same:
            self.report.refused = (
                f"{width} tokens read at once give other bits than one by one here"
            )
        return same


class _Text:
    """One text while it goes on: what of it is known here, and the calls that read more."""

    def __init__(self, generator, compiled, prompt, sampling):
        self._generator, self._passes, self._sampling = generator, compiled, sampling
        self.read = generator.begin([prompt], sampling)
        self.left = sampling.max_tokens
        step = sampler.CACHE_STEP  # so that few programs are compiled, as for caches
        self.room = -(-(len(prompt) + self.left) // step) * step
        self._history = np.zeros(self.room, np.int32)
        self._history[: len(prompt)] = prompt
        self._length = len(prompt)

    def begin(self, behind: _Call | None, speculate: bool) -> _Call | None:
        """Begin a call, behind one of its kind that may not have ended; None: no tokens left."""
        left = self.left - (0 if behind is None else behind.count)
        if left <= 0:
            return None
        count, timed = min(sampler.LOOP, left), behind is not None
        if not speculate:
            tokens, self.read = self._generator.decode(self.read, count, self._sampling)
            return _Call(tokens, count, timed)
        context = behind.context if behind is not None else None
        if context is None:
            context = self._passes.context(
                self.read, self._history, self._length, self.left
            )
        tokens, counts, context = self._passes(context, self._sampling)
        return _Call(tokens, count, timed, counts, context)

    def end(self, call: _Call) -> tuple[list[int], list[int]]:
        """Its tokens, once they are computed; how many, the passes, and the tokens accepted."""
        counts = [call.count, 0, 0]
        if call.context is not None:
            counts, self.read = np.asarray(call.counts).tolist(), call.context.read
        count = counts[0]
        tokens = np.asarray(call.tokens).reshape(-1)[:count]
        self._history[self._length : self._length + count] = tokens
        self._length, self.left = self._length + count, self.left - count
        return tokens.tolist(), counts


def check(num_drafts: int) -> None:
    """Raise `ConfigError` for a number of drafted tokens that no pass reads."""
    if not 1 <= num_drafts <= MAX_DRAFT:
        raise ConfigError(
            f"--speculate={num_drafts}: must be in [1, {MAX_DRAFT}], or 0 for none."
        )
