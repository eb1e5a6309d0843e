"""Tokenizers: lossless, one end-of-document token that no text can make."""

import http.server
import json
import os
import subprocess
import sys
import threading
import unicodedata

import data_helpers
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from memoryformer import errors
from memoryformer.data import tokenizer as tokenizer_lib

TRICKY = [
    "",
    " ",
    "a\r\n\tb",
    "<eot> <|endoftext|> </s>",
    "naïve 😀 Ελλάς",
    "\0\x7f",
    "e\u0301",
]


def neox_like(path):
    """A file as GPT-NeoX's: added runs of spaces, NFC, truncation left on."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(data_helpers.texts(20), trainer)
    backend.add_tokens([tokenizers.AddedToken("    ", normalized=True)])
    backend.enable_truncation(4)
    backend.enable_padding()
    backend.save(str(path))
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    path = neox_like(tmp_path_factory.mktemp("neox") / "tokenizer.json")
    return {
        "bytes": tokenizer_lib.load("bytes"),
        "bpe": tokenizer_lib.train_bpe(data_helpers.texts(50), 320),
        "file": tokenizer_lib.load(str(path)),
    }


@pytest.mark.parametrize("name", ["bytes", "bpe", "file"])
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_round_trip_and_byte_counts(three, name, text):
    """Red if special tokens in text are recognised, or truncation stays on."""
    tokenizer = three[name]
    for sample in (text, *TRICKY):
        ids = tokenizer.encode(sample)
        assert tokenizer.eot_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        # NFC changes the text before tokenising, as the tokenizer's authors chose.
        expected = unicodedata.normalize("NFC", sample) if name == "file" else sample
        assert tokenizer.decode(ids) == expected
        assert tokenizer.token_bytes[ids].sum() == len(expected.encode())
        assert tokenizer.encode_batch([sample]) == [ids]
        stream = tokenizer.stream()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.finish() == expected


def test_stream_holds_back_a_cut_character(three):
    """Red if push() decodes each token by itself (U+FFFD appears)."""
    stream = three["bytes"].stream()
    assert [stream.push(b) for b in "é!".encode()] == ["", "é", "!"]
    stream.push(0xC3)
    assert stream.finish() == "\ufffd"


def test_vocabulary_and_special_tokens(three):
    assert three["bytes"].vocab_size == 257 and three["bytes"].eot_id == 256
    assert three["bytes"].encode("hé") == [104, 195, 169]
    assert three["bpe"].vocab_size == 320
    file = three["file"]
    assert file.eot_id == 0 and file.token_bytes[0] == 0
    four_spaces = file.encode("    ")
    assert file.token_bytes[four_spaces].tolist() == [4]
    assert file.token_bytes.dtype == np.int32


def test_training_is_deterministic_and_survives_saving(three, tmp_path):
    again = tokenizer_lib.train_bpe(data_helpers.texts(50), 320)
    assert again.fingerprint == three["bpe"].fingerprint
    again.save(tmp_path / "tokenizer.json")
    loaded = tokenizer_lib.load(str(tmp_path))
    assert loaded.fingerprint == again.fingerprint
    assert loaded.encode("<eot> naïve") == again.encode("<eot> naïve")
    other = tokenizer_lib.train_bpe(data_helpers.texts(50, seed=1), 320)
    assert other.fingerprint != again.fingerprint


def test_sentencepiece_style_files(tmp_path):
    """Red if the space marker counts its three UTF-8 bytes, or <0xE9> its six letters."""
    vocab = {"<unk>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3, "\u2581a": 4, "b": 5}
    vocab |= {"\u2581": 6, "a": 7}
    model = tokenizers.models.BPE(
        vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_lib.load(str(tmp_path))
    ids = tokenizer.encode(" abé")
    assert tokenizer.decode(ids) == " abé"
    assert tokenizer.token_bytes[ids].tolist() == [2, 1, 1, 1]
    assert tokenizer.eot_id == 1


def test_bad_tokenizers_are_one_line(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe")
    no_end = tmp_path / "no_end.json"
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(
        str(no_end)
    )
    words = tmp_path / "words.json"
    model = tokenizers.models.WordLevel(vocab={"a": 0, "</s>": 1}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(words))
    cases = {
        "bpe:abc": "expected bpe:V",
        "bpe:12": "V >= 257",
        "nosuch": "neither a file nor one of",
        "hub:": "expected hub:owner/name",
        str(broken): "not a tokenizer.json",
        str(binary): "cannot be read",
        str(no_end): "no end-of-document token",
        str(words): "neither byte-level nor sentencepiece",
    }
    for spec, message in cases.items():
        with pytest.raises(errors.MemoryFormerError, match=message) as caught:
            tokenizer_lib.bpe_size(spec) or tokenizer_lib.load(spec)
        assert "\n" not in str(caught.value)
    with pytest.raises(errors.DataError, match=r"yields only \d+ tokens"):
        tokenizer_lib.train_bpe(["few words"], 4096)


def test_hub_names_are_downloaded(tmp_path):
    """A local server stands for the hub. Red if the revision or the file name is lost."""
    pytest.importorskip("huggingface_hub")
    body = neox_like(tmp_path / "tokenizer.json").read_bytes()
    commit = "a" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            found = self.path == "/owner/name/resolve/v1/tokenizer.json"
            self.send_response(200 if found else 404)
            if found:
                self.send_header("ETag", '"etag"')
                self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(body)) if found else "0")
            self.end_headers()
            return found

        def do_GET(self):
            if self.do_HEAD():
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = (
        "import json, sys\n"
        "from memoryformer.data import tokenizer\n"
        "try:\n"
        "    print(json.dumps(tokenizer.load(sys.argv[1]).vocab_size))\n"
        "except tokenizer.errors.DataError as e:\n"
        "    print(json.dumps(str(e)))\n"
    )
    address = f"http://127.0.0.1:{server.server_address[1]}"
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    for name in ("no_proxy", "NO_PROXY"):
        environment[name] = "127.0.0.1"

    def load(spec):
        output = subprocess.run(
            [sys.executable, "-c", program, spec],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return json.loads(output)

    try:
        expected = tokenizer_lib.load(str(tmp_path)).vocab_size
        assert load("hub:owner/name@v1") == expected
        assert "could not be fetched" in load("hub:owner/other@v1")
    finally:
        server.shutdown()
        server.server_close()


def test_ids_that_only_pad_the_vocabulary_have_no_text():
    """A model may sample one: its vocabulary is rounded up, the tokenizer's is not.

    Mutation: `self.pieces[token]` whatever the token.
    """
    padded = tokenizer_lib.byte_level()
    ids = [*b"ab", padded.vocab_size + 3, *b"c"]
    stream = padded.stream()
    assert padded.decode(ids) == "abc"
    assert "".join(map(stream.push, ids)) + stream.finish() == "abc"
