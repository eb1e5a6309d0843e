"""Our models as the lm-evaluation-harness wants them. Needs `lm-eval`, and no PyTorch.

Start at `HarnessModel`.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api import model as harness_model

from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.errors import ConfigError, DataError
from memoryformer.generation import sampler
from memoryformer.generation import text as text_lib
from memoryformer.harness import encoding, scoring

PROMPTS_AT_ONCE = 16  # at most: each keeps a state as long as the model reads


class HarnessModel(harness_model.TemplateLM):
    """A `TemplateLM` over a `Scorer` and a `Generator`.

    The prefix token is the end-of-document token: it stands before an empty context and
    before the first token of a rolling log-likelihood; with `add_bos` before every context.

    notes: how often something that a task asked for was not taken as it is, by what was done.
    """

    def __init__(
        self,
        scorer: scoring.Scorer,
        generator: sampler.Generator,
        tokenizer: tokenizer_lib.Tokenizer,
        *,
        add_bos: bool = False,
    ):
        super().__init__()
        self.scorer = scorer
        self.generator = generator
        self.text = tokenizer
        self.max_length = scorer.model_config.seq_len
        self.encoder = encoding.Encoder(tokenizer, self.max_length, add_bos)
        self.notes: collections.Counter[str] = collections.Counter()

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self.text.eot_id

    @property
    def tokenizer_name(self) -> str:
        """Names this tokenizer in the harness's cache."""
        return self.text.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text, after the prefix token if `add_bos`."""
        add_bos = False if add_special_tokens is False else None
        return self.encoder.text(string, add_bos=add_bos)

    def _encode_pair(
        self, context: str, continuation: str
    ) -> tuple[list[int], list[int]]:
        pair = self.encoder.pair(context, continuation)
        return pair.context, pair.continuation

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether each token is the likeliest."""
        pairs = []
        for request in requests:
            with _named(request):
                pair = self.encoder.pair(*request.args)
            self.notes["continuations encoded apart"] += pair.apart
            pairs.append((request.args, pair.context, pair.continuation))
        return self._loglikelihood_tokens(pairs)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        windows = []
        for _, context, continuation in requests:
            tokens = [*context, *continuation]
            kept = tokens[-(self.max_length + 1) :]
            self.notes["contexts cut"] += len(kept) < len(tokens)
            windows.append(scoring.Window(kept, len(continuation)))
        results = [
            (_total([score]), bool(score.greedy.all()))
            for score in self.scorer.score(windows)
        ]
        for (pair, _, _), result in zip(requests, results, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once.

        A long text is cut into windows of the model's length; the last one keeps a whole
        window of context.
        """
        windows, owners = [], []
        for owner, request in enumerate(requests):
            with _named(request):
                tokens = self.encoder.text(*request.args, add_bos=False)
            for context, continuation in map(
                utils.make_disjoint_window,
                utils.get_rolling_token_windows(
                    token_list=tokens,
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                windows.append(
                    scoring.Window([*context, *continuation], len(continuation))
                )
                owners.append(owner)
        parts: list[list[scoring.Score]] = [[] for _ in requests]
        for owner, score in zip(owners, self.scorer.score(windows), strict=True):
            parts[owner].append(score)
        results = [_total(part) for part in parts]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Continue each context until one of its stop strings, which is left out.

        Request i draws with seed i, so that repeats of one request differ.
        """
        prompts, manners = [], []
        for request in requests:
            with _named(request):
                context, options = request.args
                manner = encoding.continuing(options)
                prompt = self.encoder.prompt(context, manner.sampling.max_tokens)
            self.notes["replies shortened"] += prompt.shortened
            self.notes["prompts cut"] += prompt.cut
            prompts.append(prompt.tokens)
            manners.append(manner.at_most(prompt.new_tokens))
        results: list[str] = []
        for manner, indices in _batches(manners, self._rows):
            sampling = dataclasses.replace(manner.sampling, seed=indices[0])
            replies = text_lib.complete_tokens(
                self.generator,
                self.text,
                [prompts[i] for i in indices],
                sampling,
                manner.stop,
                in_turn=True,
            )
            results.extend(reply.text for reply in replies)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result)
        return results

    @property
    def _rows(self) -> int:
        return min(self.scorer.batch_size, PROMPTS_AT_ONCE)


@contextlib.contextmanager
def _named(request: Any) -> Iterator[None]:
    """Say which request of the harness an error is about."""
    try:
        yield
    except (ConfigError, DataError) as error:
        task = getattr(request, "task_name", None)
        document = getattr(request, "doc_id", None)
        where = f"task {task}, document {document}: " if task else ""
        raise type(error)(f"{where}{error}") from error


def _batches(
    manners: Sequence[encoding.Continuing], rows: int
) -> Iterator[tuple[encoding.Continuing, list[int]]]:
    """Neighbours that are continued alike, at most `rows` at a time."""
    for manner, group in itertools.groupby(range(len(manners)), manners.__getitem__):
        indices = list(group)
        for start in range(0, len(indices), rows):
            yield manner, indices[start : start + rows]


def _total(scores: Sequence[scoring.Score]) -> float:
    # Exactly rounded: the sum does not depend on how a text is cut into windows.
    return math.fsum(float(x) for score in scores for x in score.logprobs)
