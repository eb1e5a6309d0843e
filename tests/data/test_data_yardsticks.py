"""Yardsticks against a plain-Python oracle, and the command line around the data."""

import collections
import errno
import io
import json
import math
import pathlib
import random
import subprocess
import sys
import zlib

import data_helpers
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
    dataset = data.open(data_helpers.config(tmp_path, data_helpers.texts(60)))
    seen = []
    compute = yardsticks.compute
    monkeypatch.setattr(
        yardsticks, "compute", lambda *args: seen.append(args) or compute(*args)
    )
    result = yardsticks.measure(dataset)
    train, validation = seen[0]
    splits = dataset.manifest["splits"]
    assert len(train) == splits["train"]["bytes"] == result["train_bytes"]
    assert len(validation) == splits["validation"]["bytes"]
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
                  "tokenizer": "bytes", "validation_every": 5,
                  "align_documents": 200}},
        "model": {{"seq_len": 600}}, "train": {{"batch_size": 3, "seed": 1}},
    }})
"""


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "memoryformer.data", *arguments],
        capture_output=True,
        text=True,
    )


def described(dataset, row):
    """What inspect says of a row of the first batch: each segment, column by column."""
    batch = {k: v[row] for k, v in dataset.train.batches(600, 3, 1).batch(0).items()}
    eot, decode = dataset.tokenizer.eot_id, dataset.tokenizer.decode
    lines = []
    for segment in sorted({*batch["segment_ids"].tolist()} - {0}):
        columns = [c for c in range(600) if batch["segment_ids"][c] == segment]
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


def test_the_commands(tmp_path):
    """inspect shows counts and segments; errors are one line with their exit code.

    Mutations: `segment_ids != segment`; the target of another column; documents as they
    lie where the config aligns them; a flag that is not looked at.
    """
    corpus = data_helpers.folder(tmp_path / "corpus", data_helpers.texts(60))
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(path=str(corpus), cache=str(tmp_path / "cache")))
    shown = command("inspect", f"--config={config}", "--verify")
    assert shown.returncode == 0, shown.stderr
    directory = shown.stdout.split()[1]
    dataset = data.open_directory(directory, align=200)
    counts = dataset.manifest["splits"]["train"]
    assert (
        f"{counts['documents']:,} documents, {counts['tokens']:,} tokens"
        in shown.stdout
    )
    assert f"{counts['documents']:,} ends of document" in shown.stdout
    assert f"{dataset.fingerprint} (verified)" in shown.stdout
    assert "first batch: 3 x 600, seed 1" in shown.stdout
    rows = [line for line in shown.stdout.split("\n") if line.startswith("row ")]
    assert rows == [*described(dataset, 0), *described(dataset, 1)]
    assert "'document" in shown.stdout and "-> <eot>" in shown.stdout
    assert any("columns 200.." in row for row in rows)

    measured = command("yardsticks", f"--config={config}", "--json")
    assert json.loads(measured.stdout) == yardsticks.measure(dataset)

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
        assert failed.returncode == code, failed.stderr
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
        assert words in failed.stderr


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
    dataset = data.open(data_helpers.config(tmp_path, data_helpers.texts(60)))

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for name in ("write_bytes", "unlink"):
        monkeypatch.setattr(pathlib.Path, name, refuse)
    result = yardsticks.measure(dataset)
    assert result["validation_bytes"] > 0
    assert not (dataset.directory / "yardsticks.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"key": 1}', "[" * 100_000])
def test_a_damaged_file_of_yardsticks_is_replaced(tmp_path, content):
    dataset = data.open(data_helpers.config(tmp_path, data_helpers.texts(20)))
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
