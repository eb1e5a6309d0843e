"""Preparing: one rename, one fingerprint, the same text in one split only."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import data_helpers
import numpy as np
import pytest

from memoryformer import data, errors
from memoryformer.data import identity, preparation, progress, token_files
from memoryformer.data import manifest as manifest_lib
from memoryformer.files import atomic

# Where a name is given, the process kills itself as it begins that file or directory.
PREPARE = """
import json, os, signal, sys
from memoryformer import data

def watch(event, arguments):
    begins = event == "os.mkdir" or event == "open" and set(str(arguments[1])) & set("wax")
    if begins and os.path.basename(os.fsdecode(arguments[0])) in sys.argv[2:]:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
print(data.prepare(data.DataConfig(**json.loads(sys.argv[1]))))
"""


def start(config, killed_at=""):
    fields = json.dumps(dataclasses.asdict(config))
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, fields, *filter(None, [killed_at])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def documents(dataset, split):
    """The texts of a split, recovered from its token file."""
    tokens = np.array(getattr(dataset, split).tokens, np.int64)
    ends = np.flatnonzero(tokens == dataset.tokenizer.eot_id)
    assert ends[0] == 0 and ends[-1] == len(tokens) - 1
    pairs = itertools.pairwise(ends)
    return [dataset.tokenizer.decode(tokens[a + 1 : b]) for a, b in pairs]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return data_helpers.config(
        tmp_path_factory.mktemp("shards"), data_helpers.texts(60)
    )


@pytest.fixture(scope="module")
def dataset(config):
    return data.load(config)


def test_the_stream_holds_every_document_once(dataset):
    """Red if an end of document is missing (pain: pre-tokenised data without EOD)."""
    train, held_out = (documents(dataset, s) for s in ("train", "validation"))
    assert sorted(train + held_out) == sorted(data_helpers.texts(60))
    for split, texts in (("train", train), ("validation", held_out)):
        counts = dataset.manifest.splits[split]
        assert counts.documents == counts.ends_of_document == len(texts)
        assert counts.bytes == sum(len(text.encode()) for text in texts)
        assert counts.bytes == counts.token_bytes
        assert counts.tokens == len(getattr(dataset, split).tokens)


def test_preparing_again_changes_nothing(dataset, config, monkeypatch):
    """Red if prepare() writes again: the writer is taken away."""
    monkeypatch.setattr(preparation, "_write", None)
    before = (dataset.directory / "train.bin").stat()
    assert data.prepare(config) == dataset.directory == data.resolve_dir(config)
    assert (dataset.directory / "train.bin").stat() == before


def test_opening_reads_no_token_file(dataset, config, monkeypatch):
    """Minutes to hours for large data. Mutation: `verify` is true unless it is asked for."""
    monkeypatch.setattr(manifest_lib, "_file_sha256", None)
    assert data.prepare(config) == dataset.directory
    assert data.load(config).fingerprint == dataset.fingerprint


def test_equal_content_has_an_equal_fingerprint(dataset, tmp_path):
    """Elsewhere, at another time, other order of creation. Red if a path is hashed."""
    corpus = tmp_path / "elsewhere"
    corpus.mkdir()
    for i, text in reversed(list(enumerate(data_helpers.texts(60)))):
        (corpus / f"{i:04d}.txt").write_text(text, encoding="utf-8")
    config = data.DataConfig(
        source="text",
        path=str(corpus),
        tokenizer="bytes",
        source_options={"validation_every": 5},
        data_dir=str(tmp_path / "cache"),
    )
    assert data.load(config).fingerprint == dataset.fingerprint
    (corpus / "0001.txt").write_text("another text")
    assert data.load(config).fingerprint != dataset.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "bpe:300"},
        {"source_options": {"validation_every": 7}},
        {"source_options": {"validation_every": 5, "max_documents": 40}},
        {"source_options": {"validation_every": 5, "text_field": "body"}},
    ],
)
def test_whatever_changes_the_data_changes_the_directory(dataset, config, change):
    """Red if a field is left out of the request that names the directory."""
    changed = dataclasses.replace(config, **change)
    assert data.resolve_dir(changed) != dataset.directory


def test_the_same_text_is_never_in_both_splits(tmp_path):
    """Duplicates everywhere. Red if train does not skip what validation holds."""
    texts = data_helpers.texts(40)
    train = data_helpers.folder(tmp_path / "train", texts + texts[:20])
    held_out = data_helpers.folder(tmp_path / "held_out", [*texts[10:15], "new one"])
    config = data.DataConfig(
        source="text",
        path=str(train),
        source_options={"validation_path": str(held_out)},
        tokenizer="bytes",
        data_dir=str(tmp_path / "cache"),
    )
    dataset = data.load(config)
    in_train, in_validation = (documents(dataset, s) for s in ("train", "validation"))
    assert not set(in_train) & set(in_validation)
    assert sorted(in_validation) == sorted([*texts[10:15], "new one"])
    assert len(in_train) == 60 - 10
    counts = dataset.manifest.splits["train"]
    assert counts.duplicates_of_validation_dropped == 10
    hashed = data.load(
        data.DataConfig(
            source="text",
            path=str(train),
            tokenizer="bytes",
            source_options={"validation_every": 4},
            data_dir=str(tmp_path / "cache"),
        )
    )
    in_train, in_validation = (documents(hashed, s) for s in ("train", "validation"))
    assert len(in_train) + len(in_validation) == 60
    assert not set(in_train) & set(in_validation)


def test_the_tokenizer_never_sees_validation(tmp_path, monkeypatch):
    """Red if BPE is trained on all documents, or on the beginning of the corpus."""
    seen = []
    train_bpe = preparation.tokenizer_lib.train_bpe

    def spy(texts, size):
        seen.extend(texts)
        return train_bpe(seen, size)

    monkeypatch.setattr(preparation.tokenizer_lib, "train_bpe", spy)
    monkeypatch.setattr(preparation.tokenizer_lib, "BPE_TRAINING_BYTES", 1500)
    texts = data_helpers.texts(60)
    held_out = data_helpers.folder(tmp_path / "held_out", texts[::2])
    config = data_helpers.config(
        tmp_path, texts, {"validation_path": str(held_out)}, tokenizer="bpe:260"
    )
    dataset = data.load(config)
    assert len(seen) > 2 and not set(seen) & set(texts[::2])
    assert 500 < sum(len(text.encode()) for text in seen) <= 1500
    assert texts.index(seen[-2]) > 40
    assert sorted(documents(dataset, "train")) == sorted(texts[1::2])


@pytest.mark.parametrize("moment", ["records", "train.bin"])
def test_a_killed_preparation_leaves_no_data_set(tmp_path, moment):
    """SIGKILL at the moment that a file is begun. Red if files are written straight into the
    final directory."""
    texts = data_helpers.texts(40)
    config = data_helpers.config(tmp_path, texts, tokenizer="bpe:300")
    root = tmp_path / "cache"
    process = start(config, killed_at=moment)
    _, errors_told = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors_told
    assert not data.resolve_dir(config).exists()
    assert list(root.glob(".tmp-*"))
    directory = data.prepare(config, show_progress=False)
    assert not list(root.glob(".tmp-*")), "debris stays"
    manifest_lib.read(directory, verify=True)


@pytest.mark.parametrize("moment", ["records", "tokenizer.json"])
def test_a_preparation_that_is_asked_to_stop_keeps_nothing(tmp_path, moment):
    """As it reads and as it tokenises; asked again, it prepares.

    Mutations: `Progress.check` never asks; `_prepare_into` without its finally.
    """
    config = data_helpers.config(tmp_path, data_helpers.texts(40), tokenizer="bpe:300")
    root = tmp_path / "cache"
    with pytest.raises(errors.Preempted, match="while preparing text: nothing of it"):
        data.load(config, stop=lambda: bool(list(root.glob(f".tmp-*/{moment}"))))
    assert [p.name[:6] for p in root.iterdir()] == [".lock-"]
    manifest_lib.read(data.prepare(config), verify=True)


def test_who_waits_for_a_preparation_can_be_asked_to_stop(tmp_path):
    """Mutation: `line.check` left out of `waiting`."""
    config = data_helpers.config(tmp_path, data_helpers.texts(40))
    (tmp_path / "cache").mkdir()
    questions = iter([False, False, True])
    with preparation._locked(data.resolve_dir(config), progress.Progress("")):
        with pytest.raises(errors.Preempted):
            data.prepare(config, stop=lambda: next(questions))
    assert next(questions, None) is None


def test_processes_at_once_agree(tmp_path):
    """Red without the lock and the rename: they would write into one directory."""
    config = data_helpers.config(tmp_path, data_helpers.texts(300), tokenizer="bpe:400")
    processes = [start(config) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    directories = {output.strip() for output, _ in outputs}
    assert directories == {str(data.resolve_dir(config))}
    manifest_lib.read(pathlib.Path(directories.pop()), verify=True)
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_without_locks_the_first_to_finish_wins(tmp_path):
    """Red if a failed rename is an error although the data set is there."""
    config = data_helpers.config(tmp_path, data_helpers.texts(40))
    directory = data.prepare(config)
    preparation._prepare_into(directory, config, progress.Progress("", enabled=False))
    manifest_lib.read(directory, verify=True)
    assert not list(directory.parent.glob(".tmp-*"))


def test_a_prepared_directory_can_move(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset.directory, copy)
    opened = data.load(data.DataConfig(source="prepared", path=str(copy)))
    assert opened.fingerprint == dataset.fingerprint
    assert opened.tokenizer.encode("a") == dataset.tokenizer.encode("a")


def test_damaged_directories_are_one_line(dataset, tmp_path):
    """Red if a size, hash or fingerprint is not compared."""

    def edit(path, old, new):
        path.write_text(path.read_text().replace(old, new))

    def flip(path):
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)

    def cut(path):
        os.truncate(path, path.stat().st_size - 2)

    def train_with(manifest, change):
        splits = manifest["splits"]
        return splits | {"train": splits["train"] | change}

    def sign(path, **fields):
        manifest = json.loads(path.read_text()) | fields
        manifest["fingerprint"] = manifest_lib.fingerprint(manifest)
        path.write_text(json.dumps(manifest))

    cases = [
        ("train.bin", cut, "bytes, but the manifest says", False),
        ("validation.bin", pathlib.Path.unlink, "missing, but the manifest", False),
        ("train.bin", flip, "sha256 is not the manifest's", True),
        ("manifest.json", cut, "manifest.json: damaged", False),
        ("manifest.json", pathlib.Path.unlink, "holds no manifest.json", False),
        (
            "manifest.json",
            lambda p: edit(p, '"documents": ', '"documents": 1'),
            "edited",
            False,
        ),
        (
            "tokenizer.json",
            lambda p: edit(p, "<eot>", "<eos>"),
            "not the tokenizer",
            False,
        ),
        # Big-endian numbers, well declared, are not read as little-endian ones.
        ("manifest.json", lambda p: sign(p, dtype=">u2"), "dtype '>u2' is none", False),
        (
            "manifest.json",
            lambda p: sign(p, splits={}),
            "splits.validation.file is No",
            False,
        ),
        ("manifest.json", lambda p: sign(p, format=3), "another format than 1", False),
        (
            "manifest.json",
            lambda p: sign(
                p, splits=dataset.manifest.to_json()["splits"] | {"test": {"file": 1}}
            ),
            r"splits is \{.*'test'",
            False,
        ),
        ("manifest.json", lambda p: p.write_text("[" * 99_999), "damaged", False),
        ("manifest.json", lambda p: sign(p, source=["x"]), "source.kind is No", False),
        (
            "manifest.json",
            lambda p: sign(
                p,
                tokenizer=dataset.manifest.to_json()["tokenizer"] | {"end_token": [1]},
            ),
            "tokenizer.end_token is",
            False,
        ),
        *(
            (
                "manifest.json",
                lambda p, change=change: sign(
                    p, splits=train_with(dataset.manifest.to_json(), change)
                ),
                f"splits.train.{next(iter(change))} is",
                False,
            )
            for change in (
                {"file": "../train.bin"},
                {"token_bytes": "x"},
                {"token_bytes": 10**400},
                {"bytes": 1 << 63},
                {"ends_of_document": None},
                {"empty_dropped": -1},
                {"duplicates_of_validation_dropped": 1.5},
            )
        ),
    ]
    for number, (name, damage, message, verify) in enumerate(cases):
        copy = tmp_path / str(number)
        shutil.copytree(dataset.directory, copy)
        damage(copy / name)
        with pytest.raises(errors.DataError, match=message) as caught:
            data.load_directory(copy, verify=verify)
        assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_a_model_with_too_small_a_vocabulary_is_refused(config):
    """Red if expected_vocab_size is ignored; the lookup would clamp silently."""
    data.load(config, expected_vocab_size=257)
    data.load(config, expected_vocab_size=512)
    message = r"model.vocab_size=256: the tokenizer 'bytes' has 257 tokens"
    with pytest.raises(errors.ConfigError, match=message):
        data.load(config, expected_vocab_size=256)


def test_an_id_outside_the_vocabulary_is_not_written(tmp_path, monkeypatch):
    """Red if ids go to disk unchecked: as uint16, 65536 becomes 0."""
    config = data_helpers.config(tmp_path, data_helpers.texts(40))
    encode = preparation.tokenizer_lib.Tokenizer.encode_batch

    def broken(self, texts):
        return [[*ids, 65536] for ids in encode(self, texts)]

    monkeypatch.setattr(preparation.tokenizer_lib.Tokenizer, "encode_batch", broken)
    with pytest.raises(errors.DataError, match=r"token id 65536 is outside .* 257"):
        data.prepare(config)
    assert not data.resolve_dir(config).exists()
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_the_cache_is_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMORYFORMER_DATA", str(tmp_path / "environment"))
    assert data.cache_root(data.DataConfig()) == tmp_path / "environment"
    given = data.DataConfig(data_dir=str(tmp_path / "given"))
    assert data.cache_root(given) == tmp_path / "given"
    monkeypatch.delenv("MEMORYFORMER_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_root(data.DataConfig()) == tmp_path / ".cache/memoryformer"
    with pytest.raises(errors.ConfigError, match="only folders of this machine"):
        data.cache_root(data.DataConfig(data_dir="gs://bucket"))
    monkeypatch.setenv("MEMORYFORMER_DATA", "gs://bucket")
    with pytest.raises(errors.ConfigError, match=r"^MEMORYFORMER_DATA='gs://bucket'"):
        data.cache_root(data.DataConfig())


def test_a_cache_is_made_with_the_folders_above_it(config, tmp_path):
    """Mutation: `parents` left out."""
    nested = dataclasses.replace(config, data_dir=str(tmp_path / "a" / "b" / "c"))
    assert data.prepare(nested).is_dir()


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = data_helpers.config(tmp_path, data_helpers.texts(10))
    blocked = dataclasses.replace(config, data_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(errors.StorageError, match="cannot be written"):
        data.prepare(blocked)


def test_a_split_is_in_its_own_file(dataset):
    """Mutation: `and` for `or`, so that only a split of another name is refused."""
    values = dataset.manifest.to_json()
    assert manifest_lib.Manifest.from_json(values) == dataset.manifest
    splits = values["splits"]
    elsewhere = splits | {"train": splits["train"] | {"file": "validation.bin"}}
    with pytest.raises(ValueError, match=r"^splits\.train\.file is 'validation\.bin'$"):
        manifest_lib.Manifest.from_json(values | {"splits": elsewhere})
    with pytest.raises(ValueError, match=r"^splits is \{"):
        more = splits | {"test": splits["train"]}
        manifest_lib.Manifest.from_json(values | {"splits": more})


def test_ids_of_a_vocabulary():
    """The first that is none is named. Mutations: `<=` for `<`; `>` for `>=`."""
    token_files.check_ids(np.array([], np.int64), 3, "here")
    token_files.check_ids(np.array([0, 2]), 3, "here")
    for ids, bad in (([1, 3, 4], 3), ([[0, 1], [-1, 9]], -1)):
        message = f"here: token id {bad} is outside the vocabulary of 3"
        with pytest.raises(errors.DataError, match=message):
            token_files.check_ids(np.array(ids), 3, "here")


def test_a_text_of_no_bytes_changes_none():
    """Mutation: `not split.token_bytes` left out (a division by zero)."""
    pieces = np.array([1, 2])
    for num_bytes, token_bytes in ((3, 0), (4, 4)):
        split = manifest_lib.SplitFacts(
            "train.bin", 1, 1, 1, num_bytes, token_bytes, 0, 0, ""
        )
        assert manifest_lib.text_bytes(split, pieces) is pieces


def test_a_tokenizer_has_the_name_that_was_asked_for(dataset):
    """Not its path. Mutation: the name left as it was loaded."""
    assert dataset.tokenizer.name == "bytes"


def test_a_directory_without_a_manifest_is_refused(tmp_path):
    """Where the data would be, and where it is said to be.

    Mutations: either check left out of `prepare`.
    """
    config = data_helpers.config(tmp_path, data_helpers.texts(20))
    data.resolve_dir(config).mkdir(parents=True)
    with pytest.raises(errors.DataError, match=r"has no manifest\.json; delete it"):
        data.prepare(config)
    (tmp_path / "empty").mkdir()
    prepared = data.DataConfig(source="prepared", path=str(tmp_path / "empty"))
    with pytest.raises(errors.DataError, match=r"holds no manifest\.json"):
        data.prepare(prepared)


def test_what_was_prepared_is_read_before_it_is_named(tmp_path, monkeypatch):
    """What is damaged is told at once, however it came there.

    Mutations: `manifest_lib.read` left out where the directory is there; after writing.
    """
    config = data_helpers.config(tmp_path / "a" / "b", data_helpers.texts(20))
    directory = data.prepare(config)
    names = {"manifest.json", "tokenizer.json", "train.bin", "validation.bin"}
    assert {path.name for path in directory.iterdir()} == names
    text = (directory / "manifest.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    os.truncate(directory / "train.bin", 2)
    with pytest.raises(errors.DataError, match="the manifest says"):
        data.prepare(config)
    shutil.rmtree(directory)
    monkeypatch.setattr(preparation, "_write", lambda *args: None)
    with pytest.raises(errors.DataError, match=r"holds no manifest\.json"):
        data.prepare(config)


@pytest.mark.parametrize("size, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_the_type_of_the_ids(tmp_path, size, dtype):
    """As narrow as they allow. Mutations: `<` for `<=`; 15 or 17 for 16."""
    spec = preparation.tokenizer_lib.byte_level().spec
    spec["model"]["vocab"]["zz"] = size - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = data_helpers.config(
        tmp_path, data_helpers.texts(12), tokenizer=str(tmp_path / "tokenizer.json")
    )
    dataset = data.load(config)
    assert dataset.manifest.tokenizer.vocab_size == size
    assert dataset.manifest.dtype == dtype == str(dataset.train.tokens.dtype)


class Line:
    """Notes what a progress line is told."""

    def __init__(self):
        self.told = []

    def start(self, *stage):
        self.told.append(stage)

    def update(self, done):
        self.told.append(done)

    def finish(self, done):
        self.told.append(("end", done))

    def check(self):
        pass

    def during(self, stage, work):
        self.told.append(stage)
        return work()

    def watched(self, items):
        return items


def test_documents_are_tokenised_by_the_batch(tmp_path, monkeypatch):
    """Of so many documents or so many characters; memory goes back after large ones.

    Mutations: `and` for `or`; `>` for `>=`; a line of progress left out.
    """
    monkeypatch.setattr(token_files, "_BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(token_files, "_BATCH_CHARS", 100)
    trimmed, sizes, line = [], [], Line()
    monkeypatch.setattr(
        token_files, "give_back_memory", lambda: trimmed.append(len(sizes))
    )
    tokenizer = preparation.tokenizer_lib.byte_level()
    encode = tokenizer.encode_batch
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda t: sizes.append(len(t)) or encode(t)
    )
    texts = ["a", "b", "c", "", "d" * 60, "e" * 40, "f", "g"]
    counts = token_files.write(tmp_path / "train.bin", texts, tokenizer, line)
    assert sizes == [3, 2, 2] and trimmed == [2]
    assert line.told == ["", 3, "", 6, ("end", 8)]
    assert (counts.documents, counts.empty_dropped) == (7, 1)
    assert counts.bytes == counts.token_bytes == 105
    assert counts.tokens == 105 + 8


def test_splits_that_cannot_be(tmp_path, monkeypatch):
    """No text at all; an end of document that the tokenizer made of text.

    Mutations: either check left out; a sign of the numbers turned round.
    """
    tokenizer = preparation.tokenizer_lib.byte_level()

    def write(texts):
        path = tmp_path / "train.bin"
        return token_files.write(path, texts, tokenizer, Line())

    with pytest.raises(errors.DataError, match=r"^train: no document holds any text"):
        write(["", ""])
    encode = tokenizer.encode_batch
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda t: [[*ids, 256] for ids in encode(t)]
    )
    with pytest.raises(errors.DataError, match=r"\(4 ends in 2 documents\)"):
        write(["a", "b"])


def test_a_sample_says_how_far_it_is(tmp_path):
    """Of the text's bytes. Mutations: the records' bytes; the stage not begun."""
    config = data_helpers.config(tmp_path, data_helpers.texts(40), tokenizer="bpe:300")
    line = Line()
    texts = data_helpers.texts(40)

    class Corpus:
        text_bytes, num_bytes = 70, 99

        def sample(self, budget, accept, on_bytes):
            assert budget == preparation.tokenizer_lib.BPE_TRAINING_BYTES == 3_000_000
            on_bytes(7)
            return [text for text in texts if accept(text)]

    made = preparation._tokenizer(
        config, Corpus(), {token_files.digest(texts[0])}, line
    )
    assert made.vocab_size == 300
    begun = ("sampling for the tokenizer", 70, "B")
    assert line.told == [begun, 7, "training bpe:300"]


def test_freed_memory_is_given_back(monkeypatch):
    """Where there is a way. Mutation: `malloc_trim` not called."""
    seen = []
    libc = type("C", (), {"malloc_trim": staticmethod(seen.append)})
    for library in (libc, type("Other", (), {})):
        monkeypatch.setattr(token_files.ctypes, "CDLL", lambda name, c=library: c)
        token_files.give_back_memory()
    assert seen == [0]


def test_contents_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    """Every file and folder is flushed, then renamed; no file stays open.

    Mutations: `os.fsync` or `os.close` left out; either `atomic.flush` left out.
    """
    config = data_helpers.config(tmp_path, data_helpers.texts(20))
    seen = []
    fsync, rename = os.fsync, pathlib.Path.rename

    def note(handle):
        seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def moved(path, target):
        seen.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(pathlib.Path, "rename", moved)
    data.prepare(config)
    before, after = seen[: seen.index("renamed")], seen[seen.index("renamed") + 1 :]
    names = {"manifest.json", "tokenizer.json", "train.bin", "validation.bin"}
    assert names <= set(before) and "cache" in after
    directory = data.resolve_dir(config)
    opened = len(os.listdir("/proc/self/fd"))
    atomic.flush(directory)
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_rename_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Mutation: the error of the rename forgiven although no data set is there."""
    config = data_helpers.config(tmp_path, data_helpers.texts(20))

    def refuse(path, target):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(errors.StorageError, match="Directory not empty"):
        data.prepare(config)
    assert [p.name[:6] for p in (tmp_path / "cache").iterdir()] == [".lock-"]


def test_without_locks_nothing_of_others_is_removed(tmp_path, monkeypatch, capsys):
    """Another process may be at work. Mutations: `yield True`; `if locked` left out."""
    import fcntl

    config = data_helpers.config(tmp_path, data_helpers.texts(20))
    directory = data.resolve_dir(config)
    theirs = directory.with_name(f".tmp-{directory.name}-1")
    theirs.mkdir(parents=True)

    def refuse(handle, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    manifest_lib.read(data.prepare(config))
    assert theirs.exists()
    assert "waiting" not in capsys.readouterr().err


def test_who_waits_says_so_once(tmp_path, capsys):
    """Mutation: at every question."""
    config = data_helpers.config(tmp_path, data_helpers.texts(20))
    (tmp_path / "cache").mkdir()
    questions = iter([False, False, False, True])
    with preparation._locked(data.resolve_dir(config), progress.Progress("")):
        with pytest.raises(errors.Preempted):
            data.prepare(config, stop=lambda: next(questions))
    assert capsys.readouterr().err.count("waiting for another process") == 1


def test_what_names_a_directory(tmp_path, monkeypatch):
    """The corpus's name or kind; long texts, separators and held-out files by content.

    Mutations: any part of the request left out, or `and` for `or`.
    """
    config = data_helpers.config(tmp_path, data_helpers.texts(10))
    with_options = lambda **o: dataclasses.replace(config, source_options=o)  # noqa: E731
    assert re.fullmatch(r"text-[0-9a-f]{16}", data.resolve_dir(config).name)
    named = data.DataConfig("tfds", {"name": "A/b_C:1"}, tokenizer="bytes")
    monkeypatch.setattr(identity, "_catalogue_identity", lambda config: "x")
    assert data.resolve_dir(named).name.startswith("a-b-c-1-")
    request = identity.request(config)
    assert set(request) == {
        "format",
        "source",
        "max_documents",
        "validation_every",
        "tokenizer",
        "files",
        "text_field",
    }
    assert identity.request(named)["tfds"] == "x"
    monkeypatch.setattr(identity.listing, "stdlib_files", lambda: [])
    stdlib = identity.request(data.DataConfig())
    assert "text_field" not in stdlib and stdlib["sample"] == 2
    for separator, line_ends in (("@", None), ("\\n", "\\n or \\r\\n")):
        changed = identity.request(with_options(separator=separator))
        assert changed.get("line_ends") == line_ends
    held_out = identity.request(with_options(validation_path=config.path))
    assert held_out["validation"] == request["files"]


@pytest.mark.parametrize(
    "name, size, cut",
    [
        ("a.txt", 10, False),
        ("a.txt", 11, True),
        ("a.txt.gz", 1, True),
        ("a.TXT.XZ", 1, True),
        ("a.jsonl", 11, False),
        ("a.jsonl.gz", 11, False),
    ],
)
def test_which_files_may_be_cut(tmp_path, monkeypatch, name, size, cut):
    """Those whose text may be long. Mutations: `>=` for `>`; `and` for `or`."""
    monkeypatch.setattr(identity.local_files, "MAX_CHARS", 10)
    (tmp_path / name).write_bytes(b"x" * size)
    assert identity._may_be_cut(tmp_path / name) is cut
