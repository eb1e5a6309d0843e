"""The adapter against the harness's own `hf` class on the same GPT-NeoX weights.

Part of `make test-peers`: needs torch, transformers and lm-eval. `-s` shows, for each kind,
how many requests were compared and the largest difference.
"""

import copy
import json
import logging

import jax
import numpy as np
import pytest
import toy

from memoryformer import convert, errors, model
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.data import vocabulary
from memoryformer.generation import sampler
from memoryformer.harness import scoring

REQUESTS = 300  # of every kind
SEQ_LEN = 40
NEW_TOKENS = 6
WORDS = "the quick brown fox jumps over lazy dogs seven wizards box mix".split()
FOREIGN = "naïve Ωμέγα 日本語 😀 e\u0301te\u0301 🏳️‍🌈 Żółć \u2028".split(" ")
TOLERANCE = 1e-4  # nats of a whole request; float32 on both sides


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """(ours, theirs): two adapters over one set of random weights."""
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    from lm_eval.models import huggingface

    from memoryformer.harness import adapter as adapter_lib

    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    rng = np.random.default_rng(0)
    lines = [sentence(rng, 40, WORDS + FOREIGN) for _ in range(200)]
    tokenizer = tokenizer_lib.train_bpe(lines, 360)
    config = model.ModelConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=32,
        num_layers=1,
        num_heads=2,
        seq_len=SEQ_LEN,
        projection="dense",
        **toy.PYTHIA_BLOCK,
        rotary_fraction=0.5,
        embed_std=1.0,
        mixer_std=0.4,
        ffn_std=0.3,
        head_std=0.4,
        projection_options={"output_std": 0.3},
    )
    params = jax.tree.map(np.asarray, model.init(config, 1))
    folder = tmp_path_factory.mktemp("neox")
    convert.save_gpt_neox(folder, config, params)
    ours = adapter_lib.HarnessModel(
        scoring.Scorer(config, params, devices=jax.local_devices()[:1]),
        sampler.Generator(config, params),
        tokenizer,
    )
    backend = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers_of(tokenizer),
        bos_token=vocabulary.EOT,
        eos_token=vocabulary.EOT,
    )
    network = transformers.GPTNeoXForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    end = tokenizer.eot_id
    network.config.bos_token_id = network.config.eos_token_id = end
    network.generation_config.bos_token_id = end
    network.generation_config.eos_token_id = end
    # Their cache of logits gives wrong sums where one text is split at two places.
    theirs = huggingface.HFLM(
        pretrained=network,
        tokenizer=backend,
        backend="causal",
        batch_size=100,
        logits_cache=False,
    )
    assert theirs.max_length == SEQ_LEN and theirs.prefix_token_id == end
    return ours, theirs


def tokenizers_of(tokenizer):
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.spec))


def sentence(rng, count, words=WORDS):
    return " ".join(rng.choice(words, count)) if count else ""


def request(kind, *arguments):
    from lm_eval.api import instance

    return instance.Instance(kind, {}, arguments, 0)


def cut_text(rng, words, low, high):
    """A text of some words, cut at any character."""
    text = sentence(rng, int(rng.integers(low, high)), words)
    return text[: max(1, len(text) - int(rng.integers(0, 4)))]


def pair(rng, kind):
    """A context and a continuation of one kind."""
    context = cut_text(rng, WORDS, 1, 9)
    continuation = " " + cut_text(rng, WORDS, 1, 4)
    if kind == "empty context":
        return "", continuation[int(rng.integers(0, 2)) :]
    if kind == "over-long context":
        return cut_text(rng, WORDS, 40, 80), continuation
    if kind == "long continuation":  # with its context longer than the model reads
        return cut_text(rng, WORDS, 10, 20), " " + cut_text(rng, WORDS, 7, 13)
    if kind == "multi-byte":
        words = WORDS + 3 * FOREIGN
        return cut_text(rng, words, 1, 4), cut_text(rng, words, 1, 3)
    if kind == "merge across the boundary":
        text = sentence(rng, int(rng.integers(2, 7)), WORDS + FOREIGN)
        at = int(rng.integers(1, len(text)))
        return text[:at], text[at:]
    if kind == "trailing spaces":
        space = str(rng.choice([" ", "  ", "\n", " \n\n", "\t", "\u3000"]))
        return context + space, continuation[int(rng.integers(0, 2)) :]
    return context, continuation


PAIRS = (
    "plain",
    "empty context",
    "over-long context",
    "long continuation",
    "multi-byte",
    "merge across the boundary",
    "trailing spaces",
)


@pytest.mark.parametrize("kind", PAIRS)
def test_log_likelihoods_and_greedy_flags(adapters, kind):
    """Red when a pair is split, cut or begun at another token than `hf` does it."""
    ours, theirs = adapters
    rng = np.random.default_rng(PAIRS.index(kind))
    pairs = []
    while len(pairs) < REQUESTS:
        context, continuation = pair(rng, kind)
        tokens = theirs._encode_pair(context, continuation) if context else ([0], [0])
        if 0 < len(tokens[1]) <= SEQ_LEN and tokens[0]:  # where `hf` asserts: below
            pairs.append((context, continuation))
    if "merge" in kind:
        moved = [
            theirs.tok_encode(c + k)[: len(theirs.tok_encode(c))]
            != theirs.tok_encode(c)
            for c, k in pairs
        ]
        assert sum(moved) > REQUESTS / 3
    # One token in ten is the likeliest one, so that both flags occur.
    requests = [request("loglikelihood", *p) for p in pairs]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    actual = ours.loglikelihood(requests, disable_tqdm=True)
    compare(kind, [e[0] for e in expected], [a[0] for a in actual])
    assert [a[1] for a in actual] == [e[1] for e in expected]


def test_greedy_flags_that_are_true(adapters):
    """Continuations that are the model's own: the flag is true, one letter off it is not.

    Red when the flag looks at one token only, or at the context's too.
    """
    ours, theirs = adapters
    rng = np.random.default_rng(20)
    contexts = [cut_text(rng, WORDS, 1, 6) for _ in range(REQUESTS)]
    options = {"until": [], "max_gen_toks": 3, "do_sample": False}
    texts = theirs.generate_until(
        [request("generate_until", c, dict(options)) for c in contexts], True
    )
    pairs = [(c, t) for c, t in zip(contexts, texts, strict=True) if t]
    pairs += [(c, t[:-1] + "q") for c, t in pairs]
    pairs = [p for p in pairs if theirs._encode_pair(*p)[1]]
    requests = [request("loglikelihood", *p) for p in pairs]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    actual = ours.loglikelihood(requests, disable_tqdm=True)
    compare("greedy flags", [e[0] for e in expected], [a[0] for a in actual])
    flags = [e[1] for e in expected]
    assert [a[1] for a in actual] == flags
    assert len(flags) >= REQUESTS and 30 < sum(flags) < len(flags) - 30


def test_where_hf_asserts(adapters):
    """A continuation without tokens of its own gets some; one that is too long is refused.

    Red when either is scored as (0.0, True) or cut.
    """
    ours, theirs = adapters
    rng = np.random.default_rng(30)
    merged, long = [], []
    while len(merged) < REQUESTS or len(long) < REQUESTS:
        word = str(rng.choice([w for w in WORDS if len(w) > 2]))
        context = f"{cut_text(rng, WORDS, 1, 5)} {word[:-1]}"
        if not theirs._encode_pair(context, word[-1])[1]:
            merged.append((context, word[-1]))
        long.append((context, " " + cut_text(rng, WORDS, 45, 60)))
    merged, long = merged[:REQUESTS], long[:REQUESTS]
    for context, continuation in merged[:1] + long[:1]:
        with pytest.raises(AssertionError):
            theirs.loglikelihood(
                [request("loglikelihood", context, continuation)], True
            )
    apart = [
        (None, theirs.tok_encode(c), theirs.tok_encode(k, add_special_tokens=False))
        for c, k in merged
    ]
    expected = theirs._loglikelihood_tokens(apart, disable_tqdm=True)
    ours.notes.clear()
    actual = ours.loglikelihood([request("loglikelihood", *p) for p in merged])
    totals = [e[0] for e in expected], [a[0] for a in actual]
    compare("without tokens of its own", *totals)
    assert [a[1] for a in actual] == [e[1] for e in expected]
    assert ours.notes["continuations encoded apart"] == REQUESTS
    for context, continuation in long:
        size = len(theirs._encode_pair(context, continuation)[1])
        assert size > SEQ_LEN
        with pytest.raises(errors.DataError, match=f"{size} tokens .* {SEQ_LEN}"):
            ours.loglikelihood([request("loglikelihood", context, continuation)])


def test_rolling(adapters):
    """Texts from none to eight windows. Red when a window starts at another token."""
    ours, theirs = adapters
    rng = np.random.default_rng(40)
    texts = [
        sentence(rng, int(size), WORDS + FOREIGN)
        for size in rng.integers(0, 80, REQUESTS)
    ]
    requests = [request("loglikelihood_rolling", text) for text in ["", *texts]]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    actual = ours.loglikelihood_rolling(requests)
    # float32 sums of up to 500 tokens, there one after the other, here exact
    compare("rolling", expected, actual, tolerance=1e-3)
    assert actual[0] == 0


TEXTS = (
    "plain",
    "over-long context",
    "multi-byte",
    "one stop string",
    "several stop strings",
    "to the model's end",
)


@pytest.mark.parametrize("kind", TEXTS)
def test_generated_text(adapters, kind):
    """Greedy text, stop strings included.

    Red when a prompt is cut elsewhere, a stop string is found late or stays, or text goes on
    behind the end token.
    """
    ours, theirs = adapters
    rng = np.random.default_rng(50 + TEXTS.index(kind))
    contexts, size = [cut_text(rng, WORDS, 1, 6) for _ in range(REQUESTS)], NEW_TOKENS
    if kind == "over-long context":
        contexts = [cut_text(rng, WORDS, 40, 80) for _ in contexts]
    elif kind == "multi-byte":
        contexts = [cut_text(rng, FOREIGN, 1, 4) for _ in contexts]
    elif kind == "to the model's end":
        size = SEQ_LEN - max(len(theirs.tok_encode(c)) for c in contexts)
        assert size > 2

    def generate(adapter, stops, contexts=contexts):
        options = [
            {"until": until, "max_gen_toks": size, "do_sample": False}
            for until in stops
        ]
        return adapter.generate_until(
            [
                request("generate_until", *c)
                for c in zip(contexts, copy.deepcopy(options), strict=True)
            ],
            disable_tqdm=True,
        )

    stops = [[]] * REQUESTS
    if "stop" in kind:
        whole = generate(ours, stops)
        few = [stop_strings(rng, whole, kind) for _ in range(6)]
        stops = [few[i * len(few) // REQUESTS] for i in range(REQUESTS)]
    expected, actual = generate(theirs, stops), generate(ours, stops)
    # Their batches go on behind a stop string until every row has one, and then cut what
    # came later, too: what a text is alone counts.
    for i in [i for i, e in enumerate(expected) if actual[i] != e and stops[i]]:
        (expected[i],) = generate(theirs, stops[i : i + 1], contexts[i : i + 1])
    different = [i for i, e in enumerate(expected) if actual[i] != e]
    print(f"\n{kind}: {len(expected)} texts, {len(different)} differ")
    assert not different, [(contexts[i], expected[i], actual[i]) for i in different]
    if "stop" in kind:
        stopped = sum(a != w for a, w in zip(actual, whole, strict=True))
        assert REQUESTS / 10 < stopped < REQUESTS
    else:
        assert len(set(expected)) > REQUESTS / 4


def test_an_empty_prompt(adapters):
    """It is the end token, with which documents begin; `hf` is given it as text."""
    ours, theirs = adapters
    rng = np.random.default_rng(60)
    ask = {"until": [], "max_gen_toks": 30, "do_sample": False}
    whole = ours.generate_until([request("generate_until", "", ask)])
    stops = [stop_strings(rng, whole, "several") for _ in range(30)]
    options = [
        {"until": stop, "max_gen_toks": size, "do_sample": False}
        for stop in stops
        for size in range(1, 11)
    ]

    def generate(adapter, context):
        asked = [request("generate_until", context, o) for o in copy.deepcopy(options)]
        return adapter.generate_until(asked, disable_tqdm=True)

    expected, actual = generate(theirs, vocabulary.EOT), generate(ours, "")
    assert len(actual) == REQUESTS and len(set(actual)) > 10
    assert actual == expected


def stop_strings(rng, texts, kind):
    """One or three pieces of these texts, some of them over several tokens."""
    pieces = []
    while len(pieces) < (3 if "several" in kind else 1):
        text = texts[int(rng.integers(len(texts)))]
        at = int(rng.integers(0, max(1, len(text) - 4)))
        piece = text[at : at + int(rng.integers(1, 4))]
        if piece and "\ufffd" not in piece:
            pieces.append(piece)
    return pieces if "several" in kind else pieces[0]


def compare(kind, expected, actual, tolerance=TOLERANCE):
    difference = np.abs(np.array(expected) - np.array(actual)).max()
    print(f"\n{kind}: {len(expected)} requests, largest difference {difference:.1e}")
    assert len(expected) >= REQUESTS and difference <= tolerance
