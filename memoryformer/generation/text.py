"""Text that continues text: prompts to tokens, tokens to replies, cut at stop strings.

Tokens are `sampler`'s. Start at `complete`; `complete_all` is for many prompts.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from memoryformer import data
from memoryformer.convert import export
from memoryformer.data import run_tokenizer
from memoryformer.generation import prompts as prompts_lib
from memoryformer.generation import sampler
from memoryformer.model import ModelConfig, narrow
from memoryformer.runs import remote
from memoryformer.training import experiment


class Streams(Protocol):
    """Whatever continues prompts by tokens: a `Generator`, or what speculates with one."""

    model_config: ModelConfig

    def stream_batch(
        self, prompts: Sequence[Sequence[int]], sampling: sampler.SamplingConfig
    ) -> Iterator[list[int]]:
        """Yield one token for each of `prompts`, `sampling.max_tokens` times."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt was continued with, and why it ended: 'stop', 'end' or 'length'."""

    text: str
    num_tokens: int
    finish: str


class _Reply:
    """The text of one row so far, cut before its stop strings (see `_before_stops`)."""

    def __init__(
        self,
        tokenizer: data.Tokenizer,
        stop: Sequence[str],
        in_turn: bool = False,
        start: bool = False,
    ):
        self._stream = tokenizer.stream(start)
        self._eot_id = tokenizer.eot_id
        self._stop = [string for string in stop if string]
        self._in_turn = in_turn
        self.text, self.num_tokens, self.finish, self._shown = "", 0, "", 0

    def push(self, token: int) -> None:
        """Add one token, unless the reply is complete."""
        if self.finish:
            return
        if token == self._eot_id:
            self.close("end")
            return
        self.num_tokens += 1
        self._add(self._stream.push(token))

    def close(self, finish: str) -> None:
        """End the reply, if it has not ended."""
        if not self.finish:
            self._add(self._stream.finish())
            self.finish = self.finish or finish

    def new_text(self) -> str:
        """Return what can be shown now and was not: no beginning of a stop string."""
        end = len(self.text)
        if not self.finish:
            end -= max((_begun(self.text, stop) for stop in self._stop), default=0)
        start, self._shown = self._shown, max(self._shown, end)
        return self.text[start : self._shown]

    def _add(self, text: str) -> None:
        self.text += text
        kept = _before_stops(self.text, self._stop, self._in_turn)
        if kept != self.text:
            self.text, self.finish = kept, "stop"


def _before_stops(text: str, stops: Sequence[str], in_turn: bool) -> str:
    """What stands before the stop string that begins first; or, `in_turn`, before the first
    of `stops`, of that before the second, and so on. They differ where two overlap.
    """
    if in_turn:
        for stop in stops:
            text = text.partition(stop)[0]
        return text
    starts = [text.find(stop) for stop in stops if stop in text]
    return text[: min(starts, default=len(text))]


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


def complete(
    generator: Streams,
    tokenizer: data.Tokenizer,
    prompts: Sequence[str],
    sampling: sampler.SamplingConfig,
    stop: Sequence[str] = (),
    show: Callable[[str], Any] = lambda text: None,
) -> list[Completion]:
    """Continue texts, together, each up to its first stop string or end of document.

    Documents begin with the end-of-text token of the one before, and so do prompts. `show`
    gets the first reply's text as it comes.
    """
    prompts_lib.check_text(prompts)
    start = [tokenizer.eot_id]
    tokens = [start + tokenizer.encode(prompt) for prompt in prompts]
    return complete_tokens(generator, tokenizer, tokens, sampling, stop, show)


def complete_tokens(
    generator: Streams,
    tokenizer: data.Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: sampler.SamplingConfig,
    stop: Sequence[str] = (),
    show: Callable[[str], Any] = lambda text: None,
    *,
    in_turn: bool = False,
) -> list[Completion]:
    """`complete` for prompts that are tokens; nothing is put before them.

    in_turn: where stop strings overlap, the text is cut before the first of `stop`, and what
      is left before the next, as the lm-evaluation-harness does.
    """
    replies = [
        _Reply(tokenizer, stop, in_turn, start=set(prompt) <= {tokenizer.eot_id})
        for prompt in prompts
    ]
    for row in generator.stream_batch(prompts, sampling):
        for reply, token in zip(replies, row, strict=True):
            reply.push(token)
        show(replies[0].new_text())
        if all(reply.finish for reply in replies):
            break
    for reply in replies:
        reply.close("length")
    show(replies[0].new_text())
    return [Completion(r.text, r.num_tokens, r.finish) for r in replies]


def complete_all(
    generator: Streams,
    tokenizer: data.Tokenizer,
    prompts: Sequence[str],
    sampling: sampler.SamplingConfig,
    stop: Sequence[str] = (),
    batch_size: int = 16,
) -> Iterator[dict[str, Any]]:
    """Continue each of these prompts, `batch_size` at a time.

    Yields {'prompt', 'text', 'num_tokens', 'finish', 'seed'}; prompt i has seed + i, whatever
    the batch size. `prompts.read` reads them from a file, and `prompts.check_seeds` says
    whether that is a seed for all of them.
    """
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        seed = sampling.seed + start
        of_batch = dataclasses.replace(sampling, seed=seed)
        replies = complete(generator, tokenizer, batch, of_batch, stop)
        for i, (prompt, reply) in enumerate(zip(batch, replies, strict=True)):
            yield {"prompt": prompt, **dataclasses.asdict(reply), "seed": seed + i}


def open_run(
    workdir: str | os.PathLike,
    step: int | None = None,
    kinds: narrow.WeightKinds | None = None,
) -> tuple[sampler.Generator, data.Tokenizer, experiment.Experiment]:
    """Load a checkpoint and its tokenizer for sampling, weights stored as `kinds` says."""
    workdir = remote.copied(workdir, step)
    run, params, facts = experiment.load(workdir, step)
    tokenizer = run_tokenizer.load(workdir, run.data, facts, run.model.vocab_size)
    return sampler.Generator(run.model, params, kinds), tokenizer, run


def open_export(
    directory: str, kinds: narrow.WeightKinds | None = None
) -> tuple[sampler.Generator, data.Tokenizer]:
    """Load what `python -m memoryformer.convert` wrote, for sampling."""
    model_config, params = export.load_export(directory)
    tokenizer = export.own_tokenizer(directory, model_config.vocab_size)
    return sampler.Generator(model_config, params, kinds), tokenizer
