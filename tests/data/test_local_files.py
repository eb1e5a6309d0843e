"""Files to documents: lines, marks, separators, fields, and never a file held whole."""

import collections
import gzip
import json
import lzma
import os
import re
import sys
import tracemalloc
import types

import data_helpers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.core import shuffle

from memoryformer import data, errors
from memoryformer.data import (
    blocks,
    documents,
    jsonlines,
    local_files,
    names,
    token_files,
)

BOM = b"\xef\xbb\xbf"
TEXTS = st.lists(st.sampled_from("xxxxxé \n"), max_size=60).map("".join)
SIZES = st.lists(st.integers(1, 7), min_size=1)


def in_parts(text, sizes):
    parts, start = [], 0
    for size in sizes * (len(text) + 1):
        parts.append(text[start : start + size])
        start += size
        if start >= len(text):
            return parts
    return parts


def cut_whole(text, size):
    """The rule of `files.cut` on a text that is there as a whole."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            stops = (text.find(mark, end, end + size) for mark in "\n ")
            end = next((stop for stop in stops if stop >= 0), end - 1) + 1
        yield text[start:end]
        start = end


@settings(max_examples=300)
@given(TEXTS, SIZES, st.integers(1, 9))
def test_pieces_do_not_depend_on_the_blocks(text, sizes, size):
    """Mutations: a piece is cut when `size` more are there; `length` not counted down."""
    pieces = list(local_files.cut(in_parts(text, sizes), size))
    assert pieces == list(cut_whole(text, size))
    assert "".join(pieces) == text


@given(st.text(alphabet="ab", max_size=30), SIZES)
@pytest.mark.parametrize("separator", ["a", "aa", "ab", "aba", "abab"])
def test_separators_are_found_over_the_blocks(separator, text, sizes):
    """Mutation: `edge` a character shorter."""
    assert between(in_parts(text, sizes), separator) == text.split(separator)


def between(parts, separator):
    """The documents of `files._between`, each put together."""
    found = collections.defaultdict(str)
    for number, part in local_files._between(parts, separator):
        found[number] += part
    return list(found.values())


@given(st.text(alphabet="a\r\n-", max_size=30), SIZES)
@pytest.mark.parametrize("separator", ["\n", "\n\n", "\n-\n", "-\n", "\r\n-"])
def test_a_line_end_of_a_separator_is_either(separator, text, sizes):
    """Mutations: `longest` without the carriage returns; `\\n` in the pattern."""
    either = separator.replace("\r\n", "\n").replace("\n", "\r?\n")
    assert between(in_parts(text, sizes), separator) == re.split(either, text)


def test_long_documents_between_separators_are_cut():
    """A separator that never comes; line ends inside stay, those at the ends do not.

    Mutations: `cut` left out of `split`; every piece stripped.
    """
    lines = "".join(f"line {i}\r\n" for i in range(100))
    text = f"\n\n{lines}\r\n@@\r\nshort\n@@ \n"
    for sizes in ([7], [50, 3], [5000]):
        *pieces, last = local_files.split(in_parts(text, sizes), "@@", 40)
        assert last == "short" and "".join(pieces) == lines.rstrip()
        assert len(pieces) > 10 and max(map(len, pieces)) <= 80
    held = []

    def endless():
        for _ in range(1000):
            held.append(0)
            yield "words of a line\n" * 10

    next(local_files.split(endless(), "@@", 400))
    assert len(held) < 20  # nothing waits for the end of the text


def test_a_separator_makes_documents(tmp_path, capsys):
    """2000 stories are 2000 documents, the marker is in none; without it, a hint.

    Mutations: the marker stays; the line ends beside it stay; blank documents stay.
    """
    stories = [f"  Story {i}.\nIt ends.\t" for i in range(200)]
    text = "\n<|endoftext|>\r\n".join([*stories[:100], " \n ", *stories[100:]])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "stories.txt").write_bytes(BOM + text.encode() + b"\n")
    fields = {"source": "text", "tokenizer": "bytes", "data_dir": str(tmp_path)}
    config = data.DataConfig(path=str(tmp_path / "in"), **fields)
    data.prepare(config)
    assert "as plain text: " in capsys.readouterr().err
    marked = {"separator": "<|endoftext|>"}
    fields["path"] = str(tmp_path / "in")
    config = data.DataConfig(source_options=marked, **fields)
    dataset = data.load(config)
    assert "plain text" not in capsys.readouterr().err
    eot = dataset.tokenizer.eot_id
    documents = []
    for split in (dataset.train, dataset.validation):
        pieces = bytes(0 if t == eot else t for t in split.tokens).split(b"\0")
        documents += [piece.decode() for piece in pieces if piece]
    assert sorted(documents) == sorted(stories)
    newline = data.DataConfig(source_options={"separator": "\\n"}, **fields)
    same = data.DataConfig(source_options={"separator": "\n"}, **fields)
    assert data.resolve_dir(newline) == data.resolve_dir(same)
    (tmp_path / "held.jsonl").write_text('{"text": "held out"}\n')
    for path, held_out in (("in", "held.jsonl"), ("held.jsonl", "in")):
        places = [str(tmp_path / name) for name in (path, held_out)]
        options = marked | {"validation_path": places[1]}
        fields |= {"path": places[0], "source_options": options}
        counts = data.load(data.DataConfig(**fields)).manifest
        found = {split.documents for split in counts.splits.values()}
        assert found == {1, len(stories)}  # lines of JSON beside it have no separator
    for path, message in (("in", "1 document .split at.*'@@'"), ("j.jsonl", "JSON li")):
        (tmp_path / "j.jsonl").write_text('{"text": "a"}\n')
        fields |= {"path": str(tmp_path / path), "source_options": {"separator": "@@"}}
        config = data.DataConfig(**fields)
        with pytest.raises(errors.MemoryFormerError, match=message):
            data.prepare(config)


def test_lines_end_at_line_feeds_only(tmp_path):
    """Mutations: `splitlines`; a carriage return kept; the mark kept."""
    odd = "one\u2028still\x85one\x0b\x0c\x1c\rone"
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + f"{odd}\r\n\r\n{BOM.decode()}two".encode())
    assert list(blocks.text_lines(path)) == [odd, "", "\ufefftwo"]
    path.write_bytes(b"a\n\n")
    assert list(blocks.text_lines(path)) == ["a", ""]
    path.write_bytes(b"a\nb\xff\n")
    with pytest.raises(errors.DataError, match=r"a.txt:2: not UTF-8"):
        list(blocks.text_lines(path))


@pytest.mark.parametrize(
    "name",
    ["A.JSONL", "a.ndjson", "a.jsonlines", "a.jl", "a.Json", "a.JSONL.GZ", "a.jl.xz"],
)
def test_json_lines_by_any_name(tmp_path, name):
    """With a mark, U+2028 and CRLF. Mutation: endings compared as they are written."""
    content = json.dumps({"text": "a\u2028b"}, ensure_ascii=False).encode()
    content = BOM + content + b"\r\n\r\n" + BOM + b'{"text": "c"}'
    pack = {".gz": gzip.compress, ".xz": lzma.compress}
    path = tmp_path / name
    path.write_bytes(pack.get(path.suffix.lower(), bytes)(content))
    found = local_files.read_documents([("k", path)], local_files.Reading())
    assert list(found) == [("k:1", "a\u2028b", 0), ("k:3", "c", 0)]


def test_julia_is_no_json(tmp_path):
    path = tmp_path / "solver.jl"
    path.write_text("module Solver\n{x} = 1\nend\n")
    found = local_files.read_documents([("solver.jl", path)], local_files.Reading())
    assert list(found) == [("solver.jl", path.read_text(), 0)]


def test_a_mark_is_no_content(tmp_path):
    """Red if U+FEFF begins a document, or a file of a mark alone is one."""
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + "é".encode())
    assert "".join(local_files.read_text(path)) == "é"
    path.write_bytes(BOM)
    assert local_files.without_text(path, "text") == "empty"
    with pytest.raises(errors.DataError, match="is empty"):
        list(local_files.read_text(path))


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_where_a_text_is_not_utf8(tmp_path, monkeypatch, block):
    """The same line and byte whatever the blocks; a character may lie across them.

    Mutations: `held` not taken off; lines counted in the last block only.
    """
    monkeypatch.setattr(blocks, "BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_bytes("é\nüber\n".encode() + b"x\xe9y\n")
    with pytest.raises(errors.DataError, match=r"a.txt:3: not UTF-8 \(byte 10\)"):
        list(local_files.read_text(path))
    path.write_bytes("cut é".encode()[:-1])
    with pytest.raises(errors.DataError, match=r"a.txt:1: not UTF-8 \(byte 4\)"):
        list(local_files.read_text(path))


def test_fields_inside_of_fields(tmp_path):
    """A field of the whole name comes first. Mutation: only the top level is looked at."""
    value = {"a": {"b": "inner", "n": None}, "c.d": "dotted", "c": {"d": "nested"}}
    text = jsonlines.text
    assert text(value, "a.b", "f:1", "fix") == "inner"
    assert text(value, "c.d", "f:1", "fix") == "dotted"
    for field, words in {
        "a.n": r"f:1: no text in field 'a.n' \(it holds null\); leave such lines out, or",
        "a": r"it holds an object",
        "a.x": r"f:1: no text in field 'a.x' \(found: a.b, a.n, c.d, c.d\); fix\.",
        "a.b.c": r"no text in field 'a.b.c'",
    }.items():
        with pytest.raises(errors.DataError, match=words):
            text(value, field, "f:1", "fix")
    for other, words in (
        ([], "a list"),
        ("x", "text"),
        (None, "null"),
        (1, "a number"),
    ):
        with pytest.raises(errors.DataError, match=f"f:1: {words}, not an object"):
            text(other, "text", "f:1", "fix")
    with pytest.raises(errors.DataError) as caught:
        text({"a\nb\ud800": 1} | {str(i): 1 for i in range(999)}, "t", "f:1", "fix")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not a JSON line .Exceeds the limit"),
        ('{"text": "a"}'.encode("utf-16-le"), "not a JSON line"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"text": "a"} {"text": "b"}', "Extra data"),
    ],
)
def test_lines_that_are_no_json(tmp_path, line, words):
    """Mutation: RecursionError or ValueError not caught."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line)
    with pytest.raises(errors.DataError, match=f"a.jsonl:2: .*{words}") as caught:
        list(jsonlines.values(path))
    assert "\n" not in str(caught.value)


OTHER_JSON = {
    "package.json": '{\n  "name": "x",\n  "version": "1"\n}\n',
    "small.json": '{"name": "x", "files": []}',
    "array.json": '[{"text": "a"}]\n',
    "tsconfig.json": '// a comment\n{\n  "strict": true,\n}\n',
    "names.json": '"a"\n"b"\n',
}


def test_a_damaged_or_empty_file_is_not_called_settings(tmp_path):
    """`is_other_json` answers, and reading the file says what is wrong. Mutation: None."""
    for content in (b"", b"\n \n"):
        (tmp_path / "x.json").write_bytes(content)
        assert jsonlines.is_other_json(tmp_path / "x.json", "text") is False


@pytest.mark.parametrize("source", ["text", "c4"])
def test_settings_in_json_are_no_corpus(tmp_path, capsys, source):
    """Left out with a note; JSON lines that are damaged or of other fields stay errors.

    Mutations: `is_other_json` says no (package.json stops the folder) or always yes.
    """
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, content in OTHER_JSON.items():
        (corpus / name).write_text(content)
    lines = [json.dumps({"text": text}) for text in data_helpers.texts(12)]
    (corpus / "shard.json").write_text("\n".join(lines))
    config = data.DataConfig(
        source=source, path=str(corpus), tokenizer="bytes", data_dir=str(tmp_path / "c")
    )
    splits = data.load(config).manifest.splits.values()
    assert sum(split.documents for split in splits) == 12
    noted = "preparing {}: 5 files skipped: 5 other JSON (array.json, ..)\n"
    assert noted.format(source) in capsys.readouterr().err
    for content, words in (
        ('{"text": "it breaks off', r"bad.json:1: not a JSON line"),
        ('{"body": "a"}\n{"body": "b"}\n', r"bad.json:1: no text in field 'text'"),
        ('{"text": null}\n', r"bad.json:1: .*it holds null"),
    ):
        (corpus / "bad.json").write_text(content)
        with pytest.raises(errors.DataError, match=words):
            data.prepare(config)
    (corpus / "bad.json").unlink()
    (corpus / "shard.json").unlink()
    with pytest.raises(
        errors.DataError, match=r"5 other JSON .*set data.source_options.text_field"
    ):
        data.prepare(config)


def test_a_large_text_is_never_held_whole(tmp_path, monkeypatch):
    """6 MB, one line of it 2 MB long: read, cut and kept in less than its size.

    Mutations: `read_text` joined; TFDS's own writer, which sorts a split in memory.
    """
    for owner, limit in (
        (local_files, "MAX_CHARS"),
        (blocks, "BLOCK"),
        (token_files, "_BATCH_CHARS"),
    ):
        monkeypatch.setattr(owner, limit, 1 << 16)
    monkeypatch.setattr(documents, "_SMALL", 1 << 12)
    path = tmp_path / "large.txt"
    with path.open("w") as file:
        for i in range(16):
            file.write(f"{i} words of a line\n" * 14_000)
        file.write("x" * (2 << 20))
    data.prepare(data_helpers.config(tmp_path, data_helpers.texts(20)))  # imports
    tracemalloc.start()
    config = data.DataConfig(
        source="text",
        path=str(path),
        tokenizer="bytes",
        data_dir=str(tmp_path / "cache"),
    )
    try:
        data.prepare(config, show_progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 << 20
    how = local_files.Reading(
        piece_chars=local_files.lone_text_piece([("k", path)], 20)
    )
    sizes = [len(text) for _, text, _ in local_files.read_documents([("k", path)], how)]
    assert max(sizes) <= 2 * local_files.MAX_CHARS and sum(sizes) == path.stat().st_size


def test_a_corpus_beyond_the_writers_memory(tmp_path, monkeypatch):
    """As beyond a gigabyte, where TFDS's own writer asks for TensorFlow.

    Mutation: `_download_and_prepare` of the base class.
    """
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
    config = data_helpers.config(tmp_path, data_helpers.texts(40))
    splits = data.load(config).manifest.splits.values()
    assert sum(split.documents for split in splits) == 40


def test_long_texts_of_a_folder_are_cut_and_named(tmp_path, monkeypatch):
    """A directory is named after the limit only where it matters."""
    config = data_helpers.config(tmp_path, data_helpers.texts(20))
    before = data.resolve_dir(config)
    monkeypatch.setattr(local_files, "MAX_CHARS", 4000)
    assert data.resolve_dir(config) == before
    (tmp_path / "corpus" / "book.txt").write_text("a line of a book\n" * 1000)
    directory = data.resolve_dir(config)
    splits = data.load(config).manifest.splits.values()
    counted = 17_000 // 4012 + 1  # the first line end behind 4000 characters
    assert sum(split.documents for split in splits) > 20
    monkeypatch.setattr(local_files, "MAX_CHARS", 5000)
    assert data.resolve_dir(config) != directory
    found = local_files.read_documents(
        [("b", tmp_path / "corpus" / "book.txt")], local_files.Reading(piece_chars=4000)
    )
    assert [key for key, *_ in found] == ["b", *(f"b#{i}" for i in range(1, counted))]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_names_are_one_printable_line(text):
    shown = names.shown(text)
    assert shown.isprintable() and (shown == text) == text.isprintable()


def test_what_a_shell_spells():
    r"""Mutation: `unicode_escape`, which breaks what is not ASCII."""
    assert names.unescaped(r"\n\t\r\\n é \q \x") == "\n\t\r\\n é \\q \\x"


def test_sizes_that_decide(tmp_path, monkeypatch):
    """What a corpus's directory and documents hang on.

    Mutations: any of the constants; `<` for `<=`; `max` and `min` exchanged.
    """
    assert (local_files.MAX_CHARS, local_files.SMALL_CORPUS) == (1 << 20, 256 << 20)
    assert (blocks.BLOCK, blocks.HEAD) == (1 << 20, 8192)
    path = tmp_path / "a.txt"
    for size, every, piece in (
        (100, 20, 256),
        (100 * 300, 20, 300),
        (100 * 300 - 1, 20, 299),
        (1 << 24, 2, 1 << 20),
        (1 << 23, 2, (1 << 23) // 10),
    ):
        with path.open("wb") as file:
            file.truncate(size)
        assert local_files.lone_text_piece([("a", path)], every) == piece
    files = [("a", path)] * 2
    assert local_files.lone_text_piece(files, 2) == 1 << 20
    (tmp_path / "b.jsonl").write_text("x")
    assert local_files.lone_text_piece([("b", tmp_path / "b.jsonl")], 2) == 1 << 20


def test_what_a_corpus_is_known_by(tmp_path, monkeypatch):
    """Keys and contents; of a large one keys, sizes and times.

    Mutations: `<` for `<=`; the time or the key left out.
    """
    path = tmp_path / "a.txt"
    path.write_text("abc")
    files = [("a", path), ("b", path)]
    known = local_files.fingerprint
    small = known(files)
    assert known([("a", path), ("c", path)]) != small
    stat = path.stat()

    def touch(nanoseconds):
        path.touch()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + nanoseconds))

    touch(5)
    assert known(files) == small
    monkeypatch.setattr(local_files, "SMALL_CORPUS", 6)
    assert known(files) == small
    monkeypatch.setattr(local_files, "SMALL_CORPUS", 5)
    large = known(files)
    assert large != small
    path.write_text("xyz")
    touch(5)
    assert known(files) == large
    touch(6)
    assert known(files) != large
    path.unlink()
    with pytest.raises(
        errors.DataError, match=r"a\.txt: cannot be read \(No such file"
    ):
        known(files)


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("a.txt", b"text", ""),
        ("a.txt", b"", "empty"),
        ("a.txt", b"a\0b", "binary"),
        ("a.txt", b"x" * 8191 + b"\0", "binary"),
        ("a.txt", b"x" * 8192 + b"\0", ""),
        ("a.txt.gz", b"not gzip", ""),
        ("a.json", b'{"a": 1}', "other JSON"),
        ("a.json", b'{"text": "a"}', ""),
        ("a.jsonl", b'{"a": 1}', ""),
        ("a.json", b"   ", ""),
        ("a.json", b'{"text": 1, ', ""),
        ("a.json", b"{", "other JSON"),
    ],
)
def test_files_without_text(tmp_path, name, content, what):
    """Told by their beginning. Mutations: `or` for `and`; any of the answers."""
    (tmp_path / name).write_bytes(content)
    assert local_files.without_text(tmp_path / name, "text") == what


def test_a_byte_after_the_head_is_no_sign_of_a_binary(tmp_path):
    """Mutation: 8193 for 8192, or the whole block looked at."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 8192 + b"\0")
    assert len("".join(local_files.read_text(path))) == 8193
    path.write_bytes(b"x" * 8191 + b"\0")
    with pytest.raises(errors.DataError, match="a binary file"):
        list(local_files.read_text(path))


@pytest.mark.parametrize(
    "what, names_, line",
    [
        ("link to folders", ["b", "a"], "2 links to folders (a, ..)"),
        ("link to folders", ["b\n"], "1 link to folders (b\\n)"),
        ("file", ["b", "a", "c"], "3 files (a, ..)"),
    ],
)
def test_counted(what, names_, line):
    """Mutations: `>=` for `>`; the first name for the smallest."""
    text = names.counted(names_, what)
    assert " ".join(text.split()) == line


def test_fields_that_are_named(tmp_path):
    """Up to 160 characters of them. Mutations: 161; `>=` for `>`."""
    for length, more in ((160, ""), (161, "..")):
        field = "x" * length
        with pytest.raises(errors.DataError) as caught:
            jsonlines.text({field: 1}, "t", "f:1", "fix")
        assert f"(found: {'x' * 160}{more}); fix." in str(caught.value)
    with pytest.raises(errors.DataError, match=r"\(found: none\)"):
        jsonlines.text({}, "t", "f:1", "fix")
    for value, kind in (([1], "a list"), (True, "true or false"), (2.5, "a number")):
        with pytest.raises(errors.DataError, match=f"it holds {kind}"):
            jsonlines.text({"t": value}, "t", "f:1", "fix")
    named = {"a": {}, "b": {"c": 1}}
    with pytest.raises(errors.DataError, match=r"\(found: a, b\.c\)"):
        jsonlines.text(named, "t", "f:1", "fix")


def test_a_faulty_disk(tmp_path, monkeypatch):
    """In one line; what is nobody's fault is not hidden. Mutation: every error is damage."""
    path = tmp_path / "a.txt"
    path.write_text("a")

    def refuse(error):
        def raw(path, size):
            raise error
            yield

        monkeypatch.setattr(blocks, "_raw", raw)
        return list(blocks.read(path))

    with pytest.raises(
        errors.DataError, match=r"a\.txt: cannot be read \(Input/output"
    ):
        refuse(OSError(5, "Input/output error"))
    with pytest.raises(errors.DataError, match=r"cannot be read \(odd\)"):
        refuse(OSError("odd"))
    with pytest.raises(ZeroDivisionError):
        refuse(ZeroDivisionError("a fault of ours"))
    theirs = type("ZstdError", (Exception,), {})
    with pytest.raises(errors.DataError, match=r"damaged or truncated \(bad\)"):
        refuse(theirs("bad"))
    assert not blocks.is_json_lines(tmp_path / "gone.jl")


class Frame:
    """Stands for zstandard's reader: a frame is its text and a full stop."""

    eof, unused_data = False, b""

    def decompress(self, data):
        text, stop, self.unused_data = data.partition(b".")
        self.eof = bool(stop)
        return text


def test_frames_of_zstandard(tmp_path, monkeypatch):
    """One after another, over blocks and inside of one; a cut one is no whole one.

    Mutations: blocks that are empty yielded; what is left of a block dropped; the cut
    forgiven.
    """
    decompressor = types.SimpleNamespace(decompressobj=Frame)
    module = types.SimpleNamespace(ZstdDecompressor=lambda: decompressor)
    monkeypatch.setitem(sys.modules, "zstandard", module)
    path = tmp_path / "a.jsonl.ZST"
    for block in (1, 3, 1 << 20):
        monkeypatch.setattr(blocks, "BLOCK", block)
        path.write_bytes(b'{"text": "a"}\n.{"text": "b"}\n.')
        assert b"".join(blocks.read(path)) == b'{"text": "a"}\n{"text": "b"}\n'
        assert all(blocks._raw(path, 8))
        found = local_files.read_documents([("k", path)], local_files.Reading())
        assert [text for _, text, _ in found] == ["a", "b"]
        path.write_bytes(b"whole.cut")
        with pytest.raises(errors.DataError, match=r"truncated .ends inside a frame"):
            list(blocks.read(path))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(
        errors.DataError, match=r"a\.jsonl\.ZST: reading \.zst needs the"
    ):
        list(blocks.read(path))


def test_small_blocks_and_marks(tmp_path, monkeypatch):
    """A mark may lie across blocks; a file of fewer bytes than it has none.

    Mutations: `<=` for `<`; the rest of the blocks dropped.
    """
    path = tmp_path / "a.txt"
    for block in (1, 2, 3, 4):
        monkeypatch.setattr(blocks, "BLOCK", block)
        for content in (b"a", b"ab", b"abcdef", BOM[:2]):
            path.write_bytes(content)
            assert b"".join(blocks.read(path)) == content
            path.write_bytes(BOM + content)
            assert b"".join(blocks.read(path)) == content
            assert blocks.head(path) == content
