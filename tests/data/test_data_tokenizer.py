"""Tokenizers: lossless, one end-of-document token that no text can make."""

import http.server
import json
import os
import subprocess
import sys
import threading
import types
import unicodedata

import data_helpers
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from memoryformer import errors
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.data import vocabulary
from memoryformer.files import atomic

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
    assert file.token_bytes[1] == 0 and file.decode([1]) == ""  # <|padding|>
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
    assert tokenizer.token_bytes[0] == 0 and tokenizer.decode([0]) == ""  # <unk>


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

    Mutations: `self.pieces[token]` whatever the token; `<=` for `<`.
    """
    padded = tokenizer_lib.byte_level()
    ids = [*b"ab", padded.vocab_size, padded.vocab_size + 3, -2, *b"c"]
    stream = padded.stream()
    assert padded.decode(ids) == "abc"
    assert "".join(map(stream.push, ids)) + stream.finish() == "abc"


def trained(model, trainer, pre_tokenizer, edit=None):
    """The parsed tokenizer.json of a small tokenizer."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(data_helpers.texts(30), trainer)
    spec = json.loads(backend.to_str())
    if edit:
        edit(spec)
    return spec


def byte_bpe(*special, edit=None, **options):
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    split = tokenizers.pre_tokenizers.ByteLevel(**options)
    return trained(tokenizers.models.BPE(), trainer, split, edit)


def unigram():
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=80,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=list("</s>pad"),
        show_progress=False,
    )
    model = tokenizers.models.Unigram()
    return trained(model, trainer, tokenizers.pre_tokenizers.Metaspace())


def llama_like(specials_are_bytes, change=lambda spec: None):
    """Byte fallback, a space before every text; `<0x..>` perhaps marked as special."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", *(fallback if specials_are_bytes else [])]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, show_progress=False
    )

    def edit(spec):
        vocab = spec["model"]["vocab"]
        for byte in fallback:
            vocab.setdefault(byte, len(vocab))
        spec["model"]["byte_fallback"] = True
        change(spec)

    split = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return trained(tokenizers.models.BPE(unk_token="<unk>"), trainer, split, edit)


def not_special(spec):
    for token in spec["added_tokens"]:
        token["special"] = False


def made(spec, end_token=""):
    return tokenizer_lib.Tokenizer(json.dumps(spec), "made", end_token)


SPECS = {
    "not special": lambda: byte_bpe("<|endoftext|>", "<pad>", edit=not_special),
    "unigram": unigram,
    "prefix": lambda: byte_bpe("</s>", add_prefix_space=True),
    "llama": lambda: llama_like(False),
    "llama, special bytes": lambda: llama_like(True),
    "llama, nothing special": lambda: llama_like(True, not_special),
}


@pytest.mark.parametrize("name", SPECS)
def test_text_never_makes_a_special_token(name):
    """Whatever it spells, in whichever family, alone or inside a text.

    Mutations: `for_text` returns the spec as it is; the names hidden in added tokens
    only; "special" not set for `<0x41>`, which then is the byte A.
    """
    tokenizer = made(SPECS[name]())
    names = ["<|endoftext|>", "</s>", "<pad>", "<0x41>", tokenizer.end_token]
    for text in (*names, *(f"a {n} table{n}" for n in names)):
        ids = tokenizer.encode(text)
        unknown = {i for i in ids if not tokenizer.piece(i)}
        assert tokenizer.eot_id not in ids
        if name == "unigram":  # it has no other way to say what it does not know
            assert unknown <= {tokenizer.spec["model"]["unk_id"]}
        else:
            assert not unknown and tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["prefix", "llama", "llama, special bytes"])
def test_the_space_before_a_text_is_no_part_of_it(name):
    """Dropped where a document begins, kept where a text goes on; streams the same.

    Mutations: `removeprefix` always, or never; `ended` left out of `bytes_of`.
    """
    tokenizer = made(SPECS[name]())
    assert tokenizer.prefix == b" "
    for text in ("table hash", "日本 x", "  two"):
        ids = tokenizer.encode(text)
        expected = text.removeprefix(" ")  # of two spaces, one looks like the prefix
        assert tokenizer.decode(ids) == expected
        goes_on = tokenizer.decode(ids, start=False)
        assert goes_on == " " + expected
        unused = [tokenizer.vocab_size, *ids]  # nothing of the text was seen yet
        assert tokenizer.decode(unused) == expected
        two = [tokenizer.eot_id, *ids, tokenizer.eot_id, *ids]
        assert tokenizer.decode(two, start=False) == expected * 2
        for start, whole in ((True, expected), (False, goes_on)):
            stream = tokenizer.stream(start)
            assert "".join(map(stream.push, ids)) + stream.finish() == whole
    assert tokenizer_lib.byte_level().prefix == b""


def test_names_outside_the_byte_alphabet_stand_for_themselves():
    """As `tokenizers` decodes them.

    Mutation: `to_byte[char]` for every token (a KeyError).
    """

    def edit(spec):
        spec["model"]["vocab"]["<unused 1>"] = len(spec["model"]["vocab"])

    tokenizer = made(byte_bpe("<|endoftext|>", edit=edit))
    unused = tokenizer.vocab_size - 1
    assert tokenizer.piece(unused) == b"<unused 1>"
    assert tokenizer.decode(tokenizer.encode("a <unused 1>")) == "a <unused 1>"
    assert unused not in tokenizer.encode("a <unused 1>")


def test_an_end_token_of_its_own():
    """Named by data.end_token; another end makes another fingerprint.

    Mutation: the end token left out of the fingerprint.
    """
    spec = byte_bpe("<BOS_TOKEN>", "<EOS_TOKEN>")
    with pytest.raises(errors.DataError, match=r"data\.end_token=TOKEN \(it has <BOS_"):
        made(spec)
    named = made(spec, "<EOS_TOKEN>")
    assert named.eot_id == 1 and named.end_token == "<EOS_TOKEN>"
    assert named.decode([0, 1]) == ""
    with pytest.raises(errors.ConfigError, match="did you mean '<EOS_TOKEN>'"):
        made(spec, "<EOS_TOKN>")
    with pytest.raises(errors.ConfigError, match=r"data\.end_token='a'"):
        made(spec, "a")  # text needs it
    both = byte_bpe("</s>", "<|endoftext|>")
    usual, other = made(both), made(both, "</s>")
    assert usual.end_token == "<|endoftext|>" and other.end_token == "</s>"
    assert made(both, "<|endoftext|>").fingerprint == usual.fingerprint
    assert other.fingerprint != usual.fingerprint


def test_odd_tokenizer_files(tmp_path):
    """A byte order mark is no content; an id that no table can hold, in one line.

    Mutation: `check_ids` left out (minutes and gigabytes).
    """
    path = tmp_path / "tokenizer.json"
    path.write_text("\ufeff" + json.dumps(byte_bpe("</s>")))
    assert tokenizer_lib.load(str(path)).eot_id == 0

    def edit(spec):
        spec["model"]["vocab"]["zz"] = 4_000_000_000

    with pytest.raises(errors.DataError, match="has the id 4000000000") as caught:
        made(byte_bpe("</s>", edit=edit))
    assert "\n" not in str(caught.value)
    path.write_text("[" * 100_000)
    with pytest.raises(errors.DataError, match=r"not a tokenizer\.json"):
        tokenizer_lib.load(str(path))


def test_texts_of_a_batch_are_encoded_apart(three):
    """Mutation: `no_padding` left out, so that a short text ends in padding."""
    texts = ["a", "a longer text", ""]
    for tokenizer in three.values():
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


def test_text_that_spells_a_hidden_name_makes_no_special_token(three):
    """Mutation: `encode_special_tokens` not set."""
    for tokenizer in three.values():
        for number in range(2):
            ids = tokenizer.encode(f"\ufdd0\ufdd1{number}\ufdd2\ufdd3")
            assert all(tokenizer.piece(i) for i in ids)


def test_sizes_of_a_vocabulary():
    """The least and the most, and what is no size. Mutations: either bound by one."""
    assert tokenizer_lib.bpe_size("bpe:257") == 257
    assert tokenizer_lib.bpe_size("bpe:1048576") == 1048576
    for spec in ("bytes", "bpex:300", "hub:a/b"):
        assert tokenizer_lib.bpe_size(spec) == 0
    for size in ("256", "1048577", "", "-300", "3e3"):
        with pytest.raises(errors.ConfigError, match="expected bpe:V with V >= 257"):
            tokenizer_lib.bpe_size(f"bpe:{size}")


def test_which_tokenizers_are_files():
    """Mutation: `or` for `and`."""
    kinds = {"bytes": False, "bpe:300": False, "x.json": True, "hub:a/b": True}
    assert {spec: tokenizer_lib.is_file(spec) for spec in kinds} == kinds


def test_ids_that_no_table_can_hold():
    """Mutation: `>` for `>=`."""
    vocabulary.check_ids({"a": 2**24 - 1}, "x")
    vocabulary.check_ids({}, "x")
    with pytest.raises(errors.DataError, match=r"has the id 16777216; ids must be be"):
        vocabulary.check_ids({"a": 2**24}, "x")


def test_a_wanted_end_token_is_there():
    """An added token, or a usual name in the vocabulary; six of the others are named.

    Mutations: `and` for `or`; seven.
    """
    spec = {"added_tokens": [{"content": f"<{n}>"} for n in "abcdefgh"]}
    end = vocabulary.end_of_document
    assert end(spec, {"</s>": 3}, "</s>", "x") == "</s>"
    assert end(spec, {"<b>": 3}, "<b>", "x") == "<b>"
    for wanted in ("<eos>", "z"):
        with pytest.raises(errors.ConfigError, match=f"data.end_token='{wanted}'"):
            end(spec, {"</s>": 3, "z": 4}, wanted, "x")
    named = r"TOKEN \(it has <a>, <b>, <c>, <d>, <e>, <f>\)\.$"
    with pytest.raises(errors.DataError, match=named):
        end(spec, {}, "", "x")
    with pytest.raises(errors.DataError, match=r"end_token=TOKEN\.$"):
        end({}, {}, "", "x")


def test_merges_as_text_and_as_pairs():
    """Old files write 'a b'; what takes or makes a special token is left out.

    Mutations: split twice; `and` for `or`.
    """
    special = {"</s>": "x"}
    for merge in ("</s> b", "b </s>", "</ s>", ["</", "s>"], ["</s>", "b"]):
        assert vocabulary._makes(merge, special)
    for merge in ("a b", ["a", "b"], "a b c"):
        assert not vocabulary._makes(merge, special)
    assert vocabulary._makes("a b c", {"b c": "x"})


def test_a_merge_that_makes_a_special_token_is_left_out():
    """Text that spells one stays text. Mutation: merges left as they are, which is no file."""
    vocab = {token: i for i, token in enumerate(("a", "b", "c", "ab", "bc"))}
    special = {"id": 3, "content": "ab", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["b", "c"]]}
    spec = {"version": "1.0", "model": model, "added_tokens": [special | flags]}
    text = vocabulary.for_text(spec, "ab")
    assert json.loads(text)["model"]["merges"] == [["b", "c"]]
    assert tokenizers.Tokenizer.from_str(text).encode("abbc").ids == [0, 1, 4]


def test_a_file_is_written_whole_or_not_at_all(three, tmp_path, monkeypatch):
    """Mutations: the rest of a failed write stays; the error is swallowed."""
    path = tmp_path / "tokenizer.json"
    path.write_text("before")

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        three["bytes"].save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert path.read_text() == "before"


def test_what_a_byte_tokenizer_says_of_itself():
    """Its hash is in every data set of bytes, so its file must not change.

    Mutations: `use_regex=True`; `add_prefix_space=True`.
    """
    split = tokenizer_lib.byte_level().spec["pre_tokenizer"]
    assert split["type"] == "ByteLevel"
    assert (split["use_regex"], split["add_prefix_space"]) == (False, False)


def test_words_are_cut_at_a_kilobyte(monkeypatch):
    """For training alone; whoever looks on sees no second progress bar.

    Mutations: 1023 or 1025 for 1024; `show_progress=True`.
    """
    shown = []
    trainer = tokenizers.trainers.BpeTrainer
    monkeypatch.setattr(
        tokenizers.trainers,
        "BpeTrainer",
        lambda **options: shown.append(options["show_progress"]) or trainer(**options),
    )
    pairs = set()
    for before in (1021, 1022, 1023):
        made = tokenizer_lib.train_bpe(["a" * before + "xyz"] * 9, 257 + 12)
        pairs |= {(before, pair) for pair in (b"xy", b"yz") if pair in made.pieces}
    assert pairs == {(1021, b"yz"), (1022, b"xy"), (1023, b"yz")}
    assert shown == [False] * 3


class Hub(types.ModuleType):
    """Stands for the package: notes what is fetched."""

    def __init__(self, answer):
        super().__init__("huggingface_hub")
        self.asked, self._answer = [], answer

    def hf_hub_download(self, repo, name, *, revision):
        self.asked.append((repo, name, revision))
        if isinstance(self._answer, Exception):
            raise self._answer
        return str(self._answer)


def test_what_is_asked_of_the_hub(tmp_path, monkeypatch):
    """One file of a repository; what goes wrong in a line of 200 characters.

    Mutations: `and` for `or`; `>=` for `>`; 201.
    """
    path = neox_like(tmp_path / "tokenizer.json")
    hub = Hub(path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for spec in ("hub:owner/name", "hub:owner/name@v1", "hub:name"):
        assert tokenizer_lib.load(spec).name == spec
    assert hub.asked == [
        ("owner/name", "tokenizer.json", None),
        ("owner/name", "tokenizer.json", "v1"),
        ("name", "tokenizer.json", None),
    ]
    for spec in ("hub:", "hub:/", "hub:a/b/c", "hub:@v1"):
        with pytest.raises(errors.ConfigError, match="expected hub:owner/name"):
            tokenizer_lib.load(spec)
    broken = Hub(ValueError("y" * 300))
    monkeypatch.setitem(sys.modules, "huggingface_hub", broken)
    with pytest.raises(errors.DataError, match=r"fetched \(ValueError: y{200}\); down"):
        tokenizer_lib.load("hub:a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(errors.ConfigError, match="needs the package huggingface_hub"):
        tokenizer_lib.load("hub:a/b")


def test_what_the_rust_side_raises_is_one_line():
    """Up to 200 characters; an interrupt and errors of ours as they are.

    Mutations: 201; KeyboardInterrupt taken for a fault.
    """
    with pytest.raises(errors.DataError, match=r"^what \(y{200}\)\.$"):
        with tokenizer_lib._refused("what"):
            raise BaseException("y" * 300)
    for error in (KeyboardInterrupt(), SystemExit(3), errors.ConfigError("ours")):
        with pytest.raises(type(error)):
            with tokenizer_lib._refused("what"):
                raise error


def test_one_that_was_written_down(tmp_path):
    """Known by its hash, told by 12 digits of it. Mutations: 13; `==` for `!=`."""
    tokenizer = tokenizer_lib.byte_level()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    sha256 = tokenizer.fingerprint
    recorded = tokenizer_lib.load_recorded
    assert recorded(path, sha256, "", "this run").fingerprint == sha256
    message = (
        rf"is not the tokenizer of this run: its sha256 is {sha256[:12]}, not 0{{12}};"
    )
    with pytest.raises(errors.DataError, match=message):
        recorded(path, "0" * 64, "", "this run")
    with pytest.raises(
        errors.DataError, match=r"not the tokenizer of this run: data\.end"
    ):
        recorded(path, sha256, "<other>", "this run")
