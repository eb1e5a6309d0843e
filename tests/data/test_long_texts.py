"""Texts that are not held: read from JSON piece by piece, and cut where no token changes."""

import json
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies as st

from memoryformer import errors
from memoryformer.data import (
    jsonlines,
    local_files,
    long_texts,
    token_files,
    tokenizer,
)

CHARS = st.sampled_from('ab"\\/\n\t\r u\u0000\x7fdDé漢😀{}[]:,0\u2028')
STRINGS = st.text(CHARS, max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | STRINGS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(STRINGS, inner, max_size=4)
    ),
    max_leaves=12,
)


def in_parts(text, sizes):
    """Cut a text to parts of these sizes, again and again."""
    parts, at, n = [], 0, 0
    while at < len(text):
        parts.append(text[at : at + sizes[n % len(sizes)]])
        at, n = at + len(parts[-1]), n + 1
    return parts


def whole(found):
    """`found` with its long texts read."""
    if isinstance(found, dict):
        return {key: whole(inner) for key, inner in found.items()}
    if isinstance(found, list):
        return [whole(inner) for inner in found]
    if isinstance(found, long_texts.LongText):
        text = "".join(found.pieces())
        assert len(found) == len(text)
        return text
    return found


@hypothesis.given(VALUES, st.lists(st.integers(1, 30), min_size=1), st.booleans())
def test_json_in_parts(value, sizes, ascii_only):
    """What json.loads says, for any cut. Red if a cut is inside of an escape or a pair."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    found = long_texts.value(in_parts(text, sizes), size=5)
    assert whole(found) == value
    assert whole(long_texts.value(iter([text]))) == value


@hypothesis.given(
    st.text(st.sampled_from('a"\\u0dD8{}:,[ \n1'), max_size=60),
    st.lists(st.integers(1, 9), min_size=1),
)
def test_what_is_no_json(text, sizes):
    """An error where json.loads has one, and nowhere else. Red if a bad escape passes."""

    def result(read):
        try:
            return whole(read())
        except ValueError:
            return ValueError

    for spelled in (text, json.dumps("long enough") + text, f'["{text}"]'):
        expected = result(lambda spelled=spelled: json.loads(spelled))
        if "\\ud8" in spelled.lower():  # half a pair is none, and is looked at later
            continue
        parts = in_parts(spelled, sizes)
        assert result(lambda parts=parts: long_texts.value(parts, size=5)) == expected


@pytest.mark.parametrize("part", [1, 2, 5, 7, 100])
def test_half_a_pair_is_no_text(tmp_path, part):
    """As of short lines. Red if it becomes a question mark."""
    for spelled, sound in (
        ('{"text": "0123456789\\ud83d\\ude00xx"}', True),
        ('{"text": "0123456789\\ud83dxxxxxxxxxxxxx"}', False),
        ('{"text": "0123456789\\ude00"}', False),
        ('{"text": "0123456789\\\\ud83d\\\\ude00"}', True),
    ):
        found = long_texts.value(in_parts(spelled, [part]), size=5)
        if sound:
            assert whole(found) == json.loads(spelled)
            continue
        with pytest.raises(errors.DataError, match="w: a lone surrogate"):
            jsonlines.text(found, "text", "w", "")


def test_a_long_line_is_as_a_short_one(tmp_path):
    """Texts, numbers of lines, faults and digests. Red if a line is joined with the next."""
    long = "naïve Ελλάς \u2028 😀 <|endoftext|>\n" * 50_000
    texts = ["a", long, "b", long[:7], long[5:]]
    lines = [
        json.dumps({"url": "x", "text": text}, ensure_ascii=False) for text in texts
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\r\n".join(["", *lines]).encode())
    how = local_files.Reading(long=3 << 19)
    found = list(local_files.read_documents([("k", path)], how))
    assert [key for key, _, _ in found] == [f"k:{n}" for n in range(2, 7)]
    is_long = [isinstance(text, long_texts.LongText) for _, text, _ in found]
    assert is_long == [False, True, False, False, True]
    for (_, text, _), expected in zip(found, texts, strict=True):
        assert "".join(long_texts.pieces(text)) == expected
        assert len(text) == len(expected)
        assert long_texts.sha256(text) == long_texts.sha256(expected)
        assert long_texts.num_bytes(text) == len(expected.encode())
        for size in (0, 1, 3, 1000, 5_000_000):
            assert long_texts.head(text, size) == expected.encode()[:size]
        for mark in ("<|endoftext|>", "no such"):
            assert long_texts.holds(text, mark) == (mark in expected)
    for number in range(3):
        share = jsonlines.Share(number, 3)
        read = jsonlines.values(path, share, 3 << 19)
        dealt = {n: "".join(long_texts.pieces(value["text"])) for n, value in read}
        assert dealt == {n + 2: t for n, t in enumerate(texts) if share.holds(n + 2)}
    path.write_bytes(b'{"text": 1}\n' + lines[1].encode()[:-3])
    with pytest.raises(errors.DataError, match=r"a.jsonl:2: not a JSON line"):
        list(jsonlines.values(path, long=3 << 19))
    path.write_bytes(lines[1].encode().replace(b"na", b"\xff", 1))
    with pytest.raises(errors.DataError, match=r"a.jsonl:1: not UTF-8"):
        list(jsonlines.values(path, long=3 << 19))


def test_a_mark_across_pieces(monkeypatch):
    """Red if pieces are looked at one by one, or the edge is too short."""
    monkeypatch.setattr(long_texts, "_PIECE", 4)
    for before in range(9):
        assert long_texts.holds("x" * before + "<mark>" + "y" * 9, "<mark>")
        assert not long_texts.holds("x" * before + "<mar>" + "y" * 9, "<mark>")


def test_a_long_text_is_not_held(tmp_path):
    """Memory for 12 MB of it is that for 6. Red if the line or the text is joined."""

    def peak(megabytes):
        line = "one or two words, and a line's end\\n" * 30_000
        with (tmp_path / "a.jsonl").open("w") as file:
            file.write('{"text": "')
            for _ in range(megabytes):
                file.write(line)
            file.write('"}\n')
        tracemalloc.start()
        how = local_files.Reading(long=1 << 20)
        read = local_files.read_documents([("k", tmp_path / "a.jsonl")], how)
        for _, text, _ in read:
            assert long_texts.num_bytes(text) > megabytes << 19
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(12) < 1.1 * peak(6) < 30 << 20


PIECES = [
    "\n",
    "\n\n",
    " \n",
    "\n ",
    "\r\n",
    "\t",
    " ",
    "  ",
    "foo",
    "Bar's",
    "12",
    "345",
]
PIECES += [
    "!",
    "...",
    "é",
    "漢字",
    "😀",
    "\u0301",
    "\u00a0",
    "\u2028",
    "\x1c",
    "\x85",
    "<eot>",
]


def trained(regex):
    """A byte-level BPE whose words are those of GPT-2, or of a regular expression."""
    made = tokenizer.train_bpe(["foo Bar's 12 345!\n\n  foo...\n foo\n" * 50], 270)
    if not regex:
        return made
    spec = dict(made.spec)
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
    split["invert"] = False
    level = spec["pre_tokenizer"] | {"use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    return tokenizer.Tokenizer(json.dumps(spec), "split")


# The words of GPT-4's and Llama 3's tokenizers.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BY_WORDS = {name: trained(regex) for name, regex in (("gpt2", ""), ("cl100k", CL100K))}


@pytest.mark.parametrize("words", BY_WORDS)
@hypothesis.given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=120), st.integers(1, 20)
)
def test_a_long_text_has_the_tokens_of_the_whole(words, pieces, size):
    """Wherever there is a line end without white space beside it in each piece.

    Red for `first_end`, and if white space before or behind the line end is allowed.
    """
    used, text = BY_WORDS[words], "".join(pieces)
    cuts, fallbacks = [], []

    def end_of(text, start, size):
        first = local_files.first_end
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                local_files, "first_end", lambda *a: fallbacks.append(a) or first(*a)
            )
            cuts.append(token_files.safe_end(used, text, start, size))
        return cuts[-1]

    found = list(local_files.cut(in_parts(text, [7, 31]), size, end_of))
    assert "".join(found) == text
    if not fallbacks:
        tokens = [token for piece in found for token in used.encode(piece)]
        assert tokens == used.encode(text)
    hypothesis.target(float(len(cuts) - 2 * len(fallbacks)))


class Lengths:
    """A tokenizer that divides nowhere, or (`anywhere`) everywhere."""

    def __init__(self, anywhere):
        self._anywhere = anywhere

    def encode(self, text):
        return [1] * len(text) if self._anywhere else [len(text)]


@pytest.mark.parametrize("used", [BY_WORDS["gpt2"], Lengths(anywhere=True)])
def test_a_cut_has_no_white_space_beside_it(used):
    """Wherever the tokens would allow it. Red if the first end is taken, or one of two."""
    text = "word\n\n  indented\n\tdeep\nnext line\nlast" * 3
    assert local_files.first_end(text, 3, 60) == 5
    end = token_files.safe_end(used, text, 3, 60)
    assert text[:end].endswith("deep\n")
    no_end = "a b\n\n" * 20
    assert token_files.safe_end(used, no_end, 2, 60) == 4


def test_a_tokenizer_that_does_not_divide_there():
    """Red without a look at the tokens: Metaspace, for one, puts a blank before each piece."""
    assert token_files.safe_end(Lengths(anywhere=False), "a\n\nfoo\nbar", 0, 11) == 2
    assert token_files.safe_end(Lengths(anywhere=True), "a\n\nfoo\nbar", 0, 11) == 7
