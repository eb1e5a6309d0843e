"""What a task asks, as tokens: pairs of texts, prompts, and how a prompt is continued.

The rules are those of the harness's own `hf` model class, so that the numbers are the same:

    pair      spaces that end the context move to the continuation;
              tokens(context + continuation) after the first len(tokens(context)) are scored
    too long  the left end of what is seen is cut

Where that class stops with an assertion, here the pair gets tokens, or is refused with its
numbers. Start at `Encoder`. Does not need lm-eval.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.errors import ConfigError, DataError
from memoryformer.generation.sampler import SamplingConfig

MAX_NEW_TOKENS = 256  # where a task does not say
# Names of the most new tokens, the first in the list that is there counts.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Other options: those that change nothing where nothing is drawn or there is one beam, and
# those that change nothing at one value.
_OF_DRAWING = {"min_p", "seed", "top_k", "typical_p"}
_OF_BEAMS = {"early_stopping", "length_penalty", "use_cache"}
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}


class Pair(NamedTuple):
    """A context and its continuation as tokens, neither of them empty.

    apart: encoded one without the other, since together no token is the continuation's alone.
    """

    context: list[int]
    continuation: list[int]
    apart: bool


class Prompt(NamedTuple):
    """What is read, how many tokens may follow, and how it came about.

    shortened: fewer tokens may follow than the task allows. cut: the text's left end is missing.
    """

    tokens: list[int]
    new_tokens: int
    shortened: bool
    cut: bool


@dataclasses.dataclass(frozen=True)
class Continuing:
    """How a task wants a prompt continued: `sampling` without a seed, and stop strings."""

    sampling: SamplingConfig
    stop: tuple[str, ...]

    def at_most(self, new_tokens: int) -> "Continuing":
        """The same with fewer new tokens."""
        sampling = dataclasses.replace(self.sampling, max_tokens=new_tokens)
        return dataclasses.replace(self, sampling=sampling)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Texts to tokens for a model that reads `max_length` of them.

    add_bos: the end-of-document token stands before every context, not only before empty ones.
    """

    tokenizer: tokenizer_lib.Tokenizer
    max_length: int
    add_bos: bool = False

    def text(self, string: Any, *, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text, after the end-of-document token if `add_bos`."""
        add_bos = self.add_bos if add_bos is None else add_bos
        return [self.tokenizer.eot_id] * add_bos + self.tokenizer.encode(_text(string))

    def pair(self, context: str, continuation: str) -> Pair:
        """Encode a context and what is to be scored after it.

        Raises `DataError` for a continuation without tokens, whose log-likelihood of 0 would
        win against every other, and for one that is longer than the model reads.
        """
        context, continuation = _text(context), _text(continuation)
        kept = context.rstrip()
        spaces = context[len(kept) :]
        context_tokens = self.text(kept)
        if kept:
            together = self.text(kept + spaces + continuation)
            scored = together[len(context_tokens) :]
        else:
            scored = self.text(spaces + continuation, add_bos=False)
        apart = not scored
        if apart:
            scored = self.text(spaces + continuation, add_bos=False)
        if not scored:
            raise DataError(
                f"the continuation {continuation!r} has no tokens, so that its likelihood "
                "is 1 whatever the model; leave such a choice out."
            )
        if len(scored) > self.max_length:
            raise DataError(
                f"a continuation of {len(scored)} tokens is longer than the model's "
                f"{self.max_length}."
            )
        return Pair(context_tokens or [self.tokenizer.eot_id], scored, apart)

    def prompt(self, context: str, new_tokens: int) -> Prompt:
        """Encode a context of which at most `new_tokens` tokens are to follow.

        What follows gives way first. A context that fills the model by itself is cut at its
        left end, as `hf` does, and at least half of what the model reads stays the context's.
        """
        tokens = self.text(context) or [self.tokenizer.eot_id]
        room = self.max_length - len(tokens)
        cut = room < 1
        if cut:
            room = max(1, self.max_length // 2)
        follow = min(new_tokens, room)
        if cut:
            tokens = tokens[-max(1, self.max_length - follow) :]
        return Prompt(tokens, follow, follow < new_tokens, cut)


def continuing(options: Mapping[str, Any]) -> Continuing:
    """Read a task's `generation_kwargs`. Raises `ConfigError` for what cannot be served.

    As in the harness, a temperature above 0 draws unless `do_sample` is false, and nothing is
    drawn where neither is there.
    """
    kwargs = {key: value for key, value in options.items() if value is not None}
    stop = kwargs.pop("until", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, Sequence) or not all(isinstance(s, str) for s in stop):
        raise _unusable("until", stop, "must be a text or a list of texts")
    limits = [
        _number(kwargs, name, MAX_NEW_TOKENS) for name in _LIMITS if name in kwargs
    ]
    max_tokens = limits[0] if limits else MAX_NEW_TOKENS
    if not max_tokens >= 1 or max_tokens % 1:  # nan and inf too
        raise _unusable("max_gen_toks", max_tokens, "must be a whole number above 0")
    do_sample = kwargs.pop("do_sample", None)
    if do_sample not in (None, True, False):
        raise _unusable("do_sample", do_sample, "must be true or false")
    temperature = _number(kwargs, "temperature", 1.0 if do_sample else 0.0)
    top_p = _number(kwargs, "top_p", 1.0)
    if not 0 <= temperature < math.inf:
        raise _unusable("temperature", temperature, "must be 0 or more")
    if not 0 <= top_p <= 1:
        raise _unusable("top_p", top_p, "must be in [0, 1]")
    drawn = do_sample is not False and temperature > 0 and top_p > 0
    harmless = _OF_BEAMS if drawn else _OF_BEAMS | _OF_DRAWING
    for name in kwargs.keys() - harmless - {*_LIMITS, "temperature", "top_p"}:
        if name not in _NEUTRAL or kwargs[name] != _NEUTRAL[name]:
            raise _unusable(name, kwargs[name], "is not supported; leave it out")
    sampling = SamplingConfig(
        max_tokens=int(max_tokens),
        temperature=temperature if drawn else 0.0,
        top_p=top_p if drawn else 1.0,
    )
    return Continuing(sampling, tuple(string for string in stop if string))


def _text(string: Any) -> str:
    if not isinstance(string, str):
        raise DataError(f"{string!r} is not text.")
    try:
        string.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{string!r} is no Unicode text ({error.reason}).") from error
    return string


def _number(kwargs: Mapping[str, Any], name: str, default: float) -> float:
    value = kwargs.get(name, default)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise _unusable(name, value, "must be a number") from error


def _unusable(name: str, value: Any, reason: str) -> ConfigError:
    return ConfigError(f"generation_kwargs.{name}={value!r}: {reason}.")
