"""A corpus in parts: the same bytes for any number of processes, in any order, killed or not."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import lzma
import os
import pathlib
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import data_helpers
import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from memoryformer import data, errors
from memoryformer.data import (
    digests,
    identity,
    jsonlines,
    local_files,
    part_files,
    part_processes,
    part_runner,
    parts,
    token_files,
)
from memoryformer.data import manifest as manifest_lib
from memoryformer.data import parquet as parquet_lib
from memoryformer.data import progress as progress_lib
from memoryformer.files import lock

EVERY = 5
PREPARE = """
import json, os, signal, sys
from memoryformer import data

def watch(event, arguments):
    begins = event == "open" and set(str(arguments[1])) & set("wxb")
    if begins and sys.argv[3:] and sys.argv[3] in os.path.basename(os.fsdecode(arguments[0])):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
config = data.DataConfig(**json.loads(sys.argv[1]))
print(data.prepare(config, parallel=int(sys.argv[2])))
"""


def corpus(folder, num_files=4, count=40, repeats=()):
    """JSON lines with texts in an order of their own; returns all texts, file by file."""
    folder.mkdir(parents=True)
    texts = [data_helpers.texts(count, seed=n) for n in range(num_files)]
    for place, text in repeats:
        texts[place].insert(len(texts[place]) // 2, text)
    for n, of_file in enumerate(texts):
        lines = (json.dumps({"text": text}) for text in of_file)
        (folder / f"{n}.jsonl").write_text("\n".join(lines) + "\n")
    return texts


def config(folder, cache, tokenizer="bytes", **options):
    return data.DataConfig(
        source="c4",
        path=str(folder),
        tokenizer=tokenizer,
        source_options={"validation_every": EVERY, "part_bytes": 3000} | options,
        data_dir=str(cache),
    )


def documents(split):
    """The texts of a split in order, from its tokens."""
    tokens = np.array(split.tokens[:], np.int64)
    ends = np.flatnonzero(tokens == 256)
    assert ends[0] == 0 and ends[-1] == len(tokens) - 1
    return [
        bytes(tokens[a + 1 : b].astype(np.uint8)).decode()
        for a, b in itertools.pairwise(ends)
    ]


def held_out(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % EVERY == 0


def contents(directory):
    """{relative path: bytes} of all that lies in a folder."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def start(config, parallel=1, killed_at=""):
    fields = json.dumps(dataclasses.asdict(config))
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            PREPARE,
            fields,
            str(parallel),
            *filter(None, [killed_at]),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def alive(group):
    """Whether a process of this group runs, dead ones that nobody has asked for apart."""
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(of_group) == group and state not in "ZX":
            return True
    return False


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(folder, its texts by file)."""
    folder = tmp_path_factory.mktemp("parts") / "corpus"
    return folder, corpus(folder)


@pytest.fixture(scope="module")
def undisturbed(texts, tmp_path_factory):
    return data.load(config(texts[0], tmp_path_factory.mktemp("cache")))


def test_every_text_is_there_once(texts, undisturbed):
    """Against a split by hashlib. Red if shares overlap, or a part drops its last batch."""
    _, by_file = texts
    every_text = [text for of_file in by_file for text in of_file]
    assert len(undisturbed.train.facts.parts) > 4
    for split, wanted in (("train", False), ("validation", True)):
        found = documents(getattr(undisturbed, split))
        expected = [text for text in every_text if held_out(text) == wanted]
        assert sorted(found) == sorted(expected)
        facts = undisturbed.manifest.splits[split]
        assert facts.documents == facts.ends_of_document == len(expected)
        assert (
            facts.bytes == facts.token_bytes == sum(len(t.encode()) for t in expected)
        )
        assert facts.tokens == len(getattr(undisturbed, split).tokens)
    manifest_lib.read(undisturbed.directory, verify=True)


def test_processes_and_order_change_nothing(texts, undisturbed, tmp_path):
    """Two processes; shares of three, the last first. Red if a file names its process."""
    expected = contents(undisturbed.directory)
    both = data.prepare(config(texts[0], tmp_path / "two"), parallel=2)
    assert contents(both) == expected
    for number in (2, 0, 1):
        here = config(texts[0], tmp_path / "shares")
        directory = data.prepare(here, share=(number, 3))
        assert directory.exists() == (number == 1)
    assert contents(directory) == expected
    kept = {path.name[:6] for path in (tmp_path / "shares").iterdir()}
    assert kept == {".lock-", directory.name[:6]}


def test_killed_it_does_what_is_missing(texts, undisturbed, tmp_path):
    """SIGKILL as part 3 is written; what was done before is not written again.

    Red if the folder is cleared, or a part counts as done before its files.
    """
    here = config(texts[0], tmp_path)
    process = start(here, killed_at="train-00003-of-")
    _, told = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, told
    work = data.resolve_dir(here)
    work = work.with_name(f".parts-{work.name}")
    done = {p.name: p.stat().st_ino for p in (work / "parts").iterdir()}
    assert set(done) == {"00000.json", "00001.json", "00002.json"}
    files = {p.name: p.stat().st_ino for p in work.glob("*0000[012]-of-*.bin")}
    directory = data.prepare(here, show_progress=False)
    assert contents(directory) == contents(undisturbed.directory)
    for name, inode in (done | files).items():
        found = next(directory.rglob(name))
        assert found.stat().st_ino == inode, name


def test_asked_to_stop_it_keeps_what_is_done(texts, tmp_path):
    """Red if the line says that nothing is kept."""
    here = config(texts[0], tmp_path)
    done = tmp_path.glob
    with pytest.raises(errors.Preempted, match="finished parts are kept"):
        data.prepare(here, stop=lambda: len(list(done(".parts-*/parts/*.json"))) >= 2)
    assert len(list(done(".parts-*/parts/*.json"))) == 2
    data.prepare(here, show_progress=False)


def test_equal_texts_are_kept_once(tmp_path, monkeypatch):
    """The first of them stays, across parts and their batches.

    Red if `first` is not compared, or texts are not counted over batches.
    """
    again = data_helpers.texts(40, seed=0)[3]
    other = data_helpers.texts(40, seed=1)[7]
    repeats = [(0, again), (2, again), (3, again), (3, other), (3, other)]
    by_file = corpus(tmp_path / "corpus", repeats=repeats)
    every_text = [text for of_file in by_file for text in of_file]
    here = config(tmp_path / "corpus", tmp_path / "a", deduplicate=True)
    dataset = data.load(here)
    found = documents(dataset.train) + documents(dataset.validation)
    assert sorted(found) == sorted(set(every_text))
    facts = dataset.manifest.splits
    assert all(split.deduplicated for split in facts.values())
    dropped = sum(split.duplicates_dropped for split in facts.values())
    assert dropped == len(every_text) - len(set(every_text)) == 5
    shares = config(tmp_path / "corpus", tmp_path / "b", deduplicate=True)
    for number in (1, 0):
        directory = data.prepare(shares, share=(number, 2))
    assert contents(directory) == contents(dataset.directory)
    monkeypatch.setattr(part_files, "_BATCH_CHARS", 300)
    batched = config(tmp_path / "corpus", tmp_path / "d", deduplicate=True)
    assert contents(data.load(batched).directory) == contents(dataset.directory)
    one = config(tmp_path / "corpus", tmp_path / "c", deduplicate=True, part_bytes=0)
    found = documents(data.load(one).train)
    in_train = [text for text in every_text if not held_out(text)]
    assert found == list(dict.fromkeys(in_train))


def test_held_out_files(texts, tmp_path):
    """Their texts are in validation alone. Red if train is not compared with them."""
    folder, by_file = texts
    apart = [*by_file[1][5:10], "a new one"]
    data_helpers.jsonl_gz(tmp_path / "v" / "v.jsonl.gz", apart)
    here = config(
        folder, tmp_path / "c", validation_path=str(tmp_path / "v"), validation_every=20
    )
    dataset = data.load(here)
    every_text = [text for of_file in by_file for text in of_file]
    assert documents(dataset.validation) == apart
    expected = sorted(set(every_text) - set(apart))
    assert sorted(documents(dataset.train)) == expected
    assert dataset.train.facts.duplicates_of_validation_dropped == 5
    assert all(path.stat().st_size for path in dataset.directory.glob("*.bin"))


def test_a_split_without_text_is_one_line(tmp_path):
    """And nothing is there to be read. Red if `finish` skips the check."""
    kept = [text for text in map("text {}".format, range(60)) if not held_out(text)]
    data_helpers.jsonl_gz(tmp_path / "corpus" / "a.jsonl.gz", kept)
    with pytest.raises(
        errors.DataError, match="validation: no document holds any text"
    ):
        data.load(config(tmp_path / "corpus", tmp_path / "c", part_bytes=50))
    assert not list((tmp_path / "c").rglob("manifest.json"))


def test_what_is_odd_about_a_corpus_is_said_once(tmp_path, monkeypatch, capsys):
    """Of all parts together. Red if `finish` says nothing, or a part by itself does."""
    texts = [f"text {n}{'<|endoftext|>' * (n % 4 == 0)}" for n in range(60)]
    data_helpers.jsonl_gz(tmp_path / "corpus" / "a.jsonl.gz", texts)
    monkeypatch.setattr(
        part_runner.manifest, "byte_note", lambda whole: "bytes are lost"
    )
    data.load(config(tmp_path / "corpus", tmp_path / "c", part_bytes=50))
    shown = capsys.readouterr().err
    assert shown.count("note: bytes are lost\n") == 1
    assert shown.count("documents with <|endoftext|> as plain text: 15; ") == 1


def test_a_trained_vocabulary_sees_no_held_out_text(texts, tmp_path, monkeypatch):
    """And something of every file. Red if `_sample` skips the check."""
    seen = []
    train_bpe = part_runner.tokenizer.train_bpe

    def spy(sample, size):
        seen.extend(sample)
        return train_bpe(sample, size)

    monkeypatch.setattr(part_runner.tokenizer, "train_bpe", spy)
    folder, by_file = texts
    data.load(config(folder, tmp_path, tokenizer="bpe:300"))
    every_text = {text: n for n, of_file in enumerate(by_file) for text in of_file}
    assert seen and not any(map(held_out, seen))
    assert {every_text[text] for text in seen} == {0, 1, 2, 3}


def test_compressed_and_tabular_files_hold_the_same_texts(texts, tmp_path):
    """Red if a format loses a text, or its last one."""
    folder, by_file = texts
    plain = data.load(config(folder, tmp_path / "cache", part_bytes=0))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    data_helpers.jsonl_gz(mixed / "0.jsonl.gz", by_file[0])
    (mixed / "1.jsonl.xz").write_bytes(lzma.compress((folder / "1.jsonl").read_bytes()))
    packed = zstandard.compress((folder / "2.jsonl").read_bytes())
    (mixed / "2.jsonl.zst").write_bytes(packed)
    table = pyarrow.table({"url": ["x"] * len(by_file[3]), "text": by_file[3]})
    parquet.write_table(table, mixed / "3.parquet", row_group_size=7)
    whole = data.load(config(mixed, tmp_path / "cache", part_bytes=0))
    assert whole.fingerprint == plain.fingerprint
    in_parts = data.load(config(mixed, tmp_path / "cache", part_bytes=700))
    assert sorted(documents(in_parts.train)) == sorted(documents(plain.train))
    shares = [jsonlines.Share(n, 3) for n in range(3)]
    read = [
        [
            text
            for _, text, _ in local_files.read_documents(
                [("k", mixed / "3.parquet")], local_files.Reading(share=share)
            )
        ]
        for share in shares
    ]
    assert read == [by_file[3][n::3] for n in range(3)]


@pytest.mark.parametrize(
    ("table", "field", "message"),
    [
        ({"body": ["x"]}, "text", "no text in field 'text' .found: body."),
        ({"text": [1]}, "text", "it holds a number"),
        ({"text": ["a", None]}, "text", "row 2: .*it holds null"),
        ({"text": [b"\xff"]}, "text", "row 1: not UTF-8"),
        ({"text": pyarrow.array([], pyarrow.string())}, "text", "holds no rows"),
    ],
)
def test_a_table_without_text_is_one_line(tmp_path, table, field, message):
    """Red for each check of `parquet` that is left out."""
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    how = local_files.Reading(text_field=field)
    with pytest.raises(errors.DataError, match=message):
        list(local_files.read_documents([("k", tmp_path / "t.parquet")], how))


def test_a_damaged_table_is_one_line(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(errors.DataError, match=r"t.parquet: damaged or truncated"):
        list(
            local_files.read_documents(
                [("k", tmp_path / "t.parquet")], local_files.Reading()
            )
        )


def test_texts_inside_of_a_table(tmp_path):
    """meta.text of a struct, and text stored as bytes."""
    table = {"meta": [{"text": "ab"}, {"text": "cd"}], "raw": [b"ef", "é".encode()]}
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    for field, expected in (("meta.text", ["ab", "cd"]), ("raw", ["ef", "é"])):
        how = local_files.Reading(text_field=field)
        found = local_files.read_documents([("k", tmp_path / "t.parquet")], how)
        assert [text for _, text, _ in found] == expected


def test_a_long_text_is_one_document(tmp_path, monkeypatch):
    """Encoded in pieces, it has the bytes it had, and no other text is.

    Red if each piece begins a document, or short texts are cut.
    """
    monkeypatch.setattr(part_files, "_BATCH_CHARS", 100)
    in_pieces, append_long = set(), token_files.Writer.append_long

    def noted(self, text, piece_chars):
        in_pieces.add(len(text) > 200)
        append_long(self, text, piece_chars)

    monkeypatch.setattr(token_files.Writer, "append_long", noted)
    folder = tmp_path / "corpus"
    long = "\n".join(data_helpers.texts(30, seed=9))
    texts = [text for of_file in corpus(folder) for text in of_file]
    (folder / "long.jsonl").write_text(json.dumps({"text": long}) + "\n")
    dataset = data.load(config(folder, tmp_path / "cache"))
    assert in_pieces == {True} and min(map(len, texts)) <= 200
    found = documents(dataset.train) + documents(dataset.validation)
    assert sorted(found) == sorted([*texts, long])
    bpe = data.load(config(folder, tmp_path / "cache", tokenizer="bpe:300"))
    tokens = np.concatenate([bpe.train.tokens[:], bpe.validation.tokens[:]])
    ends = np.flatnonzero(tokens == bpe.tokenizer.eot_id)
    decoded = [
        bpe.tokenizer.decode(tokens[a + 1 : b]) for a, b in itertools.pairwise(ends)
    ]
    assert long in decoded


def test_what_was_prepared_whole_stays(texts, tmp_path):
    """A directory of an older version is used as it is. Red if its name has the parts."""
    old = data.load(config(texts[0], tmp_path, part_bytes=0))
    assert json.loads((old.directory / "manifest.json").read_text())["format"] == 1
    assert data.load(config(texts[0], tmp_path)).directory == old.directory
    small = data_helpers.config(tmp_path / "small", data_helpers.texts(20))
    assert (data.prepare(small) / "train.bin").is_file()


def test_what_was_prepared_in_parts_by_older_rules_stays(texts, tmp_path, monkeypatch):
    """A change of the rules does not cost a second preparation. Red if its name is new."""
    with monkeypatch.context() as patch:
        patch.setattr(identity, "_PARTS", 1)
        old = data.prepare(config(texts[0], tmp_path), show_progress=False)
    assert data.prepare(config(texts[0], tmp_path)) == old
    new = data.resolve_dir(config(texts[0], tmp_path / "other"))
    assert new.name != old.name


def test_a_fault_in_one_process_is_the_one_line(texts, tmp_path):
    """With its kind and its file; finished parts stay. Red if the parent waits on."""
    folder = tmp_path / "corpus"
    shutil.copytree(texts[0], folder)
    with (folder / "2.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(errors.DataError, match=r"2.jsonl:41: not a JSON line"):
        data.prepare(config(folder, tmp_path / "c"), parallel=2, show_progress=False)
    assert list((tmp_path / "c").glob(".parts-*/parts/*.json"))


def test_a_process_that_is_killed_is_told(texts, tmp_path, monkeypatch):
    """As the kernel does where memory ends. Red if a signal counts as success."""
    monkeypatch.setattr(
        part_processes, "_PROGRAM", "import os; os.kill(os.getpid(), 9)"
    )
    with pytest.raises(errors.ConfigError, match=r"signal 9 .not enough memory"):
        data.prepare(config(texts[0], tmp_path), parallel=2, show_progress=False)


def test_processes_share_the_cores(texts, tmp_path, monkeypatch):
    """Unless the environment says otherwise. Mutation: all cores, or more, for each."""
    shares = []

    class Ended(subprocess.Popen):
        def __init__(self, command, **options):
            shares.append(options["env"]["RAYON_NUM_THREADS"])
            super().__init__([*command[:2], "raise SystemExit(3)"], **options)

    monkeypatch.setattr(part_processes.subprocess, "Popen", Ended)
    monkeypatch.setattr(part_processes.os, "cpu_count", lambda: 6)
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    for threads in ("3", "5"):
        with pytest.raises((errors.ConfigError, BrokenPipeError)):
            data.prepare(config(texts[0], tmp_path), parallel=2, show_progress=False)
        assert set(shares) == {threads}
        shares.clear()
        monkeypatch.setenv("RAYON_NUM_THREADS", "5")


def test_damage_is_found(undisturbed, tmp_path):
    """A part that is short, missing, changed or named elsewhere. Red without `_check_file`."""
    for damage, message in (
        (lambda p: p.write_bytes(p.read_bytes()[:-2]), "bytes, but the manifest says"),
        (lambda p: p.unlink(), "missing, but the manifest says"),
        (
            lambda p: p.write_bytes(bytes(p.stat().st_size)),
            "sha256 is not the manifest's",
        ),
    ):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(undisturbed.directory, copy)
        damage(next(copy.glob("train-00001-*.bin")))
        with pytest.raises(errors.DataError, match=message):
            manifest_lib.read(copy, verify=True)
    values = undisturbed.manifest.to_json()
    values = json.loads(json.dumps(values))
    values["splits"]["train"]["parts"][0]["file"] = "../secret.bin"
    with pytest.raises(ValueError, match=r"splits.train.parts has the file"):
        manifest_lib.Manifest.from_json(values)


def test_the_plan_deals_every_document_once(tmp_path):
    """Any files, any size of a part. Red if a share is left out."""
    rng = random.Random(0)
    for size in (1, 50, 400, 10_000):
        files = []
        for n in range(12):
            path = tmp_path / f"{size}-{n}.jsonl"
            path.write_bytes(b"x" * rng.choice([0, 1, 60, 3000]))
            files.append((path.name, path))
        planned = parts.plan(files, size)
        units = [unit for part in planned for unit in part]
        seen = collections.defaultdict(list)
        for unit in units:
            seen[unit.key].append(unit.share)
        assert [key for key, _ in itertools.groupby(u.key for u in units)] == [
            key for key, _ in files
        ]
        for shares in seen.values():
            assert shares == [
                jsonlines.Share(n, len(shares)) for n in range(len(shares))
            ]
            assert len(shares) <= parts.MOST_READERS
        assert len(planned) <= parts.MOST + len(files)


def test_a_part_is_full_at_its_size(tmp_path):
    """And the next begins at nothing. Mutations: `>` for `>=`; one byte held."""
    files = [(f"{n}.jsonl", tmp_path / f"{n}.jsonl") for n in range(5)]
    for (_, path), size in zip(files, (10, 10, 19, 1, 5), strict=True):
        path.write_bytes(b"x" * size)
    planned = parts.plan(files, 20)
    assert [[unit.size for unit in part] for part in planned] == [
        [10, 10],
        [19, 1],
        [5],
    ]


@pytest.mark.parametrize("source", ["whole", "parts", "megatron", "weights"])
def test_an_epoch_visits_every_window_once(texts, tmp_path, source):
    """Counted, for 1, 2 and 3 processes; and a run that goes on with another number of them.

    Red if a process shuffles by itself, or the order depends on their number.
    """
    from memoryformer.data import export

    folder, _ = texts
    here = config(
        folder, tmp_path / "cache", part_bytes=0 if source == "whole" else 3000
    )
    dataset = data.load(here)
    if source in ("megatron", "weights"):
        export.to_megatron(dataset, tmp_path / "out")
        prefix = str(tmp_path / "out" / "train")
        path = (
            prefix
            if source == "megatron"
            else f"2:{prefix},1:{tmp_path}/out/validation"
        )
        dataset = data.load(
            data.DataConfig(source="megatron", path=path, tokenizer="bytes")
        )
    drawn = dataset.train.batches(64, 6, seed=5)
    steps = drawn.windows_per_epoch // 6 + 1

    def run(processes, first, last):
        share = 6 // processes
        return [
            np.concatenate(
                [
                    dataset.train.batches(64, 6, seed=5).batch(
                        step, slice(share * p, share * p + share)
                    )["inputs"]
                    for p in range(processes)
                ]
            )
            for step in range(first, last)
        ]

    alone = run(1, 0, steps)
    for processes in (2, 3):
        np.testing.assert_array_equal(run(processes, 0, steps), alone)
    middle = steps // 2
    np.testing.assert_array_equal(run(3, 0, middle) + run(2, middle, steps), alone)
    if (
        source != "weights"
    ):  # there, each prefix has epochs of its own: see test_weights
        rows = np.concatenate(alone)[: drawn.windows_per_epoch]
        stream = np.array(dataset.train.tokens[:], np.int32)
        windows = stream[: len(rows) * 64].reshape(-1, 64)
        assert sorted(map(bytes, rows)) == sorted(map(bytes, windows))


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    """SIGKILL to all processes, or to the first alone; every restart goes on.

    The bytes are the undisturbed ones, and nothing that was done is done again.
    """
    folder = tmp_path / "corpus"
    corpus(folder, num_files=8, count=3000)
    fields = {"part_bytes": 60_000, "tokenizer": "bpe:500"}
    expected = data.prepare(
        config(folder, tmp_path / "a", **fields), show_progress=False
    )
    rng = random.Random(1)
    kills, written = 0, {}
    for _attempt in range(200):
        here = config(folder, tmp_path / f"b{kills // 5}", **fields)
        directory = data.resolve_dir(here)
        if directory.exists():
            break
        work = directory.with_name(f".parts-{directory.name}")
        process = start(here, parallel=2)
        # So that moments are spread over the work, not over the start of Python.
        before = len(list(work.glob("parts/*.json")))
        while (
            process.poll() is None and len(list(work.glob("parts/*.json"))) < before + 2
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if kills < 20 and process.poll() is None:
            if rng.random() < 0.5:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                until = time.monotonic() + 120
                while alive(process.pid):  # the others see it and end
                    assert time.monotonic() < until, "a process without its parent"
                    time.sleep(0.05)
            kills += 1
        process.communicate(timeout=300)
        for path in work.glob("parts/*.json"):
            inode = written.setdefault((work, path.name), path.stat().st_ino)
            assert path.stat().st_ino == inode, f"{path} was written again"
        if kills >= 20:
            break
    assert kills == 20
    for folder_ in sorted({work for work, _ in written}):
        here = config(folder, folder_.parent, **fields)
        directory = data.prepare(here, parallel=2, show_progress=False)
        assert contents(directory) == contents(expected)
        for (work, name), inode in written.items():
            if work == folder_:
                assert (directory / "parts" / name).stat().st_ino == inode


class Recorded(progress_lib.Progress):
    """Progress that is kept, and a call for every note; nothing is waited for for ever."""

    def __init__(self, on_note=lambda text: None):
        until = time.monotonic() + 120
        super().__init__("x", enabled=False, stop=lambda: time.monotonic() > until)
        self.begun, self.ended, self.notes, self._on_note = [], [], [], on_note
        self.done = []

    def start(self, stage, total, unit):
        super().start(stage, total, unit)
        self.begun.append((stage, total, unit))

    def update(self, done):
        super().update(done)
        self.done.append(done)

    def finish(self, done):
        super().finish(done)
        self.ended.append(done)

    def note(self, text):
        self.notes.append(text)
        self._on_note(text)


def job(here, progress):
    """The job of a configuration, its folder made."""
    made = part_runner.Job(data.resolve_dir(here), here, progress)
    made.work.mkdir(parents=True, exist_ok=True)
    return made


def every_part(number):
    return True


def sized(*sizes):
    """Files that have nothing but a size."""

    def file(size):
        return types.SimpleNamespace(stat=lambda: types.SimpleNamespace(st_size=size))

    return [(str(n), file(size)) for n, size in enumerate(sizes)]


def test_how_many_parts_there_are():
    """256 or so of many small files, 16 readers of a large one, one of an empty one.

    Mutations: any number of `plan`.
    """
    assert len(parts.plan(sized(*[1] * 2560), 1)) == 256
    assert (
        len(parts.plan(sized(*[1] * 2570), 1)) == 234
    )  # eleven files each, one of seven
    assert [len(p) for p in parts.plan(sized(1, 1, 1), 1)] == [1, 1, 1]
    large = parts.plan(sized(10**6), 1000)
    assert [u.size for p in large for u in p] == [62_500] * 16
    assert [u.share.number for p in large for u in p] == list(range(16))
    thirds = parts.plan(sized(2001, 0, 0), 1000)
    assert [
        [(u.key, u.share.number, u.share.count, u.size) for u in p] for p in thirds
    ] == [
        [("0", 0, 3, 667), ("0", 1, 3, 667)],
        [("0", 2, 3, 667), ("1", 0, 1, 0), ("2", 0, 1, 0)],
    ]
    assert parts.Part(0, "", large[0] + thirds[0]).size == 62_500 + 2 * 667


def test_held_out_files_are_the_first_parts(texts, tmp_path):
    """With a split of their own; without any, a document's hash decides."""
    folder, _ = texts
    apart = {"validation_path": str(folder / "1.jsonl"), "validation_every": 20}
    planned = job(config(folder, tmp_path, **apart), Recorded()).parts
    count = [part.split for part in planned].count("validation")
    assert [part.number for part in planned] == list(range(len(planned)))
    splits = ["validation"] * count + ["train"] * (len(planned) - count)
    assert [part.split for part in planned] == splits and 0 < count < len(planned)
    assert {u.path.name for p in planned[:count] for u in p.units} == {"1.jsonl"}
    plain = job(config(folder, tmp_path), Recorded()).parts
    assert {part.split for part in plain} == {""}


def test_a_separator_needs_plain_text(texts, tmp_path):
    """Red without `check_separator` in `Corpus.of`."""
    here = data.DataConfig(
        source="text",
        path=str(texts[0]),
        tokenizer="bytes",
        source_options={"separator": "--", "part_bytes": 3000},
        data_dir=str(tmp_path),
    )
    with pytest.raises(errors.ConfigError, match="JSON lines only, which have no sep"):
        parts.Corpus.of(here)


def _read(made, part):
    """Bytes behind which each text of a part lies, by characters for want of better."""
    before = 0
    for unit in part.units:
        texts = list(made.corpus.texts(unit))
        for n in range(len(texts)):
            yield before + min(sum(map(len, texts[:n])), unit.size)
        before += unit.size


@pytest.mark.parametrize("deduplicate", [False, True])
def test_what_is_shown_of_parts(texts, tmp_path, deduplicate):
    """Every stage with its bytes. Mutations: numbers from 0; bytes of another part."""
    here = config(texts[0], tmp_path, deduplicate=deduplicate)
    progress = Recorded()
    made = job(here, progress)
    assert made.missing_bytes() == sum(part.size for part in made.parts)
    count, sizes = len(made.parts), [part.size for part in made.parts]
    made.run(every_part, wait=False)
    expected = [("hashing validation", 1, "B")]
    if deduplicate:
        expected += [
            (f"hashing part {n} of {count}", size, "B")
            for n, size in enumerate(sizes, 1)
        ]
    expected += [(f"part {n} of {count}", s, "B") for n, s in enumerate(sizes, 1)]
    assert progress.begun == expected and progress.ended == sizes
    assert progress.done == [done for part in made.parts for done in _read(made, part)]
    assert made.missing() == [] and made.missing_bytes() == 0 and not made.finished
    made.run(every_part, wait=True)  # nothing to do, and nothing is begun
    assert progress.begun == expected


def test_what_remains_of_the_work(texts, tmp_path, monkeypatch):
    """The files of the two splits, of the parts and of the whole, on disk before the name.

    Mutations: digests or locks left behind; a folder that is not flushed.
    """
    flushed = []
    flush = part_runner.atomic.flush
    monkeypatch.setattr(
        part_runner.atomic, "flush", lambda path: flushed.append(path) or flush(path)
    )
    here = config(texts[0], tmp_path, deduplicate=True)
    directory = data.prepare(here, show_progress=False)
    work = directory.with_name(f".parts-{directory.name}")
    assert flushed[-3:] == [work / "parts", work, directory.parent]
    names = {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file()
    }
    count = len(list(directory.glob("parts/*.json")))
    expected = {"manifest.json", "tokenizer.json"}
    expected |= {f"parts/{n:05d}.json" for n in range(count)}
    stored = data.load(here).manifest.splits.values()
    expected |= {part.file for split in stored for part in split.parts}
    assert names == expected
    assert (directory / "manifest.json").read_text().startswith('{\n  "')


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_part_that_another_does(texts, tmp_path, monkeypatch, deduplicate):
    """It is left to it, or done last; done meanwhile, it is not done again.

    Mutations: `or` for `and` in `_claimed`; a part that is held taken for open; no first
    round; the holder named at every look.
    """
    whole = config(texts[0], tmp_path / "whole", deduplicate=deduplicate)
    finished = job(whole, Recorded())
    finished.run(every_part, wait=False)
    here = config(texts[0], tmp_path / "here", deduplicate=deduplicate)
    written, write = [], part_files.write

    def noted(work, part, *others):
        written.append(part.number)
        write(work, part, *others)

    monkeypatch.setattr(part_files, "write", noted)
    made = job(here, Recorded())
    last = len(made.parts) - 1
    assert last > 3
    with lock.hold(made.work / ".lock-part-00001"):
        made.run(lambda number: number > 0, wait=False)
    assert written == list(range(2, last + 1)) and made.missing() == [0, 1]
    written.clear()
    held = contextlib.ExitStack()
    held.enter_context(lock.hold(made.work / ".lock-part-00000"))

    def done_by_another(text):
        for path in finished.work.rglob("*00000*"):
            if path.name.split("-")[0] in ("train", "validation", "00000.json"):
                shutil.copy(path, made.work / path.relative_to(finished.work))
        if len(made.progress.notes) == 1:
            assert written == [1]  # before anything is waited for
            monkeypatch.setattr(lock, "_PAUSE", 0.01)
            threading.Timer(0.2, held.close).start()

    made.progress = Recorded(done_by_another)
    made.run(every_part, wait=True)
    assert written == [1] and made.missing() == []
    (note,) = made.progress.notes
    assert (
        note == f"waiting for another process ({os.getpid()} on {socket.gethostname()})"
    )
    made.finish()
    finished.finish()
    assert contents(made.directory) == contents(finished.directory)


@pytest.mark.parametrize("apart", [False, True])
def test_what_a_vocabulary_of_parts_is_trained_on(texts, tmp_path, monkeypatch, apart):
    """The first texts of every unit in proportion to its size, counted in bytes.

    Mutations: `<` for `<=`; a byte less; held-out texts; another scale.
    """
    folder, by_file = texts
    options = {"part_bytes": 0}
    held = set(by_file[1][5:10])
    if apart:
        data_helpers.jsonl_gz(tmp_path / "v" / "v.jsonl.gz", sorted(held))
        options |= {"validation_path": str(tmp_path / "v"), "validation_every": 20}
    made = job(config(folder, tmp_path, **options), Recorded())
    monkeypatch.setattr(part_runner.tokenizer, "BPE_TRAINING_BYTES", 9000)
    sample = made._sample(made._held_out())
    sizes = [(folder / f"{n}.jsonl").stat().st_size for n in range(len(by_file))]
    expected = []
    for of_file, size in zip(by_file, sizes, strict=True):
        budget = int(size * 9000 / sum(sizes)) + 1
        for text in of_file:
            if budget > 0 and not (text in held if apart else held_out(text)):
                cut = text.encode()[:budget]
                budget -= len(cut)
                expected.append(cut.decode(errors="ignore"))
    assert sample == expected


def test_what_a_directory_in_parts_is_named_by(texts, tmp_path):
    """All that decides its bytes, written the same way for ever, or it would be made again.

    Mutations: another number of `identity`; keys in another order; a longer hash.
    """
    folder, _ = texts
    files = identity.local_files.fingerprint(
        [(f"{n}.jsonl", folder / f"{n}.jsonl") for n in range(4)]
    )
    for options, in_parts in (
        ({}, [2, 3000, False]),
        ({"deduplicate": True}, [2, 3000, True]),
        ({"deduplicate": True, "part_bytes": 0}, [2, 2**62, True]),
        ({"part_bytes": 0}, None),
        ({"max_documents": 7}, None),
    ):
        here = config(folder, tmp_path, **options)
        request = {
            "format": 1,
            "source": "c4",
            "max_documents": options.get("max_documents", 0),
            "validation_every": EVERY,
            "tokenizer": "bytes",
            "files": files,
            "text_field": "text",
        }
        request |= {"parts": in_parts} if in_parts else {}
        text = json.dumps(request, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        directory, is_parted = identity.located(here)
        assert directory == tmp_path / f"c4-{digest}" and is_parted == bool(in_parts)


def test_when_a_corpus_is_large(texts, tmp_path):
    """From one byte above `part_bytes` on; a file of a megabyte may be cut.

    Mutations: `>=` for `>`.
    """
    folder, _ = texts
    size = sum(path.stat().st_size for path in folder.iterdir())
    for part_bytes, in_parts in ((size - 1, True), (size, False)):
        here = config(folder, tmp_path, part_bytes=part_bytes)
        assert identity.located(here)[1] == in_parts
    for name, count, cut in (
        ("a.txt", 1 << 20, False),
        ("b.txt", (1 << 20) + 1, True),
        ("c.txt.gz", 1, True),
        ("d.jsonl", 1 << 21, False),
        ("e.jsonl.gz", 1, False),
    ):
        path = tmp_path / name
        path.write_bytes(b"x" * count)
        assert identity._may_be_cut(path) == cut


def test_texts_come_by_the_megabyte(monkeypatch):
    """Or by the thousand; of a longer text the pieces decide its tokens, so their size stays.

    Mutations: `>` for `>=`; `and` for `or`; a count that goes on.
    """
    assert part_files._BATCH_CHARS == 2**20
    monkeypatch.setattr(part_files, "_BATCH_CHARS", 10)
    monkeypatch.setattr(part_files, "_BATCH_DOCUMENTS", 3)
    texts = ["aaaa", "bbbbbb", "c", "", "d", "e", "f" * 11, "g"]
    found = list(part_files.batches(iter(texts)))
    assert found == [texts[:2], texts[2:5], texts[5:7], texts[7:]]
    assert list(part_files.batches(iter([]))) == []


def test_texts_are_told_apart_by_part(tmp_path):
    """The first of equals, in any part before and in its own. Mutations: any of `digests`."""
    texts = [["a", "b", "a", "c"], ["c", "d", "d", ""], ["e", "a", "", "e"]]
    for number, of_part in enumerate(texts):
        digests.write(tmp_path, parts.Part(number, "", ()), of_part)
    seen = set()
    for number, of_part in enumerate(texts):
        known = digests.Known(tmp_path, number)
        for start in (0, 2):
            some = of_part[start : start + 2]
            new = known.is_new([token_files.digest(text) for text in some], start)
            expected = []
            for text in some:
                expected.append(text not in seen)
                seen.add(text)
            assert new.tolist() == expected
    assert digests.contains(np.array([], "S16"), np.array([b"x"], "S16")).tolist() == [
        False
    ]
    held = np.array([b"b", b"d"], "S16")
    wanted = np.array([b"a", b"b", b"c", b"d", b"e"], "S16")
    assert digests.contains(held, wanted).tolist() == [False, True, False, True, False]


def test_memory_is_given_back_after_many_characters(texts, tmp_path, monkeypatch):
    """Of a batch of a megabyte, not of a thousand short texts; by what glibc has for it.

    Mutations: `>` for `>=`; never; a byte that stays.
    """
    given_back = []
    monkeypatch.setattr(token_files, "give_back_memory", lambda: given_back.append(1))
    monkeypatch.setattr(part_files.token_files, "_BATCH_CHARS", 8)
    tokens = part_files.tokenizer.byte_level()

    def written(batches):
        given_back.clear()
        quiet = progress_lib.Progress("x", enabled=False)
        quiet.start("x", 1, "documents")
        token_files.write(tmp_path / "x.bin", batches, tokens, quiet)
        return len(given_back)

    assert written(["a" * 8]) == 1 and written(["a" * 7]) == 0
    assert written(["a" * 7, "b", "c" * 9]) == 2
    monkeypatch.setattr(token_files, "_BATCH_DOCUMENTS", 2)
    assert written(["a", "b", "c", "d"]) == 0
    monkeypatch.setattr(part_files, "_BATCH_CHARS", 300)
    monkeypatch.setattr(part_files, "batches", lambda texts: [["x" * 299], ["x" * 300]])
    worker = part_files._Worker.__new__(part_files._Worker)
    worker._splits, worker._texts, worker._deal = {}, list, lambda texts: None
    given_back.clear()
    worker.run()
    assert given_back == [1]
    monkeypatch.undo()
    trimmed = []
    for library in (types.SimpleNamespace(malloc_trim=trimmed.append), object()):
        monkeypatch.setattr(token_files.ctypes, "CDLL", lambda name, lib=library: lib)
        token_files.give_back_memory()
    assert trimmed == [0]


class FakeProcess:
    """A process that has ended, or will after some looks; what was done to it."""

    def __init__(self, returncode, said="", looks=0):
        self.returncode, self._looks, self.done = returncode, looks, []
        self.stdout = types.SimpleNamespace(
            read=said.encode, close=lambda: self.done.append("close")
        )
        self.stdin = types.SimpleNamespace(
            write=self.done.append, close=lambda: self.done.append("sent")
        )

    def poll(self):
        self._looks -= 1
        return None if self._looks >= 0 else self.returncode

    def kill(self):
        self.done.append("kill")

    def wait(self):
        self.done.append("wait")


def test_what_processes_have_done_is_shown(monkeypatch):
    """In bytes of whole parts, until all have ended; asked to stop, it looks no more.

    Mutations: any sign; a process looked at again; `check` left out.
    """
    monkeypatch.setattr(part_processes, "_PAUSE", 0.0)
    left = iter([100, 100, 70, 70, 20, 0])
    progress = Recorded()
    made = types.SimpleNamespace(missing_bytes=lambda: next(left), progress=progress)
    part_processes._watch(made, [FakeProcess(0, looks=2), FakeProcess(0, looks=3)])
    assert progress.begun == [("2 processes", 100, "B")]
    assert progress.done == [30, 30, 80] and progress.ended == [100]
    stopped = Recorded()
    stopped._stop = lambda: True
    made = types.SimpleNamespace(missing_bytes=lambda: 5, progress=stopped)
    with pytest.raises(errors.Preempted):
        part_processes._watch(made, [FakeProcess(0)])


@pytest.mark.parametrize(
    ("code", "said", "kind", "message"),
    [
        (
            3,
            "a\n" + json.dumps({"exit_code": 46, "message": "m"}),
            errors.DataError,
            "^m$",
        ),
        (
            9,
            json.dumps({"exit_code": 999, "message": "n"}),
            errors.MemoryFormerError,
            "^n$",
        ),
        (
            -9,
            "",
            errors.ConfigError,
            r"with signal 9 .not enough memory.*; finished parts",
        ),
        (-11, "", errors.ConfigError, r"with signal 11; finished parts are kept"),
        (3, "\n", errors.ConfigError, r"with exit code 3; finished parts are kept"),
    ],
)
def test_what_a_process_raised(code, said, kind, message):
    """By its exit code and its last line. Mutations: the first line; a hint for any signal."""
    with pytest.raises(kind, match=message) as caught:
        part_processes._raise_what_it_raised(FakeProcess(code, said))
    assert type(caught.value) is kind
    assert part_processes._raise_what_it_raised(FakeProcess(0, said)) is None


def test_every_process_is_ended(monkeypatch, texts, tmp_path):
    """Whatever becomes of one; each is told its task whole, and has its threads.

    Mutations: one that goes on; a standard input left open; no thread.
    """
    here = config(texts[0], tmp_path)
    made, started, commands = job(here, Recorded()), [], []

    def popen(command, **options):
        commands.append((command, options))
        started.append(FakeProcess(3))
        return started[-1]

    monkeypatch.setattr(part_processes.subprocess, "Popen", popen)
    monkeypatch.setattr(part_processes, "_PAUSE", 0.0)
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    for cores, threads in ((1, "1"), (None, "1"), (9, "3")):
        monkeypatch.setattr(part_processes.os, "cpu_count", lambda n=cores: n)
        started.clear()
        with pytest.raises(errors.ConfigError, match="exit code 3"):
            part_processes.run(made, (1, 2), 3)
        assert len(started) == 3
        task = pickle.dumps((made.directory, here, (1, 2), os.getpid()))
        for process in started:
            assert process.done == [task, "sent", "kill", "wait", "close"]
        command, options = commands[-1]
        assert command == [sys.executable, "-c", part_processes._PROGRAM]
        assert options["env"]["RAYON_NUM_THREADS"] == threads
        assert options["env"]["PYTHONPATH"].split(os.pathsep) == [
            p for p in sys.path if p
        ]


def test_a_process_does_its_share(texts, tmp_path, monkeypatch, capsys):
    """In this one: quietly, deaf to an interrupt, and no longer than its parent lives.

    Mutations: a line of progress; waiting for others; `==` for `!=`; an error of ours raised.
    """
    here = config(texts[0], tmp_path)
    made, heard = job(here, Recorded()), []
    monkeypatch.setattr(part_processes.signal, "signal", lambda *a: heard.append(a))

    def work(parent):
        task = pickle.dumps((made.directory, here, (1, 3), parent))
        stdin = types.SimpleNamespace(buffer=io.BytesIO(task))
        monkeypatch.setattr(part_processes.sys, "stdin", stdin)
        part_processes.work()

    with pytest.raises(SystemExit) as ended:
        work(-1)
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == told["exit_code"] == errors.Preempted.exit_code
    assert "asked to stop while preparing c4" in told["message"]
    work(os.getppid())
    assert capsys.readouterr() == ("", "")
    count = len(made.parts)
    assert made.missing() == [n for n in range(count) if n % 3 != 1]
    assert heard == [(signal.SIGINT, signal.SIG_IGN)] * 2
    monkeypatch.setattr(part_runner, "Job", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        work(os.getppid())


def test_a_share_of_a_small_corpus(texts, tmp_path, capsys):
    """It is one part, and that is of the first share. Mutation: every share prepares it."""
    here = config(texts[0], tmp_path, part_bytes=0)
    assert not data.prepare(here, share=(1, 2)).exists()
    told = "preparing c4: the corpus is one part, and that is of share 0\n"
    assert capsys.readouterr().err == told
    assert data.prepare(here, share=(0, 2), show_progress=False).exists()
    parted = config(texts[0], tmp_path / "parted")
    data.prepare(parted, share=(2, 3))
    count = len(job(parted, Recorded()).parts)
    told = f"preparing c4: {len(range(2, count, 3))} of {count} parts are done\n"
    assert capsys.readouterr().err == told


def test_another_was_first(texts, tmp_path):
    """What is missing then is no fault, unless nobody was. Mutations: `raise` left out, or not."""
    here = config(texts[0], tmp_path)
    late = job(here, Recorded())
    with pytest.raises(FileNotFoundError), late.while_it_lasts():
        raise FileNotFoundError("x")
    data.prepare(here, show_progress=False)
    with late.while_it_lasts():
        raise errors.StorageError("x")
    with pytest.raises(ValueError), late.while_it_lasts():
        raise ValueError("x")
    assert late.finished and late.missing() == []
    late.missing = lambda: [0]  # as it was a moment before
    late.run(every_part, wait=True)
    late.finish()
    assert not late.work.exists() and late.progress.begun == []


def test_tokens_of_parts_add_up(undisturbed):
    """And one end more. Mutations: the check left out; no end, or two."""
    values = json.loads(json.dumps(undisturbed.manifest.to_json()))
    assert manifest_lib.Manifest.from_json(values) == undisturbed.manifest
    for more in (1, -1):
        other = json.loads(json.dumps(values))
        other["splits"]["train"]["tokens"] += more
        with pytest.raises(ValueError, match=r"splits\.train\.tokens is \d+"):
            manifest_lib.Manifest.from_json(other)


def test_shares_of_lines_and_rows(tmp_path):
    """Counted from 1; a share may be empty, a file may not.

    Mutations: a line too early; `!=` for `==`; shares that overlap by default.
    """
    assert [n for n in range(1, 9) if jsonlines.Share(1, 3).holds(n)] == [2, 5, 8]
    assert all(map(jsonlines.WHOLE.holds, range(1, 9)))
    path, table = tmp_path / "a.jsonl", tmp_path / "t.parquet"
    path.write_text('{"text": "a"}\n')
    parquet.write_table(pyarrow.table({"text": ["a"]}), table)

    def read(where, share):
        how = local_files.Reading(share=share)
        return [text for _, text, _ in local_files.read_documents([("k", where)], how)]

    for where in (path, table):
        assert read(where, jsonlines.Share(0, 2)) == ["a"]
        assert read(where, jsonlines.Share(1, 2)) == []
    path.write_text("\n\n")
    assert read(path, jsonlines.Share(0, 2)) == []
    with pytest.raises(errors.DataError, match="holds no JSON lines"):
        read(path, jsonlines.WHOLE)
    keys = [
        key
        for key, *_ in local_files.read_documents([("k", table)], local_files.Reading())
    ]
    assert keys == ["k:1"]


def test_a_table_that_breaks_off(tmp_path, monkeypatch):
    """Behind its first rows, or for want of the package. Mutations: the reason left out."""
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    reading = parquet_lib.texts(path, "text", jsonlines.WHOLE)
    assert list(reading) == [(1, "a"), (2, "b")]

    class Broken:
        schema_arrow = types.SimpleNamespace(names=["text"])

        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def iter_batches(self, batch_size, columns):
            yield pyarrow.record_batch({"text": ["a"]})
            raise OSError("page is cut\nhere")

    monkeypatch.setattr(parquet, "ParquetFile", Broken)
    reading = parquet_lib.texts(path, "text", jsonlines.WHOLE)
    assert next(reading) == (1, "a")
    with pytest.raises(
        errors.DataError, match=r"t.parquet: damaged or truncated .page is cut"
    ):
        next(reading)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        errors.DataError, match="needs the package pyarrow; `pip install"
    ):
        next(parquet_lib.texts(path, "text", jsonlines.WHOLE))


@pytest.mark.parametrize("held", ["digests-00000", "finish"])
def test_what_is_waited_for(texts, tmp_path, monkeypatch, held):
    """Digests of a part that another reads, last; and the end, which is done once.

    Mutations: digests that are missing; waiting first; a lock that is not waited for.
    """
    monkeypatch.setattr(lock, "_PAUSE", 0.01)
    made = job(config(texts[0], tmp_path, deduplicate=True), Recorded())
    if held == "finish":
        made.run(every_part, wait=False)
    path = made._lock if held == "finish" else made.work / f".lock-{held}"
    taken = contextlib.ExitStack()
    taken.enter_context(lock.hold(path))

    def release(text):
        digested = {p.name for p in made.work.glob("digests-*0.npy")}
        digested |= {p.name for p in made.work.glob("digests-*[1-9].npy")}
        assert held == "finish" or len(digested) == len(made.parts) - 1
        threading.Timer(0.1, taken.close).start()

    made.progress = Recorded(release)
    made.run(every_part, wait=True)
    made.finish()
    assert made.finished and len(made.progress.notes) == 1


def test_what_preparing_does_by_itself(texts, tmp_path, monkeypatch):
    """In this process, in a folder that need not be there. Mutations: defaults; `parents`."""
    monkeypatch.setattr(part_processes, "run", lambda *a: pytest.fail("in processes"))
    deep = tmp_path / "a" / "b" / "c"
    directory = data.prepare(config(texts[0], deep), show_progress=False)
    assert directory.parent == deep
    dataset = data.load(config(texts[0], deep))
    values = dataset.manifest.to_json()
    content = {key: values[key] for key in ("format", "dtype", "splits")}
    content["tokenizer"] = dataset.tokenizer.fingerprint
    text = json.dumps(content, sort_keys=True)
    assert dataset.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    started = []
    thread = threading.Thread

    def noted(*args, **kwargs):
        started.append(kwargs["daemon"])
        return thread(*args, **kwargs)

    monkeypatch.setattr(progress_lib.threading, "Thread", noted)
    assert progress_lib.Progress("x", enabled=False).during("", lambda: 3) == 3
    assert started == [True]  # work that is given up must not hold the process
