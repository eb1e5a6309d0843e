"""A corpus in parts: the same bytes for any number of processes, in any order, killed or not."""

import collections
import dataclasses
import hashlib
import itertools
import json
import lzma
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import data_helpers
import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from memoryformer import data, errors
from memoryformer.data import (
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
