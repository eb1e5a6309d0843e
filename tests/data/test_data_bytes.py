"""Bytes are the text's, whatever the tokenizer makes of it; data is known by its contents."""

import json

import data_helpers
import numpy as np
import pytest
import tokenizers

from memoryformer import data, errors
from memoryformer.data import manifest as manifest_lib
from memoryformer.data import yardsticks


def lossy(path):
    """Unigram with NFKC, lower case and an <unk>: adds a space, drops and changes text."""
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    texts = [text.replace("naïve", "") for text in data_helpers.texts(40)]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=100,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(path))
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    texts = [text.replace("hash", "NAÏVE Hash") for text in data_helpers.texts(60)]
    path = lossy(folder / "tokenizer.json")
    return data.load(data_helpers.config(folder, texts, tokenizer=str(path)))


def test_the_bytes_of_a_split_are_those_of_its_text(dataset, tmp_path):
    """Mutation: `text_bytes` returns the bytes of the tokens."""
    split = dataset.manifest.splits["validation"]
    targets = np.array(dataset.validation.tokens[1:], np.int64)
    tokens = int(dataset.tokenizer.token_bytes[targets].sum())
    assert tokens == split.token_bytes != split.bytes
    assert round(float(dataset.token_bytes[targets].sum())) == split.bytes
    half = targets[: len(targets) // 2]
    share = dataset.token_bytes[half].sum() / dataset.tokenizer.token_bytes[half].sum()
    assert share == pytest.approx(split.bytes / split.token_bytes, rel=1e-12)
    plain = data.load(data_helpers.config(tmp_path, data_helpers.texts(30)))
    assert plain.token_bytes is plain.tokenizer.token_bytes


def test_what_a_tokenizer_does_not_keep_is_said(dataset, tmp_path, capsys):
    """In one line, when it is prepared; nothing where all is kept.

    Mutation: `byte_note` compares a count with itself.
    """
    splits = dataset.manifest.splits.values()
    text, tokens = (
        sum(getattr(s, key) for s in splits) for key in ("bytes", "token_bytes")
    )
    note = manifest_lib.byte_note(dataset.manifest)
    assert f"the text has {text:,}, its tokens stand for {tokens:,}" in note
    config = data_helpers.config(
        tmp_path,
        data_helpers.texts(30),
        tokenizer=dataset.manifest.tokenizer.name,
    )
    data.prepare(config)
    assert "does not keep every byte" in capsys.readouterr().err
    plain = data.prepare(data_helpers.config(tmp_path, data_helpers.texts(30)))
    assert "keep every byte" not in capsys.readouterr().err
    assert manifest_lib.byte_note(manifest_lib.read(plain)) == ""


def test_compressors_see_the_text_without_added_spaces(tmp_path, monkeypatch):
    """A space before every document is the tokenizer's, not the text's.

    Mutations: `decode_bytes` without looking for ends of documents; `begins = False`.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.pre_tokenizer = split
    backend.decoder = tokenizers.decoders.ByteLevel()
    texts = data_helpers.texts(30)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["</s>"],
        initial_alphabet=split.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = data_helpers.config(
        tmp_path, texts, tokenizer=str(tmp_path / "tokenizer.json")
    )
    opened = data.load(config)
    monkeypatch.setattr(yardsticks, "CHUNK_TOKENS", 1)  # each ends before a document
    for split in (opened.train, opened.validation):
        seen = yardsticks._split_bytes(split, opened.tokenizer, 1 << 30)
        facts = opened.manifest.splits[split.name]
        assert len(seen) == facts.bytes == facts.token_bytes - facts.documents
        assert sum(text.encode() in seen for text in texts) == facts.documents


def test_data_is_found_by_its_fingerprint(tmp_path, monkeypatch):
    """Whatever else lies in the cache, and without the corpus; other data is refused.

    Mutation: `directory_of` compares nothing; `check` left out of `find`.
    """
    config = data_helpers.config(tmp_path, data_helpers.texts(30))
    made = data.load(config)
    for name, text in (("a", "{"), ("b", "[]"), ("c", "[" * 100_000), ("d", "{}")):
        (tmp_path / "cache" / name).mkdir()
        (tmp_path / "cache" / name / "manifest.json").write_text(text)
    (tmp_path / "corpus").rename(tmp_path / "away")
    assert data.find(config, made.fingerprint).directory == made.directory
    (tmp_path / "corpus").mkdir()
    for i, text in enumerate(data_helpers.texts(30, seed=1)):
        (tmp_path / "corpus" / f"{i}.txt").write_text(text, encoding="utf-8")
    assert data.find(config, made.fingerprint).directory == made.directory
    with pytest.raises(errors.DataError, match="has fingerprint"):
        data.find(config, "0" * 64)


def test_an_end_token_that_would_be_ignored_is_refused(tmp_path):
    """Mutation: the check left out of `DataConfig`."""
    for fields in (
        {"tokenizer": "bytes"},
        {"tokenizer": "bpe:300"},
        {"source": "prepared", "path": str(tmp_path), "tokenizer": "x.json"},
    ):
        with pytest.raises(errors.ConfigError, match=r"data\.end_token='<x>'"):
            data.DataConfig(end_token="<x>", **fields)
    assert data.DataConfig(end_token="<x>", tokenizer="x.json").end_token == "<x>"


def test_the_end_token_is_part_of_the_data(tmp_path):
    """Another end is other data; a prepared directory needs no option to be read.

    Mutation: `end_token` not handed to `tokenizer_lib.load` in `preparation._request`, or not
    written to the manifest.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<a>", "<b>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(data_helpers.texts(20), trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    opened = {}
    for end in ("", "<a>", "<b>"):
        config = data_helpers.config(
            tmp_path,
            data_helpers.texts(30),
            tokenizer=str(tmp_path / "tokenizer.json"),
            end_token=end,
        )
        opened[end] = data.load(config)
        assert opened[end].tokenizer.end_token == (end or "</s>")
        assert opened[end].train.tokens[0] == {"<a>": 0, "<b>": 1, "": 2}[end]
    assert len({dataset.fingerprint for dataset in opened.values()}) == 3
    moved = data.DataConfig(source="prepared", path=str(opened["<b>"].directory))
    assert data.load(moved).tokenizer.eot_id == 1
    manifest = json.loads((opened["<b>"].directory / "manifest.json").read_text())
    assert manifest["tokenizer"]["end_token"] == "<b>"
