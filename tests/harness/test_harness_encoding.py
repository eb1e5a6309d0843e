"""Pairs, prompts and their options as tokens, without the harness: an oracle and cases."""

import math

import numpy as np
import pytest

from memoryformer import errors
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.harness import encoding

WORDS = "the quick brown fox jumps over lazy dogs naïve Ωμέγα 日本語 😀".split()
MAX_LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    return tokenizer_lib.train_bpe(
        [" ".join(rng.choice(WORDS, 30)) for _ in range(60)], 316
    )


@pytest.fixture(params=[False, True], ids=["plain", "add_bos"])
def encoder(tokenizer, request):
    return encoding.Encoder(tokenizer, MAX_LENGTH, request.param)


def oracle(encoder, context, continuation):
    """The rules once more, one character after the other."""
    end = [encoder.tokenizer.eot_id]
    bos = end if encoder.add_bos else []
    while context and context[-1].isspace():
        context, continuation = context[:-1], context[-1] + continuation
    encode = encoder.tokenizer.encode
    if not context:
        return end, encode(continuation), False
    before, whole = bos + encode(context), bos + encode(context + continuation)
    if len(whole) > len(before):
        return before, whole[len(before) :], False
    return before, encode(continuation), True


def test_pairs_equal_the_oracle(encoder):
    """2000 texts cut anywhere, with spaces at the cut, without a context, of many bytes.

    Red when spaces stay with the context, when the whole is split by anything but the number
    of the context's tokens, or when `add_bos` is counted once only.
    """
    rng = np.random.default_rng(1)
    kinds = {"merged": 0, "apart": 0, "empty": 0, "spaces": 0}
    for _ in range(2000):
        text = " ".join(rng.choice(WORDS, int(rng.integers(1, 5))))
        at = int(rng.integers(0, len(text)))
        space = str(rng.choice(["", "", " ", "  ", "\n\n", "\t", "\u3000"]))
        context, continuation = text[:at] + space, text[at:]
        pair = encoder.pair(context, continuation)
        assert pair == oracle(encoder, context, continuation)
        assert pair.context and pair.continuation
        whole = encoder.text(context + continuation)
        kinds["merged"] += whole[: len(pair.context)] != pair.context
        kinds["apart"] += pair.apart
        kinds["empty"] += not context.strip()
        kinds["spaces"] += bool(context) and context[-1].isspace()
    assert min(kinds.values()) > 50, kinds


def test_a_continuation_that_merges_gets_tokens_of_its_own(tokenizer):
    """'brow' and 'n' are one token together. Red when its score is that of no token, 0."""
    encoder = encoding.Encoder(tokenizer, MAX_LENGTH)
    encode = tokenizer.encode
    assert len(encode(" brown")) == 1
    assert encoder.pair("the quick brow", "n") == (
        encode("the quick brow"),
        encode("n"),
        True,
    )
    assert encoder.pair("the quick", " brown").apart is False
    assert encoder.pair("  ", "the") == ([tokenizer.eot_id], encode("  the"), False)


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ("the", "", r"continuation '' has no tokens"),
        ("", "", r"continuation '' has no tokens"),
        ("the", "x" * 25, r"25 tokens is longer than the model's 24"),
        ("the", 3, r"3 is not text"),
        (None, " quick", r"None is not text"),
        ("the", "\ud800", r"no Unicode text"),
    ],
)
def test_pairs_that_cannot_be_scored_are_refused(
    tokenizer, context, continuation, message
):
    """Red when a choice without tokens wins, or is cut, without a word."""
    encoder = encoding.Encoder(tokenizer, MAX_LENGTH)
    with pytest.raises(errors.DataError, match=message):
        encoder.pair(context, continuation)


@pytest.mark.parametrize(
    ("size", "new_tokens", "kept", "follow", "shortened", "cut"),
    [
        (4, 20, 4, 20, False, False),  # fills the model
        (4, 21, 4, 20, True, False),  # the reply gives way
        (4, 256, 4, 20, True, False),  # what a task gets that does not say
        (23, 256, 23, 1, True, False),
        (24, 5, 19, 5, False, True),  # the context fills the model: as `hf` cuts it
        (90, 12, 12, 12, False, True),
        (90, 13, 12, 12, True, True),  # never less than half of it
        (90, 10**9, 12, 12, True, True),
        (0, 5, 1, 5, False, False),  # the end-of-document token
    ],
)
def test_what_follows_gives_way_before_the_prompt(
    tokenizer, size, new_tokens, kept, follow, shortened, cut
):
    """Red when a prompt is cut while its reply could be shorter, or from the right."""
    text = "".join("zqxj"[i % 4] for i in range(size))
    tokens = tokenizer.encode(text) or [tokenizer.eot_id]
    assert len(tokens) == max(1, size)
    prompt = encoding.Encoder(tokenizer, MAX_LENGTH).prompt(text, new_tokens)
    assert prompt == (tokens[-kept:], follow, shortened, cut)


def test_options_of_a_task():
    """As the harness normalises them. Red when a temperature alone does not draw."""

    def read(**options):
        found = encoding.continuing(options)
        sampling = found.sampling
        return sampling.max_tokens, sampling.temperature, sampling.top_p, found.stop

    assert read() == (256, 0, 1, ())
    assert read(until="a", max_gen_toks="7") == (7, 0, 1, ("a",))
    assert read(until=["a", "", "b"], max_new_tokens=3, max_tokens=9)[0::3] == (
        3,
        ("a", "b"),
    )
    assert read(temperature=0.7) == (256, 0.7, 1, ())
    assert read(temperature=0.7, do_sample=False, top_k=40) == (256, 0, 1, ())
    assert read(do_sample=True) == (256, 1, 1, ())
    assert read(do_sample=True, temperature=0.5, top_p=0.9) == (256, 0.5, 0.9, ())
    assert read(do_sample=True, temperature=0.0, top_p=0.0) == (256, 0, 1, ())
    assert read(do_sample=False, temperature=None, top_p=None) == (256, 0, 1, ())
    assert read(num_beams=1, use_cache=True, repetition_penalty=1.0) == (256, 0, 1, ())


@pytest.mark.parametrize(
    "options",
    [
        {"max_gen_toks": 0},
        {"max_gen_toks": -3},
        {"max_gen_toks": 2.5},
        {"max_gen_toks": math.inf},
        {"max_tokens": "many"},
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": math.nan},
        {"temperature": 10**400},
        {"max_gen_toks": 10**400},
        {"top_p": 7},
        {"top_p": math.nan},
        {"do_sample": "maybe"},
        {"until": 5},
        {"until": ["a", 5]},
        {"num_beams": 5},
        {"repetition_penalty": 1.2},
        {"temperature": 1.0, "top_k": 40},
        {"bad_words": ["x"]},
    ],
    ids=str,
)
def test_options_that_cannot_be_served_are_refused(options):
    """Red when one is ignored, or ends in a traceback."""
    with pytest.raises(errors.ConfigError, match=r"generation_kwargs\.\w+="):
        encoding.continuing(options)
