"""Yardsticks against a plain-Python oracle, and the command line around the data."""

import bz2
import collections
import errno
import io
import json
import lzma
import math
import pathlib
import random
import sys
import types
import zlib

import data_helpers
import numpy as np
import pytest

from memoryformer import data, errors
from memoryformer.data import __main__ as data_command
from memoryformer.data import yardsticks


def oracle(train, text, max_order):
    """Witten-Bell straight from its definition, with dictionaries."""
    successors = collections.defaultdict(collections.Counter)
    for start in range(len(train) - max_order + 1):
        for order in range(1, max_order + 1):
            gram = train[start : start + order]
            successors[gram[:-1]][gram[-1]] += 1

    def probability(context, byte):
        shorter = probability(context[1:], byte) if context else 1 / 256
        seen = successors.get(context)
        if not seen:
            return shorter
        kinds = len(seen)
        return (seen[byte] + kinds * shorter) / (sum(seen.values()) + kinds)

    bits = []
    for order in range(1, max_order + 1):
        nats = sum(
            math.log(probability(text[max(0, i - order + 1) : i], text[i]))
            for i in range(len(text))
        )
        bits.append(-nats / math.log(2) / len(text))
    return bits


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ngrams_equal_the_definition(seed):
    """Red if types are counted as tokens, or a context is cut on the wrong side."""
    rng = random.Random(seed)
    words = [rng.randbytes(3), b"abab", b"the ", b"\0\0", b"\xff"]
    train = b"".join(rng.choices(words, k=150))
    text = b"".join(rng.choices([*words, b"new"], k=60))
    assert yardsticks.ngram_bits(train, text) == pytest.approx(
        oracle(train, text, yardsticks.MAX_ORDER), rel=1e-12
    )


def test_an_ngram_model_is_a_distribution():
    """The probabilities of all 256 next bytes add up to 1 (red if T(h) is dropped)."""
    train = b"abracadabra " * 20
    total = 0.0
    for byte in range(256):
        text = b"abracad" + bytes([byte])
        context = yardsticks.ngram_bits(train, text[:-1], 3)[-1] * 7
        whole = yardsticks.ngram_bits(train, text, 3)[-1] * 8
        total += 2 ** (context - whole)
    assert total == pytest.approx(1, rel=1e-9)


def test_compressors_see_what_they_should():
    """Red if xz-after-train does not see train, or sees too little of it."""
    rng = random.Random(0)
    train = rng.randbytes(200_000)
    seen_before = train[20_000:60_000]
    result = yardsticks.compute(train, seen_before)
    assert result["zlib_6"] == len(zlib.compress(seen_before, 6)) / len(seen_before) * 8
    assert result["xz_6"] > 7.9 and result["bz2_9"] > 7.9
    assert 0 < result["xz_6_after_train"] < 0.1
    assert result["ngram_7"] < result["ngram_2"]


def test_measuring_uses_the_documents_and_is_kept(tmp_path, monkeypatch):
    """Red if the end-of-document token becomes text, or the cache ignores the data."""
    dataset = data.load(data_helpers.config(tmp_path, data_helpers.texts(60)))
    seen = []
    compute = yardsticks.compute
    monkeypatch.setattr(
        yardsticks, "compute", lambda *args: seen.append(args) or compute(*args)
    )
    result = yardsticks.measure(dataset)
    train, validation = seen[0]
    splits = dataset.manifest.splits
    assert len(train) == splits["train"].bytes == result["train_bytes"]
    assert len(validation) == splits["validation"].bytes
    joined = (train + validation).decode()
    assert all(text in joined for text in data_helpers.texts(60))
    assert yardsticks.measure(dataset) == result and len(seen) == 1
    path = dataset.directory / "yardsticks.json"
    path.write_text(path.read_text().replace(dataset.fingerprint, "another"))
    assert yardsticks.measure(dataset) == result and len(seen) == 2
    assert "zlib_6" in yardsticks.table(result)


CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({{
        "data": {{"source": "text", "path": {path!r}, "data_dir": {cache!r},
                  "tokenizer": "bytes", "source_options": {{"validation_every": 5}},
                  "align_documents": 200}},
        "model": {{"seq_len": 600}}, "train": {{"batch_size": 3, "seed": 1}},
    }})
"""


def described(dataset, row, sizes=(600, 3, 1)):
    """What inspect says of a row of the first batch: each segment, column by column."""
    batch = {k: v[row] for k, v in dataset.train.batches(*sizes).batch(0).items()}
    eot, decode = dataset.tokenizer.eot_id, dataset.tokenizer.decode
    lines = []
    for segment in sorted({*batch["segment_ids"].tolist()} - {0}):
        columns = [c for c in range(sizes[0]) if batch["segment_ids"][c] == segment]
        inputs = batch["inputs"][columns].tolist()
        text = decode(inputs)
        text = repr(text) if len(text) <= 160 else f"{text[:100]!r} .. {text[-50:]!r}"
        target = int(batch["targets"][columns[-1]])
        lines.append(
            f"row {row} segment {segment}: columns {columns[0]}..{columns[-1]}, positions "
            f"0..{len(columns) - 1}, {'<eot>' if inputs[0] == eot else '...'} {text} -> "
            f"{'<eot>' if target == eot else repr(decode([target]))}"
        )
    return lines


def test_the_commands(tmp_path, runner):
    """inspect shows counts and segments; errors are one line with their exit code.

    Mutations: `segment_ids != segment`; the target of another column; documents as they
    lie where the config aligns them; a flag that is not looked at.
    """

    def command(*arguments):
        return runner.command("-m", "memoryformer.data", *arguments)

    corpus = data_helpers.folder(tmp_path / "corpus", data_helpers.texts(60))
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(path=str(corpus), cache=str(tmp_path / "cache")))
    shown = command("inspect", f"--config={config}", "--verify")
    assert shown.code == 0, shown
    directory = shown.out.split()[1]
    dataset = data.load_directory(directory, align=200)
    counts = dataset.manifest.splits["train"]
    assert f"{counts.documents:,} documents, {counts.tokens:,} tokens" in shown.out
    assert f"{counts.documents:,} ends of document" in shown.out
    assert f"{dataset.fingerprint} (verified)" in shown.out
    assert "first batch: 3 x 600, seed 1" in shown.out
    rows = [line for line in shown.out.split("\n") if line.startswith("row ")]
    assert rows == [*described(dataset, 0), *described(dataset, 1)]
    assert "'document" in shown.out and "-> <eot>" in shown.out
    assert any("columns 200.." in row for row in rows)

    measured = command("yardsticks", f"--config={config}", "--json")
    assert json.loads(measured.out) == yardsticks.measure(dataset)

    broken = tmp_path / "broken.py"
    broken.write_text(CONFIG.format(path=str(tmp_path / "gone"), cache=str(tmp_path)))
    for arguments, code, words in (
        (["inspect", f"--config={broken}"], 46, "no such file or folder"),
        (["inspect", "--config=missing.py"], 2, "there is no file"),
        (["prepare", "--json"], 2, "--json: prepare does not look at it"),
        (
            ["inspect", f"--config={config}", "--config.train.seed=-5"],
            2,
            "seed=-5: must",
        ),
        (["inspect", "--json", "--rows=3"], 2, "--rows: --json prints no rows"),
    ):
        failed = command(*arguments)
        assert failed.code == code, failed
        assert failed.err.startswith("error: ") and failed.err.count("\n") == 1
        assert words in failed.err


@pytest.mark.parametrize("out", ["ascii", "closed"])
def test_any_text_is_shown_on_any_terminal(tmp_path, monkeypatch, out):
    """French text on a terminal of ASCII; a standard output that is closed.

    Mutation: `sys.stdout.reconfigure(errors="surrogateescape")` in the command.
    """
    texts = [f"été à Noël, document {i}. " * 40 for i in range(30)]
    corpus = data_helpers.folder(tmp_path / "corpus", texts)
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(path=str(corpus), cache=str(tmp_path / "cache")))
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii") if out == "ascii" else None
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        data_command.main(["data", "inspect", f"--config={config}"])
    assert not ended.value.code
    if stream:
        stream.flush()
        assert b"\\xe9t\\xe9 \\xe0 No\\xebl" in written.getvalue()


def test_data_that_cannot_be_written_are_measured_too(tmp_path, monkeypatch):
    """A read-only file system refuses even to remove. Mutation: no `suppress` in `_write`."""
    dataset = data.load(data_helpers.config(tmp_path, data_helpers.texts(60)))

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for name in ("write_bytes", "unlink"):
        monkeypatch.setattr(pathlib.Path, name, refuse)
    result = yardsticks.measure(dataset)
    assert result["validation_bytes"] > 0
    assert not (dataset.directory / "yardsticks.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"key": 1}', "[" * 100_000])
def test_a_damaged_file_of_yardsticks_is_replaced(tmp_path, content):
    dataset = data.load(data_helpers.config(tmp_path, data_helpers.texts(20)))
    path = dataset.directory / "yardsticks.json"
    path.write_text(content)
    result = yardsticks.measure(dataset)
    assert json.loads(path.read_text())["bits_per_byte"] == result


def test_no_text_to_measure_is_told():
    """Mutation: the check left out: a division by zero."""
    with pytest.raises(errors.DataError, match="validation: holds no bytes"):
        yardsticks.compute(b"some text", b"")


def test_a_train_split_shorter_than_a_window():
    """Nothing is counted, every byte costs 8 bits. Red if it is an IndexError."""
    assert yardsticks.ngram_bits(b"abc", b"abcabc", 7) == [8.0] * 7
    assert yardsticks.ngram_bits(b"", b"x", 3) == oracle(b"", b"x", 3)


def run_command(capsys, *arguments):
    """What the command shows in this process, and its exit code."""
    with pytest.raises(SystemExit) as ended:
        data_command.main(["data", *arguments])
    out, err = capsys.readouterr()
    return out + err, ended.value.code or 0


BARE = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({{
        "data": {{"source": "text", "path": {path!r}, "data_dir": {cache!r},
                  "tokenizer": "bytes", "source_options": {{"validation_every": 5}}}}{more},
    }})
"""


def test_inspect_without_a_model(tmp_path, capsys, monkeypatch):
    """Rows of 256 by four, of which two are shown; the twelve most frequent tokens.

    Mutations: any default; a token more or fewer; tokens never seen counted wrongly.
    """
    corpus = data_helpers.folder(tmp_path / "corpus", data_helpers.texts(40))
    config = tmp_path / "config.py"

    def write(more=""):
        cache = str(tmp_path / "cache")
        text = BARE.format(path=str(corpus), cache=cache, more=more)
        config.write_text(text)
        return f"--config={config}"

    shown, code = run_command(capsys, "inspect", write())
    assert code == 0
    directory = shown.split()[1]
    dataset = data.load_directory(directory)
    assert f"\nfingerprint  {dataset.fingerprint}\n" in shown
    windows = (len(dataset.train.tokens) - 1) // 256
    assert f"first batch: 4 x 256, seed 0, {windows} windows per epoch" in shown
    rows = [line for line in shown.split("\n") if line.startswith("row ")]
    sizes = (256, 4, 0)
    assert rows == [*described(dataset, 0, sizes), *described(dataset, 1, sizes)]
    assert any(", ... " in row for row in rows) and any(
        ", <eot> " in row for row in rows
    )
    counts = collections.Counter(dataset.train.tokens.tolist())
    best = sorted(range(257), key=lambda token: (-counts[token], token))[:12]
    total = len(dataset.train.tokens)
    pieces = [
        f"{'<eot>' if t == 256 else repr(dataset.tokenizer.decode([t]))} "
        f"{counts[t] / total:.1%}"
        for t in best
    ]
    assert f"most frequent {'  '.join(pieces)}\n" in shown
    assert f"never seen   {257 - len(counts)} of 257 tokens in train" in shown
    split = dataset.manifest.splits["train"]
    ratio = split.bytes / split.tokens
    assert f"{split.bytes:,} bytes ({ratio:.3f} bytes/token); dropped 0" in shown
    head = shown.split("\n")
    assert head[2] == f"source       text {corpus} the corpus's own"
    sha256 = dataset.tokenizer.fingerprint[:16]
    used = f"bytes: 257 tokens, end of document 256, sha256 {sha256}"
    assert head[3] == f"tokenizer    {used}" and "\nnote" not in shown
    assert [line.split()[0] for line in head[4:6]] == ["validation", "train"]
    for rows, wanted in (("0", set()), ("4", set("0123")), ("9", set("0123"))):
        shown, code = run_command(capsys, "inspect", write(), f"--rows={rows}")
        assert code == 0
        lines = [line for line in shown.split("\n") if line.startswith("row ")]
        assert {line.split()[1] for line in lines} == wanted
    assert run_command(capsys, "prepare", write()) == (f"{directory}\n", 0)
    shown, _ = run_command(capsys, "inspect", write(), "--json")
    assert json.loads(shown) == {"directory": directory, **dataset.manifest.to_json()}
    shown, _ = run_command(capsys, "yardsticks", write())
    assert shown.strip() == yardsticks.table(yardsticks.measure(dataset))
    for more, message in (
        (', "train": {"seed": 2**31}', "train.seed=2147483648: must be in"),
        (', "train": {"batch_size": True}', "train.batch_size=True: expected int"),
        (', "train": {"batch_size": "4"}', "train.batch_size='4': expected int"),
        (', "train": 3', "train=3: expected a section of fields"),
    ):
        shown, code = run_command(capsys, "inspect", write(more))
        assert code == 2 and message in shown
    last = write(', "train": {"seed": 2**31 - 1, "batch_size": 2}, "model": {}')
    shown, code = run_command(capsys, "inspect", last)
    assert code == 0 and "first batch: 2 x 256, seed 2147483647" in shown
    monkeypatch.setattr(data_command.manifest_lib, "byte_note", lambda manifest: "odd")
    shown, _ = run_command(capsys, "inspect", write())
    assert "\nnote         odd\n" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give one command of prepare, inspect, yardsticks"),
        (["prepare", "inspect"], "give one command of"),
        (["inspct"], "command='inspct': unknown choice; did you mean 'inspect'"),
        (["prepare", "--verify"], "--verify: prepare does not look at it"),
        (["yardsticks", "--rows=1"], "--rows: yardsticks does not look at it"),
        (["inspect", "--rows=-1"], "rows"),
    ],
)
def test_commands_that_cannot_be(arguments, message, capsys):
    """Mutations: `and` for `or`; any check left out; rows below 0."""
    shown, code = run_command(capsys, *arguments)
    assert code == 2 and message in shown and shown.startswith("error: ")


def test_what_is_looked_at(tmp_path, monkeypatch):
    """So many bytes of each split, and no more; a cache only where it is wanted.

    Mutations: `>` for `>=`; the limit not cut to; `cache` the other way round.
    """
    dataset = data.load(data_helpers.config(tmp_path, data_helpers.texts(30)))
    text = yardsticks._split_bytes(dataset.train, dataset.tokenizer, 1 << 20)
    read = []

    class Tokens:
        def __len__(self):
            return len(dataset.train.tokens)

        def __getitem__(self, part):
            read.append(part.start)
            return dataset.train.tokens[part]

    split = type("S", (), {"tokens": Tokens()})
    monkeypatch.setattr(yardsticks, "CHUNK_TOKENS", 100)
    got = yardsticks._split_bytes(split, dataset.tokenizer, 150)
    assert got == text[:150] and read == [0, 100]
    first = len(dataset.tokenizer.decode_bytes(dataset.train.tokens[:100].tolist()))
    read.clear()
    assert yardsticks._split_bytes(split, dataset.tokenizer, first) == text[:first]
    assert read == [0]
    begins = []

    class Pieces:  # of a tokenizer that puts a blank in front of every document
        eot_id = int(dataset.train.tokens[99])

        def decode_bytes(self, ids, start):
            begins.append(start)
            return b"."

    yardsticks._split_bytes(split, Pieces(), 3)
    assert begins == [True, True, int(dataset.train.tokens[199]) == Pieces.eot_id]
    limits = yardsticks.TRAIN_LIMIT, yardsticks.VALIDATION_LIMIT
    assert limits == (32 << 20, 16 << 20)
    path = dataset.directory / "yardsticks.json"
    result = yardsticks.measure(dataset, cache=False)
    assert not path.exists()
    assert yardsticks.measure(dataset) == result and path.exists()
    kept = json.loads(path.read_text())
    assert path.read_text() == json.dumps(kept, indent=2) + "\n"
    assert kept["key"] == {"version": 1, "fingerprint": dataset.fingerprint}
    kept["bits_per_byte"] = {"zlib_6": 3.0}
    path.write_text(json.dumps(kept))
    assert yardsticks.measure(dataset) == {"zlib_6": 3.0}
    assert yardsticks.measure(dataset, cache=False) == result
    assert [p.name for p in dataset.directory.glob(".yardsticks*")] == []


def test_the_levels_are_those_of_their_names():
    """Mutations: any level; the dictionary a byte smaller or larger than 64 MB."""
    text = bytes(random.Random(0).choices(range(6), k=30_000))
    result = yardsticks.compute(b"", text)
    scale = 8 / len(text)
    assert result["zlib_6"] == len(zlib.compress(text, 6)) * scale
    assert result["bz2_9"] == len(bz2.compress(text, 9)) * scale
    assert result["xz_6"] == len(lzma.compress(text, preset=6)) * scale
    wide = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 << 20}
    alone = len(lzma.compress(text, filters=[wide])) - len(
        lzma.compress(b"", filters=[wide])
    )
    assert result["xz_6_after_train"] == pytest.approx(alone * scale, rel=1e-12)
    assert (result["train_bytes"], result["validation_bytes"]) == (0, 30_000)
    table = yardsticks.table(result)
    assert table.startswith(
        "bits per byte of 30,000 validation bytes (0 train bytes seen)\n"
    )
    assert [line.split()[0] for line in table.split("\n")[1:]] == [
        "zlib_6",
        "bz2_9",
        "xz_6",
        "xz_6_after_train",
        *(f"ngram_{n}" for n in range(1, 8)),
    ]


@pytest.mark.parametrize("length", [160, 161])
def test_long_segments_are_shown_by_their_ends(length, capsys):
    """From 161 characters on. Mutations: any of the numbers by one."""
    tokenizer = data_command.data.tokenizer.byte_level()
    text = "".join(chr(97 + i % 26) for i in range(length))
    inputs = np.array([[256, *text.encode()]])
    ones = np.ones_like(inputs)
    batch = {
        "inputs": inputs,
        "targets": np.roll(inputs, -1, axis=1),
        "segment_ids": ones,
        "positions": np.arange(length + 1)[None],
    }
    data_command._print_row(batch, 0, tokenizer)
    shown = repr(text) if length == 160 else f"{text[:100]!r} .. {text[-50:]!r}"
    where = f"columns 0..{length}, positions 0..{length}"
    line = f"row 0 segment 1: {where}, <eot> {shown} -> <eot>\n"
    assert capsys.readouterr().out == line


def test_which_share_is_prepared(tmp_path, capsys):
    """i/n with i below n, in under twenty signs; the folder is named once all parts are there.

    Mutations: `<=` for `<`; a share for the whole; a folder that is not there printed.
    """
    assert data_command._share(None) == (0, 1)
    for text, share in (
        ("0/1", (0, 1)),
        ("63/64", (63, 64)),
        ("000000001/000000002", (1, 2)),
    ):
        assert data_command._share(text) == share
    for text in ("1/1", "64/64", "-1/3", "1/", "/3", "3", "a/3", "1/0", "0/0", " 0/1"):
        with pytest.raises(
            errors.ConfigError, match=r"write i/n with 0 <= i < n, as in"
        ):
            data_command._share(text)
    with pytest.raises(errors.ConfigError, match="write i/n"):
        data_command._share("0000000001/000000002")
    corpus = tmp_path / "corpus"
    for n in range(3):
        texts = data_helpers.texts(20, seed=n)
        data_helpers.jsonl_gz(corpus / f"{n}.jsonl.gz", texts)
    config = tmp_path / "config.py"
    text = BARE.format(path=str(corpus), cache=str(tmp_path / "cache"), more="")
    text = text.replace('"text"', '"c4"')
    text = text.replace(
        '"validation_every": 5', '"validation_every": 5, "part_bytes": 900'
    )
    config.write_text(text)
    flags = (f"--config={config}",)
    shown, code = run_command(capsys, "prepare", *flags, "--part=1/2")
    assert code == 0, shown
    assert "parts are done\n" in shown and len(shown.split("\n")) == 2
    directory = list((tmp_path / "cache").iterdir())
    shown, code = run_command(capsys, "prepare", *flags, "--part=0/2")
    assert code == 0 and shown.startswith(str(tmp_path / "cache")) and directory
    shown, code = run_command(capsys, "inspect", *flags)
    dataset = data.load_directory(shown.split()[1])
    for name, split in dataset.manifest.splits.items():
        (line,) = (row for row in shown.split("\n") if row.startswith(f"{name:12s} "))
        assert line.endswith(f"0 also in validation; in {len(split.parts)} files")
    for more in (("--parallel=2",), ("--part=0/2",)):
        shown, code = run_command(
            capsys, "prepare", *flags, "--runner=DirectRunner", *more
        )
        assert code == 2 and "--runner deals the parts itself" in shown
    shown, code = run_command(capsys, "export", *flags)
    assert code == 2 and "--output: name the folder to write to" in shown


def test_what_is_said_of_a_split():
    """Of files in parts, of equal texts, of tokens that were sampled. Mutations: any of it."""
    counts = {"documents": 2, "tokens": 40, "ends_of_document": 2, "bytes": 30}
    counts |= {"token_bytes": 30, "empty_dropped": 3, "sha256": ""}
    counts |= {"duplicates_of_validation_dropped": 4, "file": ""}
    whole = ", 30 bytes (0.750 bytes/token); dropped 3 empty, 4 also in validation"
    manifest, tokens = data_command.manifest_lib, data_command.megatron.MegatronFacts
    parted = manifest.PartedFacts(**counts)
    assert data_command._more(manifest.SplitFacts(**counts)) == whole
    assert data_command._more(parted) == f"{whole}; in 0 files"
    dropped = {"deduplicated": True, "duplicates_dropped": 5}
    said = data_command._more(manifest.PartedFacts(**counts, **dropped))
    assert said == f"{whole}, 5 equal texts; in 0 files"
    sampled = tokens(**counts, sampled_tokens=1234)
    assert data_command._more(sampled) == " (of 1,234 tokens looked at)"
    weighed = tokens(**counts, sampled_tokens=7, weights=(7, 3))
    assert data_command._more(weighed) == " (of 7 tokens looked at); weights (7, 3)"
    assert tokens(**counts).sampled_tokens == parted.duplicates_dropped == 0
    assert parted.deduplicated is False


def test_frequencies_of_fifty_million_tokens(capsys):
    """And of no more: a corpus may have many times that. Mutation: one token more."""
    seen = []

    class Tokens:
        def __getitem__(self, index):
            seen.append(index)
            return np.array([1, 1, 0])

    tokenizer = types.SimpleNamespace(
        vocab_size=3, eot_id=2, decode=lambda ids, start: "x"
    )
    train = types.SimpleNamespace(tokens=Tokens(), vocab_size=3, path="p")
    data_command._print_frequencies(
        types.SimpleNamespace(train=train, tokenizer=tokenizer)
    )
    assert seen == [slice(None, 50_000_000)]
    assert "most frequent 'x' 66.7%  'x' 33.3%  <eot> 0.0%\n" in capsys.readouterr().out
