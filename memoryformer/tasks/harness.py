"""Our models as the lm-evaluation-harness wants them. Needs `lm-eval`, and no PyTorch.

Start at `HarnessModel`.
"""

import math
from collections.abc import Sequence

from lm_eval import utils
from lm_eval.api import model as harness_model

from memoryformer import generation
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.errors import DataError
from memoryformer.tasks import scoring

MAX_NEW_TOKENS = 256  # of `generate_until`, where a task does not say


class HarnessModel(harness_model.TemplateLM):
    """A `TemplateLM` over a `Scorer` and a `Generator`.

    The prefix token is the end-of-document token: it stands before an empty context and
    before the first token of a rolling log-likelihood; with `add_bos` before every context.
    """

    def __init__(
        self,
        scorer: scoring.Scorer,
        generator: generation.Generator,
        tokenizer: tokenizer_lib.Tokenizer,
        *,
        add_bos: bool = False,
    ):
        super().__init__()
        self.scorer = scorer
        self.generator = generator
        self.text = tokenizer
        self.add_bos = add_bos
        self.max_length = scorer.model_config.seq_len

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self.text.eot_id

    @property
    def tokenizer_name(self) -> str:
        """Names this tokenizer in the harness's cache."""
        return self.text.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Token ids of a text, after the prefix token if `add_bos`."""
        prefix = [self.eot_token_id] if self.add_bos else []
        if add_special_tokens is False:
            prefix = []
        return prefix + self.text.encode(string)

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        windows = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise DataError(
                    f"a continuation of {len(continuation)} tokens is longer than the "
                    f"model's {self.max_length}."
                )
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            windows.append(scoring.Window(tokens, len(continuation)))
        results = [
            (_total([score]), bool(score.greedy.all()))
            for score in self.scorer.score(windows)
        ]
        for (pair, _, _), result in zip(requests, results, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(
        self, requests, disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once.

        A long text is cut into windows of the model's length; the last one keeps a whole
        window of context.
        """
        windows, owners = [], []
        for owner, request in enumerate(requests):
            (string,) = request.args
            for context, continuation in map(
                utils.make_disjoint_window,
                utils.get_rolling_token_windows(
                    token_list=self.text.encode(string),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                tokens = [*context, *continuation]
                windows.append(scoring.Window(tokens, len(continuation)))
                owners.append(owner)
        parts: list[list[scoring.Score]] = [[] for _ in requests]
        for owner, score in zip(owners, self.scorer.score(windows), strict=True):
            parts[owner].append(score)
        results = [_total(part) for part in parts]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings, which is left out."""
        results = []
        for request in requests:
            context, options = request.args
            result = self._generate(context, dict(options))
            results.append(result)
            self.cache_hook.add_partial("generate_until", request.args, result)
        return results

    def _generate(self, context: str, options: dict) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        new_tokens = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        new_tokens = min(new_tokens, self.max_length - 1)
        sampled = options.get("do_sample", False)
        sampling = generation.SamplingConfig(
            max_tokens=new_tokens,
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(options.get("top_p", 1.0)),
        )
        prompt = self.tok_encode(context)[-(self.max_length - new_tokens) :]
        stream, text = self.text.stream(), ""
        for token in self.generator.stream(
            prompt or [self.prefix_token_id], sampling, self.eot_token_id
        ):
            text += stream.push(token)
            found = [text.find(stop) for stop in stops if stop and stop in text]
            if found:
                return text[: min(found)]
        return text + stream.finish()


def _total(scores: Sequence[scoring.Score]) -> float:
    # Exactly rounded: the sum does not depend on how a text is cut into windows.
    return math.fsum(float(x) for score in scores for x in score.logprobs)
