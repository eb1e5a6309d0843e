"""The sample that a tokenizer is trained on, its training, and what is shown meanwhile."""

import dataclasses
import os
import random
import signal
import threading
import time
import types

import data_helpers
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from memoryformer import data, errors
from memoryformer.data import documents, preparation, progress
from memoryformer.data import manifest as manifest_lib
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.runs import console


class Source(list):
    def __getitems__(self, indices):
        return [{"text": self[index]} for index in indices]


def corpus(texts, **more):
    size = sum(len(text.encode()) for text in texts)
    return documents.Texts(Source(texts), "text", size, size, **more)


def size(texts):
    return sum(len(text.encode()) for text in texts)


def yes(text):
    return True


def test_texts_of_one_size_are_taken_whole():
    """One of every few, as prepared corpora were sampled: their tokenizers stay.

    Mutation: slices always.
    """
    texts = [f"{i:04d} " + "x" * 95 for i in range(1000)]
    assert corpus(texts).sample(10_000, yes) == texts[::10]
    assert corpus(texts).sample(200_000, yes) == texts
    seen = corpus(texts).sample(10_000, lambda text: int(text[:4]) % 10 >= 2)
    assert seen == texts[2::10]


def test_a_corpus_smaller_than_the_sample_is_the_sample():
    """However unequal its texts are. Mutation: a quarter of the budget is the limit."""
    texts = ["x", "y" * 900, "z"]
    assert corpus(texts).sample(1000, yes) == texts


@pytest.mark.parametrize(
    "texts",
    [
        ["n" * 30] * 2000 + ["b" * 400_000],  # notes and a book, in either order
        ["b" * 400_000] + ["n" * 30] * 2000,
        ["n" * 20_000, *["b" * 20_000] * 20],  # few and large
        ["n" * 60_000 + "b" * 400_000],  # one
        ["n" * 30, "b" * 300] * 1000,  # the large ones between the k-th ones
        (["n"] * 19 + ["b" * 4000]) * 100,
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_sample_is_spread_by_bytes(texts, known):
    """Its share of either kind is that of the corpus; it is no larger than asked.

    Mutations: `_every_few` always; slices of records; no thinning (the beginning only);
    a stride from `num_bytes` where TFDS does not know it.
    """
    whole = corpus(texts)
    if not known:
        whole = documents.Texts(whole.source, "text", 0)
    sample = "".join(whole.sample(20_000, yes))
    assert 10_000 <= len(sample) <= 22_000
    share = "".join(texts).count("b") / size(texts)
    assert sample.count("b") / len(sample) == pytest.approx(share, abs=0.05)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=60),
    st.integers(64, 3000),
    st.integers(0, 3),
)
def test_any_sample_is_of_the_accepted_texts(lengths, budget, refused):
    """In order, no more than asked, and never of a text that is not to be seen."""
    rng = random.Random(0)
    texts = [chr(97 + i % 4) * n for i, n in enumerate(lengths)]
    rng.shuffle(texts)
    letter = chr(97 + refused)
    sample = corpus(texts).sample(budget, lambda text: letter not in text)
    assert letter not in "".join(sample) and size(sample) <= budget
    accepted = sum(len(text) for text in texts if letter not in text)
    assert size(sample) >= min(accepted, budget) // 3 or accepted < size(texts) // 2


def test_slices_hold_whole_characters():
    text = "жук" * 100_000
    sample = corpus([text]).sample(30_000, yes)
    assert size(sample) > 29_000 and set("".join(sample)) == set("жук")


def test_text_without_blanks_is_learnt_from_in_time():
    """A megabyte in one word; the square of that took minutes.

    Mutation: `_WORD = 1 << 30`.
    """
    rng = random.Random(1)
    started = time.monotonic()
    made = tokenizer_lib.train_bpe(["".join(rng.choices("ACGT", k=1_000_000))], 2048)
    assert time.monotonic() - started < 20
    assert made.vocab_size == 2048
    text = "".join(rng.choices("ACGT", k=5000))
    assert made.decode(made.encode(text)) == text
    # What is kept splits no word: a long one is not cut where training cut it.
    assert made.spec["pre_tokenizer"]["type"] == "ByteLevel"


def test_ordinary_words_are_learnt_from_whole():
    """The tokenizer is that of a training without parts. Mutation: `_WORD = 4`."""
    texts = data_helpers.texts(50)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<eot>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    made = tokenizer_lib.train_bpe(texts, 340)
    ours, theirs = (
        {token: number for token, number in b.get_vocab().items() if number}
        for b in (made._backend, backend)
    )
    assert ours == theirs  # 0 is the end token, which no text spells in ours


@pytest.mark.parametrize("size", ["1048577", "999999999999", "9" * 5000])
def test_a_vocabulary_beyond_memory_is_refused(size):
    """Red if room for it is asked for: the process would be ended."""
    with pytest.raises(errors.ConfigError, match="at most 1048576"):
        tokenizer_lib.bpe_size(f"bpe:{size}")


def test_a_training_can_be_stopped(tmp_path, monkeypatch):
    """Asked to stop while Rust works: within a second, and nothing is kept.

    Mutation: `train_bpe` called in this thread.
    """
    begun, released = threading.Event(), threading.Event()

    def endless(texts, size):
        begun.set()
        released.wait(60)

    monkeypatch.setattr(preparation.tokenizer_lib, "train_bpe", endless)
    config = data_helpers.config(tmp_path, data_helpers.texts(40), tokenizer="bpe:300")
    started = time.monotonic()
    with pytest.raises(errors.Preempted):
        data.prepare(config, stop=begun.is_set)
    released.set()
    assert time.monotonic() - started < 30
    assert [p.name[:6] for p in (tmp_path / "cache").iterdir()] == [".lock-"]


def test_work_beside_this_thread(capsys):
    """Results, errors, an interrupt, and a line of how long it takes.

    Mutations: `result.result()` at once; the error lost.
    """
    line = progress.Progress("preparing x", enabled=True)
    line._every = 0.2
    assert line.during("training", lambda: time.sleep(0.5) or 7) == 7
    shown = capsys.readouterr().err.splitlines()
    assert shown and set(shown) == {"preparing x, training: 0s"}
    with pytest.raises(errors.DataError, match="too few"):
        line.during("", lambda: (_ for _ in ()).throw(errors.DataError("too few")))
    released = threading.Event()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        line.during("", lambda: released.wait(60))
    released.set()


def test_progress_lines(monkeypatch, capsys):
    """Half way and at the end, to the letter; a short stage shows nothing.

    Mutations: eta of 1 s at the end; `finish` prints nothing, or always.
    """
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    line = progress.Progress("preparing text")
    line.start("reading", 8e6, "B")
    now[0] += 4.9
    line.update(3e6)
    assert capsys.readouterr().err == ""
    now[0] += 3.1
    line.update(4e6)
    half = "preparing text, reading: 50% 4.0/8.0 MB 0.5 MB/s eta 8s\n"
    assert capsys.readouterr().err == half
    now[0] += 8
    line.finish(8e6)
    whole = "preparing text, reading: 100% 8.0/8.0 MB 0.5 MB/s eta 0s\n"
    assert capsys.readouterr().err == whole
    line.start("tokenising", 3, "documents")
    now[0] += 0.9
    line.finish(3)
    assert capsys.readouterr().err == ""
    now[0] += 5.1
    line.finish(3)
    last = "preparing text, tokenising: 100% 3/3 documents 0 documents/s eta 0s\n"
    assert capsys.readouterr().err == last
    quiet = progress.Progress("preparing text", enabled=False)
    quiet.start("reading", 1, "B")
    now[0] += 60
    quiet.update(1)
    quiet.finish(1)
    quiet.note("3 files skipped")
    assert capsys.readouterr().err == ""


def test_progress_at_the_edges(monkeypatch, capsys):
    """Due at five seconds, shown at the end from one second on; more done than expected.

    Mutations: `>` for `>=`; `or` for `and`; the clock not set back by a line.
    """
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    line = progress.Progress("x")
    line.start("reading", 8, "documents")
    now[0] += 1
    line.finish(8)
    whole = "x, reading: 100% 8/8 documents 8 documents/s eta 0s\n"
    assert capsys.readouterr().err == whole
    line.start("reading", 4, "documents")
    line.update(0)
    assert capsys.readouterr().err == ""
    now[0] += 5
    line.update(10)
    line.update(10)  # not due any more
    more = "x, reading: 100% 10/10 documents 2 documents/s eta 0s\n"
    assert capsys.readouterr().err == more
    line.start("reading", 1, "documents")
    now[0] += 1
    line.finish(1)
    one = "x, reading: 100% 1/1 documents 1 documents/s eta 0s\n"
    assert capsys.readouterr().err == one
    line.start("reading", 0, "B")
    now[0] += 5
    line.update(0)
    assert capsys.readouterr().err == "x, reading: 0% 0.0/0.0 MB 0.0 MB/s eta 0s\n"
    line.note("3 files skipped")
    assert capsys.readouterr().err == "x: 3 files skipped\n"


def test_progress_on_a_terminal(monkeypatch, capsys):
    """One line, written over every fifth of a second and kept at the end of each stage.

    Mutations: `and` for `or` in `finish`; the line without its padding or its `\\r`.
    """
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    line, quiet = progress.Progress("x"), progress.Progress("x", enabled=False)
    for one in (line, quiet):
        one.start("reading", 4, "documents")
        now[0] += 0.1
        one.update(1)
    assert capsys.readouterr().err == ""
    now[0] += 0.3
    line.update(2)
    quiet.update(2)
    half = "x, reading: 50% 2/4 documents 4 documents/s eta 0s"
    assert capsys.readouterr().err == f"\r{half:<79}"
    now[0] += 0.5
    line.finish(4)
    quiet.finish(4)
    whole = "x, reading: 100% 4/4 documents 4 documents/s eta 0s"
    assert capsys.readouterr().err == f"\r{whole:<79}\n"


def test_who_watches_can_stop():
    """Before every item, in a stage or not. Mutation: `check` left out of either."""
    questions = iter([False, False, True])
    line = progress.Progress("x", enabled=False, stop=lambda: next(questions))
    seen = []
    with pytest.raises(errors.Preempted, match="asked to stop while x"):
        for item in line.watched([1, 2, 3]):
            seen.append(item)
    assert seen == [1, 2]
    line = progress.Progress("x", enabled=False, stop=lambda: True)
    line.start("reading", 4, "documents")
    with pytest.raises(errors.Preempted):
        line.update(1)


def test_quiet_work_beside_this_thread(capsys):
    """Mutations: `or` for `and`, so that a quiet line or a nameless stage is shown."""
    for line, stage in (
        (progress.Progress("x", enabled=False), "training"),
        (progress.Progress("x"), ""),
        (progress.Progress("x"), "training"),  # not due within five seconds
    ):
        if stage == "" or not line.enabled:
            line._every = 0.0
        assert line.during(stage, lambda: time.sleep(0.15) or 3) == 3
    assert capsys.readouterr().err == ""


def test_work_beside_this_thread_is_shown_every_five_seconds(monkeypatch, capsys):
    """At five and at ten seconds. Mutation: `>` for `>=`."""
    done = threading.Event()
    seconds = iter([100.0, 104.9, 105.0, 109.9, 110.0])

    def clock():
        now = next(seconds, 110.0)
        if now == 110.0:
            done.set()
        return now

    monkeypatch.setattr(progress.time, "monotonic", clock)
    line = progress.Progress("x")
    assert line.during("training", lambda: done.wait(60)) is True
    shown = capsys.readouterr().err
    assert shown == "x, training: 5s\nx, training: 10s\n"


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.9, "1m00s"),
        (60, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (18_120, "5h02m"),
        (86_399, "23h59m"),
        (86_400, "1d00h"),
        (183_600, "2d03h"),
    ],
)
def test_durations(seconds, text):
    """Mutations: any bound by one; any divisor."""
    assert console.short_time(seconds) == text


def test_what_is_a_fair_sample_of_whole_texts():
    """None is over a quarter of it; otherwise slices of a 64th, up to four kilobytes.

    Mutations: a fifth; `>=` for `>`; 65; 4097.
    """
    texts = [f"{i:04d}" + "x" * 21 for i in range(400)]
    assert corpus(texts).sample(100, yes) == texts[::100]
    longer = [text + "x" for text in texts]
    assert {len(piece) for piece in corpus(longer).sample(100, yes)} == {1}
    for length, budget, piece in ((400_000, 6400, 100), (4_000_000, 1 << 20, 4096)):
        pieces = corpus(["b" * length]).sample(budget, yes)
        assert {len(part) for part in pieces} <= {piece, length % piece}
        assert sum(map(len, pieces)) <= budget
    told = []
    corpus(["b" * 900, "c" * 100]).sample(100, yes, told.append)
    assert told == [900, 1000]


def test_a_large_text_is_no_sample_of_every_second_one():
    """Of every second text too; of all texts it may be one. Mutation: `stride > 2`."""
    second = corpus(["a" * 60, "b" * 60, "c" * 40, "d" * 40])
    assert second.num_bytes == 200
    assert second._every_few(100, yes) is None and second._every_few(120, yes) is None
    assert second._every_few(200, yes) == ["a" * 60, "b" * 60, "c" * 40, "d" * 40]


def test_records_are_read_together_or_alone():
    """256 at once while they are small on the average, large ones one by one.

    Mutations: any of the numbers; `<` for `<=`; a sign of the mean.
    """
    for count, num_bytes, sizes in (
        (300, 0, [256, 44]),
        (3, 3 * 65_535, [3]),
        (3, 3 * 65_536 - 1, [3]),
        (3, 3 * 65_536, [1, 1, 1]),
    ):
        read = []

        class Recorded(Source):
            def __getitems__(self, indices, read=read):
                read.append(len(indices))
                return super().__getitems__(indices)

        texts = [str(i) for i in range(count)]
        made = documents.Texts(Recorded(texts), "text", num_bytes)
        assert list(made) == texts and read == sizes
    limited = documents.Texts(Source(texts), "text", 0, limit=2)
    assert list(limited) == texts[:2] and len(limited) == 2
    assert len(documents.Texts(Source(texts), "text", 0, limit=9)) == 3
    assert list(documents.Texts(Source([]), "text", 0)) == []


@pytest.mark.parametrize("value", [b"\xff", None, 3, [104, 105]])
def test_records_that_hold_no_text(value):
    """Mutations: another error let through; `bytes(value)`, three zeros for a 3."""
    made = documents.Texts(Source(["a", value]), "text", 0)
    with pytest.raises(errors.DataError, match=r"'text': record 1 is not UTF-8 text"):
        list(made)
    assert list(documents.Texts(Source([b"\xc3\xa9"]), "text", 0)) == ["é"]


def test_what_the_manifest_says_of_a_corpus():
    """Mutation: one licence for all."""
    said = manifest_lib.describe(data.DataConfig())
    assert dataclasses.asdict(said) == {
        "kind": "stdlib",
        "name": "",
        "path": "",
        "licence": "PSF-2.0 (read locally, not shipped)",
    }
    said = manifest_lib.describe(data.DataConfig(source="text", path="x"))
    assert (said.path, said.licence) == ("x", "the corpus's own")


def test_bytes_of_a_split_that_tfds_does_not_know():
    """Mutations: `and` for `or`; the split not looked for."""
    splits = {"train": types.SimpleNamespace(num_bytes=7)}
    splits["test"] = types.SimpleNamespace(num_bytes=None)
    builder = types.SimpleNamespace(info=types.SimpleNamespace(splits=splits))
    found = [documents._num_bytes(builder, n) for n in ("train", "test", "validation")]
    assert found == [7, 0, 0]


def test_texts_up_to_so_many_bytes():
    """A cut character is left out. Mutations: any sign; a text more."""
    assert documents._cut_to(["ab", "cd", "ef"], 4) == ["ab", "cd"]
    assert documents._cut_to(["ab", "cé", "ef"], 4) == ["ab", "c"]
    assert documents._cut_to(["ab"], 4) == ["ab"] and documents._cut_to([], 4) == []
