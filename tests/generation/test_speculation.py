"""Self-speculation: the same tokens, whatever is drafted; drafts; when it is left off."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import errors, model
from memoryformer.generation import __main__ as command
from memoryformer.generation import drafts, sampler, speculation
from memoryformer.model import narrow, positions
from memoryformer.ops.lookup import native

PROMPTS = ([5, 1, 7, 5, 1, 7, 5, 1], [2])


def make(projection="memory", kind="float32", head="", **fields):
    """A generator whose greedy text repeats itself."""
    fields = {"vocab_size": 31, "seq_len": 160, "lookup": "auto"} | fields
    config = toy.model_config(projection, head_std=1.0, **fields)
    kinds = narrow.WeightKinds(kind, head or kind, kind)
    return sampler.Generator(config, model.init(config, 1), kinds)


@functools.cache
def one_layer():
    """One generator for several tests: compiling it is what takes their time."""
    return make(num_layers=1)


def tokens_of(generator, prompt, **fields):
    sampling = sampler.SamplingConfig(**{"max_tokens": 50, "temperature": 0.0} | fields)
    return list(generator.stream_batch([prompt], sampling))


def check_same_tokens(generator, drawn=True):
    """Greedy and drawn text, from each prompt, and much of it read from drafts."""
    speculator = speculation.Speculator(generator, always=True)
    for (seed, prompt), warm in itertools.product(
        enumerate(PROMPTS), (0.0, 0.7) if drawn else (0.0,)
    ):
        fields = {"temperature": warm, "seed": seed}
        expected = tokens_of(generator, prompt, **fields)
        assert tokens_of(speculator, prompt, **fields) == expected
    report = speculator.report
    assert not report.refused and 2 * report.accepted > report.passes > 20, report
    read = (report.passes + report.accepted) / report.tokens
    assert report.tokens == len(PROMPTS) * 50 * (1 + drawn) and read > 0.4


def test_tokens_are_those_of_plain_decoding():
    """Mutations: `attention._each` takes all queries at once (other bits, so refused); `keep`
    leaves the length, or `later[0]` for `later[right]`; the bound by `left` is dropped."""
    check_same_tokens(one_layer())


def test_a_screened_head_is_read_for_drafts_too():
    """Mutation: logits of a screened head for `choose_tokens`, which takes its features."""
    check_same_tokens(make(num_layers=1, head=narrow.SCREENED))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("projection", ["memory", "dense", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_model_speculates(projection, kind, dtype):
    """Mutation: a cache's keys or values after a refused draft are read."""
    fields = {"dtype": dtype}
    if projection == "mixed":
        parts = "ffn=memory_block,bits=8,mix=none+hadamard,thresholds; qkv@0=memory"
        fields |= {"projection_options": {"parts": parts}}
    check_same_tokens(make(projection, kind, **fields))


def test_other_bits_are_seen(monkeypatch):
    """One feature off by its last bit: refused, and the text is that of plain decoding.

    Mutation: `_check_bits` compares tokens only.
    """
    generator, read = one_layer(), positions.read

    def off(*args):
        x, states = read(*args)
        return x.at[-1].set(jnp.nextafter(x[-1], jnp.inf)), states

    monkeypatch.setattr(positions, "read", off)
    speculator = speculation.Speculator(generator, always=True)
    expected = tokens_of(generator, PROMPTS[0])
    assert tokens_of(speculator, PROMPTS[0]) == expected
    assert "other bits" in str(speculator.report) and not speculator.report.passes


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"recurrence": "rmt"}, "model.recurrence='rmt'"),
        ({"mixer": "linear"}, "model.mixer='linear'"),
        ({"mixer": "recurformer"}, "model.mixer='recurformer'"),
        ({"mixer_options": {"logit_transform": "dape_v2"}}, "model.mixer='softmax'"),
        ({"tie_embeddings": True}, "model.tie_embeddings=True"),
        ({"causal": False}, "model.causal=False"),
        (
            {"projection_options": {"ngram_rows": 7}},
            "model.projection_options.ngram_rows",
        ),
        (
            {
                "projection": "mixed",
                "projection_options": {
                    "parts": "ffn@1=memory_block,mix=none+orthogonal"
                },
            },
            "the mix 'orthogonal'",
        ),
    ],
    ids=str,
)
def test_models_that_cannot(fields, reason):
    """Mutations: a condition of `why_not` left out; the mix of a sum compared as one word."""
    config = toy.model_config(**{"projection": "dense", "num_layers": 2} | fields)
    assert positions.why_not(config).startswith(reason)
    stub = type("Stub", (), {"model_config": config})
    with pytest.raises(errors.ConfigError, match=r"^--speculate=3: .*; leave --specul"):
        speculation.Speculator(stub)


def test_machines_that_cannot(monkeypatch):
    """Mutation: the first condition of `why_not` left out."""
    assert positions.why_not(toy.model_config()) == ""
    monkeypatch.setattr(native, "available", lambda: False)
    assert positions.why_not(toy.model_config()) == "it needs a CPU and the native code"


def test_what_is_refused(tmp_path, capsys):
    """Several texts at once, too many drafts. Mutation: `<= MAX_DRAFT + 1`."""
    stub = type("Stub", (), {"model_config": toy.model_config()})
    for count in (0, speculation.MAX_DRAFT + 1, -1):
        with pytest.raises(errors.ConfigError, match=rf"^--speculate={count}: must be"):
            speculation.Speculator(stub, count)
    two = speculation.Speculator(stub).stream_batch([[1], [2]], None)
    with pytest.raises(errors.ConfigError, match="reads one text at a time, not 2"):
        next(two)
    path = tmp_path / "p.txt"
    path.write_text("a\nb\n")
    words = [f"--export={tmp_path}", f"--prompts={path}", "--speculate=3"]
    with pytest.raises(SystemExit) as ended:
        command.main(["generation", *words])
    assert ended.value.code == 2
    assert "--speculate=3: reads one text" in capsys.readouterr().err


def naive_draft(history, count):
    """The same by definition: every place, its shared tokens one by one."""
    best = (0, 0)
    for place in range(len(history) - 1):
        shared = 0
        while (
            shared < drafts.LONGEST
            and place >= shared
            and history[place - shared] == history[len(history) - 1 - shared]
        ):
            shared += 1
        best = max(best, (shared, place))
    shared, place = best
    if shared < drafts.SHORTEST:
        return None
    text = list(history)
    for _ in range(count):
        place += 1
        text.append(text[place])
    return text[len(history) :]


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    st.lists(st.integers(0, 2), min_size=1, max_size=14),
    st.integers(0, 9),
    st.integers(1, 3),
)
def test_drafts_by_definition(text, rest, count):
    """What lies behind the text counts for nothing.

    Mutations: the first place instead of the last; a place that ends the text itself;
    the period left out.
    """
    history = np.array(text + [1] * rest, np.int32)
    tokens, worth = drafts.draft(history, len(text), count)
    expected = naive_draft(text, count)
    assert bool(worth) == (expected is not None)
    if worth:
        assert tokens.tolist() == expected


def test_drafts_of_a_traced_text_are_the_same():
    """Mutation: numpy's indices go past the end where XLA's are clamped."""
    rng = np.random.default_rng(0)
    traced = jax.jit(lambda h, n: drafts.draft(h, n, 3))
    for length in (1, 2, 3, 9, 30):
        history = rng.integers(0, 3, 30).astype(np.int32)
        tokens, worth = drafts.draft(history, length, 3)
        again, worth_again = traced(jnp.asarray(history), length)
        assert bool(worth) == bool(worth_again)
        assert not worth or again.tolist() == tokens.tolist()


def test_what_a_text_would_have_accepted():
    """Mutations: one token too few after a pass; the text's end counts as accepted."""
    period = np.array([1, 2, 3] * 4)
    # Passes from [1 2 3 1 2] and from [1 2 3 1 2 3 1 2 3], three right tokens each.
    assert drafts.accepted(period, 4, 3) == (2, 6)
    assert drafts.accepted(np.arange(12), 0, 3) == (0, 0)
    assert drafts.accepted(np.array([1, 2, 9, 1, 2, 8, 8]), 4, 3) == (1, 0)


def test_when_it_pays():
    """A pass of 2.5 tokens' time pays where it accepts more than 1.5 of them.

    Mutations: `>=` for `>`; plain tokens of a call not taken from its time; 1 left out.
    """
    pace = drafts.Pace()
    for _ in range(drafts.FIRST):
        assert not pace.pays  # a token's time comes first
        pace.plain(16, 1.6)
        assert pace.pays  # in turns
        pace.speculated(plain_tokens=4, passes=4, accepted=8, seconds=0.4 + 4 * 0.25)
    assert pace.cost == pytest.approx(2.5) and pace.accepted == 2 and pace.pays
    pace.speculated(plain_tokens=4, passes=12, accepted=0, seconds=0.4 + 12 * 0.25)
    assert pace.accepted == 1 and pace.cost == pytest.approx(2.5) and not pace.pays
    pace.watched(4, 24)
    assert pace.pays
    for _ in range(8):  # a slower machine makes both slower
        pace.plain(16, 3.2)
        pace.speculated(0, 4, 6, 4 * 0.5)
    assert pace.cost == 2.5 and not pace.pays


def test_it_is_left_off_where_it_does_not_pay(monkeypatch):
    """Passes that take as long as nine tokens: three calls try, the others are plain.

    Mutation: `pays` is not asked.
    """
    calls, now = [], [0.0]

    def plain(self, read, left, sampling):
        calls.append("plain")
        self._pace.plain(16, 16.0)
        return np.zeros(16, np.int32), read

    def passes(self, read, history, length, left, sampling):
        calls.append("passes")
        self._pace.speculated(0, 4, 12, 36.0)
        return np.zeros(16, np.int32), read

    monkeypatch.setattr(speculation.Speculator, "_call_plain", plain)
    monkeypatch.setattr(speculation.Speculator, "_call_passes", passes)
    monkeypatch.setattr(speculation.Speculator, "_check_bits", lambda *args: True)
    stub = type(
        "Stub", (), {"model_config": toy.model_config(), "begin": lambda *a: ()}
    )
    speculator = speculation.Speculator(stub(), clock=lambda: now[0])
    tokens_of(speculator, [1], max_tokens=256)
    assert calls == [*["plain", "passes"] * 3, *["plain"] * 10]
