"""Corpora: TFDS builders without TensorFlow, and one line for every bad input."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import logging
import lzma
import subprocess
import sys

import data_helpers
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

from memoryformer import data, errors
from memoryformer.data import (
    corpora,
    listing,
    local_files,
    text_files,
    tfds_catalogue,
)


def records(builder, split):
    source = builder.as_data_source(split=split)
    return {
        source[i]["name"].decode(): source[i]["text"].decode()
        for i in range(len(source))
    }


def test_the_builders_are_tfds_builders(tmp_path):
    """download_and_prepare, as_data_source and builder_from_directory really run."""
    texts = data_helpers.texts(30)
    corpus = data_helpers.folder(tmp_path / "corpus", texts)
    config = corpora.TextConfig(name="mine", path=str(corpus), validation_every=4)
    builder = corpora.TextFiles(config=config, data_dir=str(tmp_path / "tfds"))
    builder.download_and_prepare()
    splits = {split: records(builder, split) for split in ("train", "validation")}
    expected = {f"{i:04d}.txt": text for i, text in enumerate(texts)}
    assert splits["train"] | splits["validation"] == expected
    for split, held in splits.items():
        for text in held.values():
            assert local_files.in_validation(text, 4) == (split == "validation")
    again = tfds.builder_from_directory(builder.data_path)
    assert set(again.info.features) == {"name", "text"}
    assert len(again.as_data_source(split="train")) == len(splits["train"])
    assert list(splits["train"]) == sorted(splits["train"]), "order of the files lost"


def test_of_equals_the_first_is_held_out(tmp_path):
    """Where the rule holds out none, the smallest remainder does, and of several the first.

    Mutation: `<=` for `<`, another validation split for the same text.
    """
    texts = [t for t in data_helpers.texts(30) if not local_files.in_validation(t, 2)][
        :4
    ]
    corpus = data_helpers.folder(tmp_path / "corpus", texts)
    config = corpora.TextConfig(name="mine", path=str(corpus), validation_every=2)
    builder = corpora.TextFiles(config=config, data_dir=str(tmp_path / "tfds"))
    builder.download_and_prepare()
    assert list(records(builder, "validation").values()) == texts[:1]


def test_stdlib_is_the_default_and_leaves_tests_out(tmp_path):
    """Red if the split goes by content, or a test directory slips in."""
    found = dict(listing.stdlib_files())
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(found)
    assert not any("test" in key.split("/")[:-1] for key in found)
    builder = corpora.local_builder(
        data.DataConfig(source_options={"max_documents": 60}), str(tmp_path / "tfds")
    )
    assert isinstance(builder, corpora.Stdlib)
    builder.download_and_prepare()
    train, held_out = (records(builder, s) for s in ("train", "validation"))
    assert len(train) + len(held_out) == 60
    assert {
        key for key in train | held_out if local_files.in_validation(key, 20)
    } == set(held_out)
    assert held_out and train["abc.py"] == found["abc.py"].read_text(encoding="utf-8")


def test_preparing_the_stdlib_imports_no_tensorflow(tmp_path):
    program = (
        "import sys\n"
        "from memoryformer import data\n"
        "few = {'max_documents': 50}\n"
        "c = data.DataConfig(source_options=few, tokenizer='bytes', data_dir=sys.argv[1])\n"
        "d = data.load(c)\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
        "assert not {'tensorflow', 'torch'} & set(sys.modules)\n"
        "print(d.manifest.splits['train'].documents)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    # Nothing of TFDS's chatter reaches stdout.
    assert run.stdout.strip().isdecimal() and int(run.stdout) > 30


def prepared_texts(config):
    dataset = data.load(config)
    eot = dataset.tokenizer.eot_id
    result = []
    for split in (dataset.train, dataset.validation):
        pieces = bytes(0 if t == eot else t for t in split.tokens).split(b"\0")
        result += [piece.decode() for piece in pieces if piece]
    return sorted(result), dataset


def test_c4_style_shards(tmp_path):
    """Folder with other files beside; plain, .gz and .xz shards; two shards."""
    texts = data_helpers.texts(60)
    folder = tmp_path / "c4"
    data_helpers.jsonl_gz(folder / "c4-train.00000-of-00003.json.gz", texts[:30])
    (folder / "README.md").write_text("not a shard")
    lines = [json.dumps({"text": text}) for text in texts[30:40]]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n\n")
    lines = [json.dumps({"text": text}) for text in [*texts[40:], ""]]
    with lzma.open(folder / "c.jsonl.xz", "wt") as stream:
        stream.write("\n".join(lines))
    config = data.DataConfig(
        source="c4",
        path=str(folder),
        tokenizer="bytes",
        data_dir=str(tmp_path / "cache"),
    )
    found, dataset = prepared_texts(config)
    assert found == sorted(texts)
    assert sum(s.empty_dropped for s in dataset.manifest.splits.values()) == 1
    globbed = data.DataConfig(
        source="c4",
        path=str(folder / "c4-train*.json.gz"),
        tokenizer="bytes",
        source_options={"max_documents": 25},
        data_dir=str(tmp_path / "cache"),
    )
    assert prepared_texts(globbed)[0] == sorted(texts[:25])


def test_pile_style_zstandard_shards(tmp_path):
    """Two frames in one file. Red if reading stops after the first, or at a cut."""
    zstandard = pytest.importorskip("zstandard")
    texts = data_helpers.texts(200)
    lines = [json.dumps({"text": text, "meta": {}}).encode() + b"\n" for text in texts]
    frames = [zstandard.compress(b"".join(part)) for part in (lines[:90], lines[90:])]
    shard = tmp_path / "pile" / "00.jsonl.zst"
    shard.parent.mkdir()
    shard.write_bytes(b"".join(frames))
    config = data.DataConfig(
        source="c4",
        path=str(shard),
        tokenizer="bytes",
        data_dir=str(tmp_path / "cache"),
    )
    assert prepared_texts(config)[0] == sorted(texts)
    shard.write_bytes(b"".join(frames)[:-300])
    with pytest.raises(errors.DataError, match=r"00.jsonl.zst"):
        data.prepare(config)


def test_one_text_file_is_cut_into_documents(tmp_path):
    """Red if a lone file is one document: there would be nothing to hold out."""
    text = "\n".join(data_helpers.texts(200))
    path = tmp_path / "all.txt"
    path.write_text(text, encoding="utf-8")
    config = data.DataConfig(
        source="text",
        path=str(path),
        tokenizer="bytes",
        data_dir=str(tmp_path / "cache"),
    )
    found, dataset = prepared_texts(config)
    assert sorted("".join(found)) == sorted(text)
    assert all(piece.endswith("\n") or text.endswith(piece) for piece in found)
    assert dataset.manifest.splits["validation"].documents >= 1
    assert dataset.manifest.splits["train"].documents > 50


def test_two_documents_are_enough_for_two_splits(tmp_path):
    """Red if the split relies on the hash hitting some document."""
    config = data_helpers.config(
        tmp_path, data_helpers.texts(2), {"validation_every": 1000}
    )
    splits = data.load(config).manifest.splits
    assert splits["train"].documents == splits["validation"].documents == 1


def test_a_corpus_that_is_all_held_out_is_refused(tmp_path):
    """Red if one of its documents is taken for the one to hold out."""
    texts = [t for t in data_helpers.texts(20) if local_files.in_validation(t, 2)][:4]
    config = data_helpers.config(tmp_path, texts, {"validation_every": 2})
    with pytest.raises(errors.DataError, match="4 documents cannot be split"):
        data.prepare(config)


def bad_inputs(root):
    """name -> (fields of DataConfig, words of the message)."""
    folder = data_helpers.folder(root / "good", data_helpers.texts(10))
    (root / "empty_folder").mkdir()
    (root / "empty.txt").touch()
    (root / "binary.bin").write_bytes(b"MZ\0\0\1" * 100)
    (root / "latin.txt").write_bytes("line one\ncaf\xe9\n".encode("latin-1"))
    (root / "one.txt").write_text("x")
    whole = data_helpers.jsonl_gz(
        root / "w" / "whole.jsonl.gz", data_helpers.texts(200)
    )
    (root / "cut.jsonl.gz").write_bytes(whole.read_bytes()[:-200])
    (root / "not_gzip.jsonl.gz").write_text('{"text": "a"}')
    (root / "invalid.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (root / "nofield.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (root / "number.jsonl").write_text('{"text": 3}\n')
    (root / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    (root / "bytes.jsonl").write_bytes(b'{"text": "\xff"}\n')
    (root / "zst.jsonl.zst").write_bytes(b"not zstd")
    with gzip.open(root / "hollow.jsonl.gz", "wb"):
        pass

    def text(name, **more):
        return {"source": "text", "path": str(root / name)} | more

    return {
        "missing path": (text("nowhere"), "nowhere.*no such file or folder"),
        "no match": (text("*.nope"), "holds no files"),
        "empty folder": (text("empty_folder"), "holds no files"),
        "no shards": ({"source": "c4", "path": str(folder)}, "no JSON-lines files"),
        "empty file": (text("empty.txt"), r"empty.txt: the file is empty"),
        "binary file": (text("binary.bin"), r"binary.bin: a binary file"),
        "bad UTF-8": (text("latin.txt"), r"latin.txt:2: not UTF-8 \(byte 12\)"),
        "cut gzip": (text("cut.jsonl.gz"), r"cut.jsonl.gz: damaged or truncated"),
        "no gzip": (text("not_gzip.jsonl.gz"), "not_gzip.jsonl.gz: damaged"),
        "bad JSON": (text("invalid.jsonl"), r"invalid.jsonl:2: not a JSON line"),
        "no field": (
            text("nofield.jsonl"),
            r"nofield.jsonl:2: no text in field 'text' .found: body",
        ),
        "not text": (text("number.jsonl"), r"number.jsonl:1: no text in field"),
        "surrogate": (text("surrogate.jsonl"), r"surrogate.jsonl:1: a lone surrogate"),
        "JSON bytes": (text("bytes.jsonl"), r"bytes.jsonl:1: not UTF-8"),
        "zstd": (text("zst.jsonl.zst"), r"zst.jsonl.zst: (damaged|reading .zst needs)"),
        "hollow gzip": (text("hollow.jsonl.gz"), "hollow.jsonl.gz: the file is empty"),
        "one document": (text("one.txt"), "cannot be split"),
        "validation": (
            text("good", source_options={"validation_path": "nowhere"}),
            "data.source_options.validation_path",
        ),
        "source": ({"source": "txt"}, "data.source='txt'.*did you mean 'text'"),
        "no path": ({"source": "text"}, "data.path=''"),
        "ignored path": ({"path": "corpus"}, "'stdlib' does not use it; .* of text"),
        "ignored name": (
            text("good", source_options={"name": "lm1b"}),
            "data.source_options.name: source='text' has no such option .* of tfds",
        ),
        "no name": ({"source": "tfds"}, "data.source_options.name=''"),
        "tokenizer": (text("good", tokenizer="gpt"), "data.tokenizer='gpt'"),
        "bpe size": (text("good", tokenizer="bpe:9"), "V >= 257"),
        "big bpe": (text("good", tokenizer="bpe:40000"), "yields only"),
        "every": ({"source_options": {"validation_every": 1}}, "validation_every=1"),
        "prepared": ({"source": "prepared", "path": str(folder)}, "no manifest.json"),
    }


def test_files_without_text_in_a_folder_are_skipped(tmp_path, capsys):
    """Told with their number in one line; refused where nothing is left.

    Red when one of them stops the run, becomes a document, or goes untold.
    """
    texts = data_helpers.texts(12)
    config = data_helpers.config(tmp_path, texts)
    corpus = tmp_path / "corpus"
    (corpus / "a_logo.png").write_bytes(b"\x89PNG\r\n\0\0" * 99)
    (corpus / "b_binary.txt.gz").write_bytes(gzip.compress(b"MZ\0" * 99))
    (corpus / "__init__.py").touch()
    (corpus / "none.jsonl").touch()
    (corpus / "hollow.txt.gz").write_bytes(gzip.compress(b""))
    assert prepared_texts(config)[0] == sorted(texts)
    [line] = [x for x in capsys.readouterr().err.splitlines() if "skipped" in x]
    assert line.endswith(": 5 files skipped: 3 empty, 2 binary (__init__.py, ..)")
    for file in corpus.glob("0*.txt"):
        file.unlink()
    with pytest.raises(errors.DataError, match="holds no text: 5 files skipped: 3 em"):
        data.prepare(config)


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path):
    """Every row of the table. Red for a traceback of another kind or a leftover."""
    cache = tmp_path / "cache"
    for name, (fields, message) in bad_inputs(tmp_path / "in").items():
        fields = {"tokenizer": "bytes", "data_dir": str(cache)} | fields
        with pytest.raises(errors.MemoryFormerError, match=message) as caught:
            data.prepare(data.DataConfig(**fields))
        assert "\n" not in str(caught.value), name
        kinds = errors.ConfigError, errors.DataError
        assert isinstance(caught.value, kinds), name
        left = [p for p in cache.glob("*") if not p.name.startswith(".lock-")]
        assert not left, (name, left)


def test_tfds_catalogue_names(tmp_path):
    """A stock name through TFDS's mock, which draws no bars of its own.

    Mutation: `disable_progress_bar` left out.
    """
    tfds.enable_progress_bar()
    lines = [text.encode() for text in data_helpers.texts(100)]

    def as_data_source(self, split, decoders=None, **kwargs):
        part = lines[:60] if str(split) == "train" else lines[40:]
        return _Records(part)

    config = data.DataConfig(
        source="tfds",
        source_options={"name": "lm1b"},
        tokenizer="bytes",
        data_dir=str(tmp_path / "cache"),
    )
    with tfds.testing.mock_data(as_data_source_fn=as_data_source):
        found, dataset = prepared_texts(config)
    assert found == sorted(line.decode() for line in lines[:60])
    validation = dataset.manifest.splits["validation"]
    assert 1 <= validation.documents <= 10
    assert not tqdm_utils._active


class _Records:
    def __init__(self, lines):
        self.lines = lines

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        return {"text": self.lines[index]}

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_a_prepared_tfds_directory_is_read(tmp_path):
    """Somebody's array_record data set by its directory: no builder code needed."""
    texts = data_helpers.texts(50)
    corpus = data_helpers.folder(tmp_path / "corpus", texts)
    made = corpora.TextFiles(
        config=corpora.TextConfig(name="mine", path=str(corpus), validation_every=5),
        data_dir=str(tmp_path / "tfds"),
    )
    made.download_and_prepare()
    config = data.DataConfig(
        source="tfds",
        source_options={"name": "theirs"},
        path=str(made.data_path),
        tokenizer="bytes",
        data_dir=str(tmp_path / "cache"),
    )
    found, dataset = prepared_texts(config)
    assert found == sorted(texts)
    held_out = len(made.as_data_source(split="validation"))
    assert dataset.manifest.splits["validation"].documents == held_out
    with pytest.raises(errors.DataError, match=r"no feature 'body' .found: name, text"):
        options = {"name": "theirs", "text_field": "body"}
        data.prepare(dataclasses.replace(config, source_options=options))


def test_tfds_names_that_cannot_work_say_what_to_do(tmp_path, capsys):
    """c4 needs Beam; the other name does not exist."""
    for name, message in {
        "c4": "cannot run without TensorFlow or Beam.*data.source='c4'",
        "nosuch_name": "knows no such data set",
    }.items():
        config = data.DataConfig(
            source="tfds",
            source_options={"name": name},
            path=str(tmp_path / "tfds"),
            tokenizer="bytes",
            data_dir=str(tmp_path / "cache"),
        )
        with pytest.raises(errors.ConfigError, match=message) as caught:
            data.prepare(config)
        assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == "", "TFDS's banners belong nowhere"


def bare(**fields):
    """A builder of text files that writes nothing."""
    config = corpora.TextConfig(name="mine", **fields)
    return corpora.TextFiles(config=config, data_dir="/nowhere")


def test_how_much_there_is_to_read(tmp_path):
    """Each split reads its files: twice those of one corpus, once each of two.

    Mutations: a difference for the sum; held-out files counted where there are none.
    """
    one = data_helpers.folder(tmp_path / "one", ["abc", "de"])
    two = data_helpers.folder(tmp_path / "two", ["abcdefg"])
    assert bare(path=str(one)).input_bytes() == 10
    assert bare(path=str(one), validation_path=str(two)).input_bytes() == 12
    assert bare(path=str(one)).builder_config.max_documents == 0


def test_how_far_reading_is(tmp_path):
    """Bytes of files, never back and never beyond a file's end.

    Mutations: any sign in `_examples`; the last line of a split left out.
    """
    texts = ["é" * 10, "abc", "ü" * 15]
    corpus = data_helpers.folder(tmp_path / "corpus", texts)
    builder = bare(path=str(corpus))
    done = []
    builder.on_bytes = done.append
    files = builder._train_files()
    found = [example["text"] for _, example in builder._examples(files)]
    assert found == texts and done == [10, 23, 38]
    assert builder._bytes_read == 53  # the whole, whatever its characters
    list(builder._examples(files))
    assert done[3:] == [63, 76, 91] and builder._bytes_read == 106
    one = bare(path=str(corpus / "0001.txt"))
    one.on_bytes = done.append
    list(one._examples(one._train_files()))
    assert done[-1] == 3


def test_markers_are_counted_where_they_are_text(tmp_path):
    """Mutations: `and` for `or`; a marker counted twice."""
    marked = f"a{text_files.MARKER}b{text_files.MARKER}"
    corpus = data_helpers.folder(tmp_path / "c", [marked, "plain", marked + "x"])
    builder = bare(path=str(corpus))
    assert builder.marker_line() == ""
    list(builder._examples(builder._train_files()))
    assert builder.marker_line().startswith(
        "documents with <|endoftext|> as plain text: 2; "
    )
    split = bare(path=str(corpus), separator="@@")
    list(split._examples(split._train_files()))
    assert split.marker_line() == ""


def test_who_is_held_out(tmp_path):
    """None of one document; the fallback where the rule takes none, no other.

    Mutations: `and` for `or`; `!=` for `==`; 2 documents of the same text are one.
    """
    texts = [t for t in data_helpers.texts(30) if not local_files.in_validation(t, 3)]
    taken = next(t for t in data_helpers.texts(30) if local_files.in_validation(t, 3))
    for name, documents, count in (
        ("same", ["x", "x", "x"], "3 documents"),
        ("one", ["x"], "1 document"),
    ):
        folder = data_helpers.folder(tmp_path / name, documents)
        builder = bare(path=str(folder), validation_every=1000)
        builder._split_key = lambda name, text: text
        with pytest.raises(errors.DataError, match=rf"{name}: {count} cannot be split"):
            if name == "one":  # whole, not in pieces
                builder._documents = lambda files: iter([("k", "x", 0)])
            builder._fallback_key()
    folder = data_helpers.folder(tmp_path / "none", texts[:4])
    assert bare(path=str(folder), validation_every=3)._fallback_key() in texts[:4]
    folder = data_helpers.folder(tmp_path / "some", [*texts[:4], taken])
    builder = bare(path=str(folder), validation_every=3)
    assert builder._fallback_key() == ""
    files = builder._train_files()
    splits = {
        split: [e["text"] for _, e in builder._examples(files, split, texts[1])]
        for split in ("train", "validation")
    }
    assert splits == {"train": [texts[0], *texts[2:4]], "validation": [texts[1], taken]}


def test_skipped_files_are_counted_by_reason():
    """Mutation: another order."""
    line = text_files.skipped_line({"b": "empty", "a": "binary", "c": "empty"})
    assert line == "3 files skipped: 2 empty, 1 binary (a, ..)"


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (ImportError("no tensorflow"), errors.ConfigError, "cannot run without Tensor"),
        (NotImplementedError("x"), errors.ConfigError, "NotImplementedError: x"),
        (
            ValueError("a\n b"),
            errors.DataError,
            r"could not prepare it .ValueError: a b",
        ),
        (errors.DataError("ours"), errors.DataError, "^ours$"),
    ],
)
def test_failures_of_tfds_are_one_line(error, kind, message):
    """What it says, up to 160 characters. Mutations: 161; ours explained once more."""
    with pytest.raises(kind, match=message):
        with tfds_catalogue._explained("x"):
            raise error
    for long in (ImportError("y" * 200), ValueError("y" * 200)):
        with pytest.raises(errors.MemoryFormerError) as caught:
            with tfds_catalogue._explained("x"):
                raise long
        assert f": {'y' * 160});" in str(caught.value)


def test_tfds_is_quiet_for_a_while(capsys):
    """Its level and standard output come back, also behind an error.

    Mutations: either level not set.
    """
    log = logging.getLogger("absl")
    before = log.level
    with contextlib.suppress(ValueError), tfds_catalogue.quiet():
        print("a banner")
        assert log.level == logging.ERROR
        raise ValueError
    assert log.level == before
    print("a result")
    assert capsys.readouterr().out == "a result\n"


def test_held_out_splits_of_tfds(tmp_path):
    """Under any of their names, `validation` first; prepared only where they are not.

    Mutations: `not` left out; another order of names; the feature not looked for.
    """

    class Found:
        def __init__(self, *names, prepared=True):
            self.made, self.prepared = [], prepared
            features = {"text": None}
            self.info = type("I", (), {"splits": names, "features": features})

        def is_prepared(self):
            return self.prepared

        def download_and_prepare(self):
            self.made.append("prepared")

        def as_data_source(self, split):
            return split

    config = data.DataConfig(source="tfds", source_options={"name": "x"})
    for names, held_out in (
        (("train",), None),
        (("train", "dev", "validation"), "validation"),
        (("train", "val"), "val"),
        (("train", "test"), None),
    ):
        found = Found(*names)
        splits = tfds_catalogue.sources(found, config)
        wanted = {"train": "train"} | ({"validation": held_out} if held_out else {})
        assert splits == wanted and not found.made
    fresh = Found("train", prepared=False)
    tfds_catalogue.sources(fresh, config)
    assert fresh.made == ["prepared"]


def test_the_first_thousand_may_be_held_out():
    """No more are remembered. Mutations: 1001; `<=` for `<`."""
    builder = bare(path="x", validation_every=10**12)
    builder._train_files = list

    def remainder(key):
        return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10**12

    texts = sorted(map(str, range(1001)), key=remainder, reverse=True)
    builder._documents = lambda files: iter([("k", text, 0) for text in texts])
    assert builder._fallback_key() == texts[999]
