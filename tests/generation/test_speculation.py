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
from memoryformer.ops.lookup import native, screened

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
    return speculator


def test_tokens_are_those_of_plain_decoding():
    """Mutations: `attention._each` takes all queries at once (other bits, so refused); `keep`
    leaves the length; `keys[count - 1]`, `chosen[0]`; `<=` for `<` in the bound by `left`."""
    speculator = check_same_tokens(one_layer())
    whole = tokens_of(speculator, PROMPTS[0])
    for count in range(30, 50):  # wherever a pass would end, no token more
        assert tokens_of(speculator, PROMPTS[0], max_tokens=count) == whole[:count]


def test_a_screened_head_is_read_for_drafts_too(monkeypatch):
    """Mutation: logits of a screened head for `choose_tokens`, which takes its features."""
    monkeypatch.setattr(screened, "FEWEST_WEIGHTS", 0)
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


def naive_steps(text, start, count):
    """Steps of passes over the text from token `start` on, one pass after another."""
    length, ends = start + 1, []
    while True:
        tokens, worth = drafts.draft(np.array(text[:length]), length, count)
        after = text[length : length + count]
        equal = np.asarray(tokens)[: len(after)] == after
        right = (len(after) if equal.all() else int(np.argmin(equal))) if worth else 0
        ends.append(length + right)
        if ends[-1] >= len(text):
            return ends
        length = ends[-1] + 1


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    st.lists(st.integers(0, 2), min_size=2, max_size=40),
    st.integers(1, 3),
    st.integers(1, 9),
)
def test_a_watch_counts_the_steps_of_passes(text, count, piece):
    """Its text comes in pieces, and it says what passes from its first token on would do.

    Mutations: a run noted before it is looked for; the shortest run for the longest; a draft
    of one token more; a wrong token that goes on with its draft.
    """
    watch = drafts.Watch(count)
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
    steps = sum(watch.read(tokens) for tokens in pieces)
    assert steps == len(naive_steps(text, 0, count))


def test_when_it_pays():
    """A step of 2.5 tokens' time pays where steps read more than 2.5 of them.

    Mutations: `>=` for `>`; seconds of a step taken for those of a token; the margin left out,
    or taken where drafts are read already.
    """
    pace = drafts.Pace()
    for _ in range(drafts.FIRST):
        assert not pace.speculates  # a token's time comes first
        pace.called(False, steps=16, tokens=16, seconds=1.6)
    for _ in range(drafts.FIRST):
        assert pace.speculates
        pace.called(True, steps=4, tokens=12, seconds=4 * 0.25)
    pace.called(True, steps=4, tokens=12, seconds=None)
    pace.called(True, steps=4, tokens=12, seconds=4 * 0.25)
    assert pace.cost == pytest.approx(2.5) and pace.reads == 3 and pace.speculates
    pace.called(True, steps=14, tokens=16, seconds=14 * 0.25)
    assert pace.reads == pytest.approx(64 / 30) and not pace.speculates
    for _ in range(5):  # what passes would do with the text of plain calls
        pace.called(False, steps=5, tokens=16, seconds=1.6)
    assert pace.reads == pytest.approx(3.2) and pace.speculates
    for _ in range(5):  # a slower machine makes both slower
        pace.called(False, steps=8, tokens=16, seconds=3.2)
    for _ in range(5):
        pace.called(True, steps=8, tokens=20, seconds=8 * 0.5)
    assert pace.cost == pace.reads == 2.5 and not pace.speculates
    for _ in range(5):
        pace.called(False, steps=10, tokens=26, seconds=5.2)
    assert pace.reads == 2.6 and not pace.speculates  # too little for a change
    pace.called(True, steps=10, tokens=26, seconds=10 * 0.5)
    assert pace.reads == 2.6 and pace.speculates  # and too much for another


def test_the_other_kind_is_timed_again():
    """Mutations: `>` for `>=`; a call without a time ends the wait."""
    pace = drafts.Pace()
    for speculated in (False, True):
        for _ in range(drafts.FIRST):
            pace.called(speculated, 16, 16, 32.0 if speculated else 16.0)
    for _ in range(drafts.AGAIN):
        assert not pace.speculates
        pace.called(False, 16, 16, 16.0)
    assert pace.speculates
    pace.called(True, 16, 16, None)
    assert pace.speculates
    pace.called(True, 16, 16, 32.0)
    assert not pace.speculates


class FakeText:
    """In the place of a `_Text`: calls of 16 tokens that take what the test says."""

    room = 0

    def __init__(self, events, seconds):
        self.events, self.seconds, self.now = events, seconds, 0.0
        self.left = 16 * 24

    def begin(self, behind, speculate):
        ahead = 0 if behind is None else behind.count
        if self.left <= ahead:
            return None
        kind = "drafts" if speculate else "plain"
        self.events.append(f"begin {kind}")
        if behind is None:
            self.now += (
                1000  # the machine was idle: what the next call takes does not count
            )
        counts = np.array([16, 4, 12]) if speculate else None
        return speculation._Call(None, 16, behind is not None, counts)

    def end(self, call):
        kind = "plain" if call.counts is None else "drafts"
        self.events.append(f"end {kind}")
        self.now += self.seconds[kind]
        self.left -= 16
        return [1] * 16, [16, 0, 0] if call.counts is None else [16, 4, 12]


@pytest.mark.parametrize(
    ("seconds", "kind"),
    [({"plain": 16.0, "drafts": 16.5}, "plain"), ({"plain": 16.0, "drafts": 15.5}, "drafts")],
    ids=("slower", "faster"),
)  # fmt: skip
def test_it_is_left_off_where_it_does_not_pay(monkeypatch, seconds, kind):
    """Three calls of each kind are timed, then the faster go on; each begins behind another.

    Mutations: `speculates` is not asked; a call ends before the next of its kind begins; the
    kind changes while a call is pending; a call that began behind none is timed.
    """
    events = []
    text = FakeText(events, seconds)
    monkeypatch.setattr(speculation, "_Text", lambda *args: text)
    monkeypatch.setattr(speculation.Speculator, "_check_bits", lambda *args: True)
    stub = type("Stub", (), {"model_config": toy.model_config()})
    speculator = speculation.Speculator(stub(), clock=lambda: text.now)
    monkeypatch.setattr(drafts.Watch, "read", lambda self, tokens: 4)
    assert len(tokens_of(speculator, [1])) == 16 * 24
    begun = [event.split()[1] for event in events if event.startswith("begin")]
    assert begun == [*["plain"] * 5, *["drafts"] * 5, *[kind] * 14]
    expected = []
    for name, group in itertools.groupby(begun):
        count = len(list(group))
        pairs = [f"begin {name}", f"end {name}"] * (count - 1)
        expected += [f"begin {name}", *pairs, f"end {name}"]
    assert events == expected
    report = speculator.report
    calls = begun.count("drafts")
    assert (report.passes, report.accepted) == (4 * calls, 12 * calls)
    assert report.cost == pytest.approx(4 * seconds["drafts"] / 16)
