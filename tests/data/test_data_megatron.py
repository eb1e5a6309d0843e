"""Megatron's files as a source, against a writer of a few lines of numpy, and back again."""

import collections
import itertools
import json
import pathlib
import struct
import types

import data_helpers
import numpy as np
import pytest

from memoryformer import data, errors
from memoryformer.data import __main__ as data_main
from memoryformer.data import batches as batches_lib
from memoryformer.data import export, megatron, megatron_index, streams, tokenizer

END = 256  # the end of a document in 'bytes'
CODES = {"uint8": 1, "uint16": 8, "int32": 4, "int64": 5}


def documents(count, seed=0, longest=40):
    """Random tokens of bytes [n], an END behind each document."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, count)
    return [[*rng.integers(0, 256, size).tolist(), END] for size in sizes]


def write_mmididx(prefix, docs, dtype="uint16", sequences_each=1):
    """A pair as Megatron-LM writes it; each document in so many sequences."""
    pieces = [p for d in docs for p in np.array_split(np.array(d), sequences_each)]
    np.concatenate(pieces).astype(dtype).tofile(f"{prefix}.bin")
    sizes = np.array([len(p) for p in pieces], np.int32)
    starts = (np.cumsum(sizes) - sizes).astype(np.int64) * np.dtype(dtype).itemsize
    firsts = np.arange(len(docs) + 1, dtype=np.int64) * sequences_each
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, CODES[dtype]))
        file.write(struct.pack("<QQ", len(sizes), len(firsts)))
        file.write(sizes.tobytes() + starts.tobytes() + firsts.tobytes())


def write_tntidx(prefix, docs, dtype="int32"):
    """The index of before, as GPT-NeoX' `IndexedDatasetBuilder` writes it."""
    np.concatenate(docs).astype(dtype).tofile(f"{prefix}.bin")
    sizes = np.array([len(d) for d in docs], np.int64)
    counts = np.arange(len(docs) + 1, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    head = (
        1,
        CODES[dtype],
        np.dtype(dtype).itemsize,
        len(docs),
        len(sizes),
        len(counts),
    )
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"TNTIDX\x00\x00" + struct.pack("<6Q", *head))
        for values in (counts, starts, sizes, counts):
            file.write(values.tobytes())


def config(path, tokenizer="bytes", **options):
    return data.DataConfig(
        source="megatron",
        path=str(path),
        tokenizer=tokenizer,
        source_options={"validation_every": 10} | options,
    )


def stream_of(docs):
    return [END, *(token for doc in docs for token in doc)]


WRITERS = {
    "MMIDIDX uint16": write_mmididx,
    "MMIDIDX int32": lambda p, d: write_mmididx(p, d, "int32"),
    "three sequences a document": lambda p, d: write_mmididx(p, d, "uint16", 3),
    "TNTIDX int32": write_tntidx,
    "TNTIDX uint16": lambda p, d: write_tntidx(p, d, "uint16"),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_tokens_documents_and_segments(tmp_path, writer):
    """Red with documents shifted by one, or the first end of document left out."""
    docs = documents(40)
    writer(tmp_path / "d", docs)
    dataset = data.load(config(tmp_path / "d"))
    assert dataset.train.tokens[:].tolist() == stream_of(docs[:36])
    assert dataset.validation.tokens[:].tolist() == stream_of(docs[36:])
    facts = dataset.train.facts
    assert facts.documents == facts.ends_of_document == 36
    assert facts.tokens == len(stream_of(docs[:36]))
    batch = dataset.validation.eval_batches(len(stream_of(docs[36:])) - 1, 1).batch(0)
    expected = [n for n, doc in enumerate(docs[36:], 1) for _ in doc]
    assert batch["segment_ids"][0].tolist() == expected
    positions = [n for doc in docs[36:] for n in range(len(doc))]
    assert batch["positions"][0].tolist() == positions


def test_equal_tokens_have_equal_fingerprints(tmp_path):
    """Whatever index and integers hold them, wherever they lie; other tokens have others.

    Red if the digest is of the file's bytes.
    """
    docs = documents(30)
    seen = {}
    for name, writer in WRITERS.items():
        if not name.startswith("three"):
            writer(tmp_path / name, docs)
            seen[name] = data.load(config(tmp_path / name)).fingerprint
    assert len(set(seen.values())) == 1
    one_doc = [*docs[:3], [*docs[3][:-2], (docs[3][-2] + 1) % 256, END], *docs[4:]]
    moved = [docs[0] + docs[1][:1], docs[1][1:], *docs[2:]]  # the same tokens
    for number, other in enumerate((one_doc, moved, docs[:-1])):
        write_mmididx(tmp_path / f"o{number}", other)
        assert (
            data.load(config(tmp_path / f"o{number}")).fingerprint not in seen.values()
        )


def test_export_and_back(tmp_path):
    """Prepared data, exported and read again, is the same stream and the same batches.

    Red if the export keeps the first end, or drops the last one.
    """
    prepared = data.load(data_helpers.config(tmp_path, data_helpers.texts(60)))
    out = tmp_path / "out"
    assert export.to_megatron(prepared, out) == [out / "train", out / "validation"]
    back = data.load(
        config(
            out / "train",
            validation_path=str(out / "validation"),
            validation_every=20,
            tokenizer=str(out / "tokenizer.json"),
        )
    )
    for ours, theirs in (
        (prepared.train, back.train),
        (prepared.validation, back.validation),
    ):
        np.testing.assert_array_equal(ours.tokens[:], theirs.tokens[:])
        assert ours.facts.documents == theirs.facts.documents
    batch = prepared.train.batches(32, 4, 7).batch(3)
    for key, value in back.train.batches(32, 4, 7).batch(3).items():
        np.testing.assert_array_equal(batch[key], value, err_msg=key)
    # And the independent writer writes the same bytes.
    tokens = prepared.train.tokens[1:]
    docs = [
        d.tolist() for d in np.split(tokens, np.flatnonzero(tokens == END) + 1)[:-1]
    ]
    write_mmididx(tmp_path / "theirs", docs)
    for end in (".bin", ".idx"):
        theirs = pathlib.Path(f"{tmp_path / 'theirs'}{end}")
        assert theirs.read_bytes() == pathlib.Path(f"{out / 'train'}{end}").read_bytes()


def test_parts_of_a_bin_as_the_hub_holds_them(tmp_path):
    """document-00000-of-00003.bin .. beside one document.idx. Red with parts out of order."""
    docs = documents(50)
    write_mmididx(tmp_path / "document", docs)
    content = (tmp_path / "document.bin").read_bytes()
    whole = data.load(config(tmp_path / "document")).train.tokens[:]
    third = len(content) // 6 * 2
    (tmp_path / "document.bin").unlink()
    for n, part in enumerate(
        (content[:third], content[third : 2 * third], content[2 * third :])
    ):
        (tmp_path / f"document-{n:05d}-of-00003.bin").write_bytes(part)
    tokens = data.load(config(tmp_path / "document")).train.tokens
    np.testing.assert_array_equal(tokens[:], whole)
    at = np.random.default_rng(0).permutation(len(whole))
    np.testing.assert_array_equal(tokens[at.reshape(1, -1)][0], whole[at])
    (tmp_path / "document-00001-of-00003.bin").unlink()
    with pytest.raises(errors.DataError, match="2 parts here, not all of 00003"):
        data.load(config(tmp_path / "document"))


def damaged(tmp_path):
    """(what is wrong, a function that makes it so, what the line says)."""
    bin_path, index = tmp_path / "d.bin", tmp_path / "d.idx"

    def cut(path, size):
        path.write_bytes(path.read_bytes()[:-size])

    def overwrite(path, at, content):
        data_ = bytearray(path.read_bytes())
        data_[at : at + len(content)] = content
        path.write_bytes(data_)

    return {
        "a token short": (lambda: cut(bin_path, 2), "d.bin: .*truncated"),
        "half a token": (lambda: cut(bin_path, 1), "no whole number of uint16"),
        "index short": (lambda: cut(index, 8), "d.idx: .*truncated"),
        "header short": (lambda: index.write_bytes(b"MMIDIDX\0\0\1"), "in its header"),
        "empty index": (lambda: index.write_bytes(b""), "d.idx: the file is empty"),
        "magic": (
            lambda: overwrite(index, 0, b"MMIDIDY"),
            "not with MMIDIDX or TNTIDX",
        ),
        "version": (lambda: overwrite(index, 9, b"\2"), "has version 2"),
        "kind": (lambda: overwrite(index, 17, b"\7"), "kind of number 7"),
        "offsets": (
            lambda: overwrite(index, 34 + 4 * 40 + 8, b"\1"),
            "one behind the other",
        ),
        "documents": (
            lambda: overwrite(index, index.stat().st_size - 8, b"\1"),
            "cover",
        ),
        "beyond": (lambda: overwrite(bin_path, 20, b"\1\1"), "token id 257 is outside"),
        "no bin": (bin_path.unlink, "d.bin: cannot be read"),
        "no index": (index.unlink, "d.idx: cannot be read"),
    }


@pytest.mark.parametrize("name", damaged(pathlib.Path()))
def test_a_damaged_pair_is_one_line(tmp_path, name):
    """Red for each check of `Pair.check`, `_arrays` and `_facts` that is left out."""
    write_mmididx(tmp_path / "d", documents(40))
    make, message = damaged(tmp_path)[name]
    make()
    with pytest.raises(errors.DataError, match=message) as caught:
        data.load(config(tmp_path / "d"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", range(1, 11))
def test_every_document_is_looked_at(tmp_path, monkeypatch, place):
    """Where two swap their beginnings. Mutations: chunks that leave some out, or an edge."""
    monkeypatch.setattr(megatron_index, "CHUNK", 4)
    write_mmididx(tmp_path / "d", documents(12))
    path = tmp_path / "d.idx"
    head, firsts = path.read_bytes()[: -13 * 8], np.arange(13)
    firsts[[place, place + 1]] = firsts[[place + 1, place]]
    path.write_bytes(head + firsts.astype("<i8").tobytes())
    with pytest.raises(errors.DataError, match="documents do not cover its 12 seq"):
        data.load(config(tmp_path / "d"))


def test_ids_beyond_what_was_looked_at_end_the_step(tmp_path, monkeypatch):
    """What the sample misses is found where it is drawn. Red without the check of a batch."""
    monkeypatch.setattr(megatron, "SAMPLED", 2 * megatron._BLOCK)
    docs = documents(1200)
    docs[500][0] = 999
    write_mmididx(tmp_path / "d", docs)
    dataset = data.load(config(tmp_path / "d"))
    assert dataset.train.facts.sampled_tokens < dataset.train.facts.tokens / 2
    with pytest.raises(errors.DataError, match="token id 999 is outside"):
        data.load(config(tmp_path / "d"), verify=True)
    drawn = dataset.train.batches(64, 4, 0)
    with pytest.raises(errors.DataError, match="token id 999 is outside"):
        for step in range(drawn.windows_per_epoch // 4 + 1):
            drawn.batch(step)


def test_weights(tmp_path):
    """Seven of ten windows, exactly, and each prefix' windows once an epoch of its own.

    Red if a member's windows are numbered by the step of all.
    """
    big, small = documents(200, seed=1), documents(60, seed=2)
    write_mmididx(tmp_path / "a", big)
    write_mmididx(tmp_path / "b", small, "int32")
    dataset = data.load(config(f"0.7:{tmp_path / 'a'},0.3:{tmp_path / 'b'}"))
    assert dataset.train.facts.weights == (7, 3)
    drawn = dataset.train.batches(16, 5, 3)
    sizes = [
        (len(stream_of(docs[: len(docs) * 9 // 10])) - 1) // 16 for docs in (big, small)
    ]
    assert drawn.windows_per_epoch == sum(sizes)
    members = [batches_lib.mixed(n, (7, 3)) for n in range(1000)]
    assert [m for m, _ in members].count(0) == 700
    for member in (0, 1):
        numbers = [number for m, number in members if m == member]
        assert numbers == list(range(len(numbers)))
    streams_ = [stream_of(docs[: len(docs) * 9 // 10]) for docs in (big, small)]
    windows = {
        tuple(tokens[16 * i : 16 * i + 16]): (m, i)
        for m, tokens in enumerate(streams_)
        for i in range((len(tokens) - 1) // 16)
    }
    seen = collections.Counter()
    steps = -(-sizes[1] * 10 // 3) // 5 + 1
    for step in range(steps):
        for row in drawn.batch(step)["inputs"]:
            seen[windows[tuple(row.tolist())]] += 1
    of_small = [seen[1, i] for i in range(sizes[1])]
    assert min(of_small) >= 1 and max(of_small) <= 2
    assert sum(of_small) == pytest.approx(0.3 * 5 * steps, abs=1)
    plain = data.load(config(f"{tmp_path / 'a'},{tmp_path / 'b'}"))
    assert plain.fingerprint != dataset.fingerprint
    assert plain.train.tokens[:].tolist() == streams_[0] + streams_[1][1:]


def test_a_prefix_that_ends_inside_a_document_gets_an_end(tmp_path):
    """Or its last document would go on in the next prefix. Red without it."""
    write_mmididx(tmp_path / "a", [[1, END], [2, END], [3, 4]])
    write_mmididx(tmp_path / "b", [[5, END], [6, END]])
    both = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    held_out = {"validation_path": str(tmp_path / "b"), "validation_every": 20}
    dataset = data.load(config(both, **held_out))
    expected = [END, 1, END, 2, END, 3, 4, END, 5, END, 6, END]
    assert dataset.train.tokens[:].tolist() == expected


def test_every_held_out_token_counts_once(tmp_path):
    """However many prefixes hold them. Red if they are mixed by weights."""
    write_mmididx(tmp_path / "a", documents(12))
    write_mmididx(tmp_path / "b", [[1, END], [2, 3, END]])
    held_out = f"{tmp_path / 'b'},{tmp_path / 'a'}"
    dataset = data.load(config(tmp_path / "a", validation_path=held_out))
    assert not dataset.validation.mixture
    expected = [END, 1, END, 2, 3, *stream_of(documents(12))]
    assert dataset.validation.tokens[:].tolist() == expected


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("0.7:{a},{a}", {}, "every prefix a weight, or none"),
        ("7x:{a}", {}, "weight '7x' is no number"),
        ("-1:{a},2:{a}", {}, "weight '-1' is no number"),
        ("0:{a},2:{a}", {}, "is no number"),
        ("{a},", {}, "empty path"),
        ("{a}", {"tokenizer": "bpe:4096"}, "name the tokenizer.json"),
        ("{a}", {"validation_path": "1:{a}"}, "leave the weights out"),
        ("{a}", {"separator": "x"}, "has no such option"),
        ("", {}, "needs one"),
    ],
)
def test_options_that_cannot_be_meant(tmp_path, path, fields, message):
    """Each in one line. Red where a check is left out."""
    write_mmididx(tmp_path / "a", documents(10))
    here = {k: v.format(a=tmp_path / "a") for k, v in fields.items()}
    with pytest.raises(errors.ConfigError, match=message):
        data.load(config(path.format(a=tmp_path / "a"), **here))


def test_tokens_without_an_end_are_read_and_said(tmp_path, capsys):
    """As Pythia's shuffled Pile, which has none. Red without the note."""
    docs = [doc[:-1] for doc in documents(40)]
    write_mmididx(tmp_path / "d", docs)
    dataset = data.load(config(tmp_path / "d"))
    assert "note: no <eot> among the tokens" in capsys.readouterr().err
    expected = [*stream_of(docs[:36]), END]
    assert dataset.train.tokens[:].tolist() == expected


def test_a_stream_reads_like_one_array(tmp_path):
    """Slices and indices across pieces, as numpy has them.

    Red with `side='left'`; with slices of any step as `_between(first, stop)[::step]`, which
    are empty where the step is below 0; without the check of types; with uint64 left as it is.
    """
    arrays = [np.arange(n, n + 5, dtype="<u2") for n in (0, 100, 200)]
    for n, array in enumerate(arrays):
        array.tofile(tmp_path / f"{n}.bin")
    pieces = [
        streams.end(7),
        streams.Piece(tmp_path / "0.bin", "uint16", 5),
        streams.Piece(tmp_path / "1.bin", "uint16", 0),
        streams.Piece(tmp_path / "1.bin", "uint16", 3, first=1),
        streams.Piece(tmp_path / "2.bin", "uint16", 5),
    ]
    whole = np.concatenate([[7], arrays[0], arrays[1][1:4], arrays[2]])
    stream = streams.Stream(pieces)
    assert len(stream) == len(whole)
    for first in range(len(whole)):
        for stop in range(first, len(whole) + 2):
            np.testing.assert_array_equal(stream[first:stop], whole[first:stop])
    ends = (None, -20, -3, 0, 2, 12, np.int64(13), 40)
    for part in itertools.product(ends, ends, (-15, -2, -1, np.int8(1), 2, 15)):
        np.testing.assert_array_equal(stream[slice(*part)], whole[slice(*part)])
    with pytest.raises(ValueError, match="slice step cannot be zero"):
        stream[::0]
    for number in (3, np.uint8(9), np.uint64(9)):
        assert np.shape(stream[number]) == () and stream[number] == whole[number]
    assert stream[[9, 0]].tolist() == whole[[9, 0]].tolist() and not len(stream[[]])
    for wrong in (1.0, True, whole > 3, "a", None):
        with pytest.raises(IndexError, match="indexed by whole numbers, not"):
            stream[wrong]
    with pytest.raises(IndexError, match=f"tokens {2**63}"):
        stream[np.uint64(2**63)]
    at = np.random.default_rng(0).integers(0, len(whole), (6, 7))
    np.testing.assert_array_equal(stream[at], whole[at])
    with pytest.raises(IndexError):
        stream[np.array([len(whole)])]


def test_the_commands(tmp_path, capsys, run_command):
    """inspect, prepare and export of a pair. Red if inspect prints no fingerprint."""
    write_mmididx(tmp_path / "d", documents(60))
    out = tmp_path / "out"
    (tmp_path / "c.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    c = ml_collections.ConfigDict()\n"
        "    c.data = ml_collections.ConfigDict(dict(source='megatron', tokenizer='bytes',\n"
        f"        path={str(tmp_path / 'd')!r}, source_options=dict(validation_every=10)))\n"
        "    c.model = ml_collections.ConfigDict(dict(seq_len=32))\n"
        "    return c\n"
    )
    base = f"--config={tmp_path / 'c.py'}"
    printed = json.loads(run_command("inspect", base, "--json"))
    expected = data.load(config(tmp_path / "d"))
    assert printed["fingerprint"] == expected.fingerprint
    assert printed["splits"]["train"]["documents"] == 54
    text = run_command("inspect", base)
    assert "54 documents" in text and "tokens looked at" in text
    assert run_command("prepare", base).strip() == str(tmp_path)
    run_command("export", base, "--format=megatron", f"--output={out}")
    pair = megatron_index.open_pair(out / "train")
    assert pair.num_documents == 54
    assert not (tmp_path / "manifest.json").exists()


@pytest.fixture
def run_command(capsys):
    """Run one command of memoryformer.data and return what it prints."""

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            data_main.main(["data", *words])
        assert not caught.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def write_index(prefix, sizes, firsts, offsets=None, dtype="uint16"):
    """An index of MMIDIDX with these numbers, and the tokens 0, 1, .. behind it."""
    sizes = np.array(sizes, np.int32)
    if offsets is None:
        offsets = (np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize
    np.arange(sizes.sum()).astype(dtype).tofile(f"{prefix}.bin")
    head = struct.pack("<QBQQ", 1, CODES[dtype], len(sizes), len(firsts))
    arrays = sizes, np.array(offsets, np.int64), np.array(firsts, np.int64)
    content = b"".join(array.tobytes() for array in arrays)
    pathlib.Path(f"{prefix}.idx").write_bytes(b"MMIDIDX\x00\x00" + head + content)
    return prefix


def test_empty_sequences_and_documents_are_none_of_its_faults(tmp_path):
    """Mutations: `<=` for `<` in either check."""
    prefix = write_index(tmp_path / "d", [3, 0, 2, 0], [0, 0, 2, 3, 4])
    pair = megatron_index.open_pair(prefix)
    assert (pair.num_documents, pair.num_tokens) == (4, 5)
    assert [pair.start_of(n) for n in range(5)] == [0, 0, 3, 5, 5]


def test_members_without_a_token_have_no_facts(tmp_path):
    """Mutation: `np.zeros(1, np.int32)` for what they hold."""
    pair = megatron_index.open_pair(write_index(tmp_path / "d", [3], [0, 1]))
    empty = types.SimpleNamespace(pair=pair, first=1, stop=1, pieces=list)
    with pytest.raises(errors.DataError, match=r"d\.bin: holds no tokens"):
        megatron._facts("train", [empty], [], tokenizer.load("bytes"))


@pytest.mark.parametrize(
    ("sizes", "firsts", "message"),
    [
        ([3, -1, 2], [0, 1, 2, 3], "one behind the other"),
        ([3, 1, 2], [1, 1, 2, 3], "do not cover its 3 sequences"),
        ([3, 1, 2], [0, 1, 2, 2], "do not cover its 3 sequences"),
        ([], [], "do not cover its 0 sequences"),
        ([3, 1, 2], [0, -1, 2, 3], "do not cover its 3 sequences"),
    ],
)
def test_an_index_that_contradicts_itself(tmp_path, sizes, firsts, message):
    """Mutations: `and` for `or` where sizes and offsets, or both ends, are compared."""
    with pytest.raises(errors.DataError, match=message):
        megatron_index.open_pair(write_index(tmp_path / "d", sizes, firsts))


def test_what_an_index_says_of_itself(tmp_path):
    """Its kinds of integers, its first bytes, its dimensions.

    Mutations: another number of a kind; a longer quotation; dimensions not compared.
    """
    kinds = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
    for code in range(10):
        if code in kinds:
            assert megatron_index._dtype(1, code, "x") == kinds[code]
        else:
            with pytest.raises(errors.DataError, match=f"kind of number {code}; read"):
                megatron_index._dtype(1, code, "x")
    write_tntidx(tmp_path / "d", documents(20))
    index = tmp_path / "d.idx"
    content = bytearray(index.read_bytes())
    content[40] += 1  # the dimensions
    index.write_bytes(content)
    with pytest.raises(errors.DataError, match="21 dimensions of 20 sequences: not to"):
        megatron_index.open_pair(tmp_path / "d")
    index.write_bytes(b"0123456789abcdef" * 10)
    with pytest.raises(errors.DataError, match="begins with b'012345678', not with"):
        megatron_index.open_pair(tmp_path / "d")


def test_bounds_and_pieces_of_some_documents(tmp_path, monkeypatch):
    """Against numpy, in chunks of four and in files of five tokens.

    Mutations: an end more or less; documents counted from the first of all.
    """
    monkeypatch.setattr(megatron_index, "CHUNK", 4)
    sizes, firsts = [2, 1, 4, 3, 1, 5, 2, 2, 1, 3], [0, 2, 3, 5, 5, 8, 10]
    pair = megatron_index.open_pair(write_index(tmp_path / "d", sizes, firsts))
    for first in range(7):
        for stop in range(first, 7):
            low, high = firsts[first], firsts[stop]
            found = np.concatenate(list(pair.bounds(first, stop)))
            said = sizes[low:high] + [n - low for n in firsts[first : stop + 1]]
            assert found.tolist() == said and found.dtype == np.dtype("<i8")
    content = (tmp_path / "d.bin").read_bytes()
    (tmp_path / "d.bin").unlink()
    for n, at in enumerate(range(0, 24, 5)):
        part = content[2 * at : 2 * at + 10]
        (tmp_path / f"d-{n:05d}-of-00005.bin").write_bytes(part)
    pair = megatron_index.open_pair(tmp_path / "d")
    for first in range(25):
        for stop in range(first, 25):
            pieces = pair.pieces(first, stop)
            tokens = [token for piece in pieces for token in piece.tokens().tolist()]
            assert tokens == list(range(first, stop))
            assert all(piece.count for piece in pieces)
    for n in range(4):
        (tmp_path / f"d-{n:05d}-of-00005.bin").unlink()
    with pytest.raises(errors.DataError, match="1 parts here, not all of 00005"):
        megatron_index.open_pair(tmp_path / "d")


def test_weights_become_whole_numbers():
    """As small as they can be. Mutations: any number of `_weight`; a sum for a multiple."""

    def weights(*texts):
        path = ",".join(f"{text}:/{n}" for n, text in enumerate(texts))
        found = megatron.parse_path(path)
        assert [p for _, p in found] == [
            pathlib.Path(f"/{n}") for n in range(len(texts))
        ]
        return [weight for weight, _ in found]

    assert weights("0.7", "0.3") == [7, 3]
    assert weights("2", "4", "8") == [1, 2, 4]
    assert weights("0.5", "0.2", "0.3") == [5, 2, 3]
    assert weights("0.123457", "1") == [123457, 10**6]
    assert weights("0.1234561", "1") == [90549, 733451]
    assert weights("1000000", "1", "0.000001") == [10**12, 10**6, 1]
    for text in ("1000001", "0.0000001", "1e-9", "inf", "nan"):
        with pytest.raises(
            errors.ConfigError, match=r"from 0\.000001 to 1000000; write"
        ):
            weights(text, "1")
    found = megatron.parse_path(" 1:/a , 3:/b")
    assert found == [(1, pathlib.Path("/a")), (3, pathlib.Path("/b"))]
    found = megatron.parse_path("/a:b/c, /d")  # a path may hold a colon
    assert found == [(0, pathlib.Path("/a:b/c")), (0, pathlib.Path("/d"))]


def test_where_a_large_file_is_looked_at():
    """In 1024 blocks of 4096 tokens, spread evenly from the first to the last of them.

    Mutations: any number of `sample_starts`.
    """
    blocks = 3000
    starts = megatron.sample_starts(4096 * (blocks - 1) + 7)
    assert list(starts) == [4096 * (i * (blocks - 1) // 1023) for i in range(1024)]
    assert starts[-1] == 4096 * (blocks - 1)
    for tokens in (1, 4096, 4097, 1 << 22):
        assert list(megatron.sample_starts(tokens)) == list(range(0, tokens, 4096))
    assert len(megatron.sample_starts((1 << 22) + 1)) == 1024


def test_what_a_sample_says_of_the_whole(tmp_path, monkeypatch):
    """Documents are counted in proportion; what nobody has read is 0, not guessed.

    Mutations: a product for the quotient; verifying without being told to; a last block
    that is not looked at.
    """
    monkeypatch.setattr(megatron, "_BLOCK", 64)
    monkeypatch.setattr(megatron, "SAMPLED", 128)
    docs = [[1, 2, 3, 4, 5, 6, 7, END] for _ in range(88)]
    write_mmididx(tmp_path / "d", docs)
    facts = megatron.load(config(tmp_path / "d"))[0].splits["train"]
    assert (facts.sampled_tokens, facts.tokens, facts.documents) == (128, 641, 80)
    assert facts.ends_of_document == 80
    assert not (facts.bytes or facts.token_bytes or facts.empty_dropped)
    assert not facts.duplicates_of_validation_dropped and facts.weights == ()
    docs[68] = [999, *docs[0][1:]]  # in the last 128 of train, before the last 64
    write_mmididx(tmp_path / "d", docs)
    megatron.load(config(tmp_path / "d"))
    with pytest.raises(errors.DataError, match="token id 999 is outside"):
        megatron.load(config(tmp_path / "d"), verify=True)


def test_few_documents_and_one_prefix(tmp_path):
    """One is held out at least, and one is left; a single prefix has nothing to be weighed by.

    Mutations: two for one; `<=` for `<`; a mixture of one; held-out tokens drawn by weights.
    """
    for count in (2, 5):
        write_mmididx(tmp_path / f"{count}", documents(count))
        dataset = data.load(config(tmp_path / f"{count}"))
        assert dataset.train.facts.documents == count - 1
        assert dataset.validation.facts.documents == 1
    write_mmididx(tmp_path / "1", documents(1))
    with pytest.raises(errors.DataError, match="1 documents cannot be split"):
        data.load(config(tmp_path / "1"))
    alone = data.load(config(f"3:{tmp_path / '5'}")).train
    assert alone.mixture == () == alone.facts.weights
    mixed = data.load(config(f"3:{tmp_path / '5'},2:{tmp_path / '2'}"))
    assert len(mixed.train.mixture) == 2 and mixed.validation.mixture == ()
    other = data.load(config(f"2:{tmp_path / '5'},3:{tmp_path / '2'}"))
    assert mixed.train.facts.sha256 != other.train.facts.sha256


def test_an_export_in_chunks(tmp_path, monkeypatch):
    """The same files; what it has done; and no document that its index cannot count.

    Mutations: a chunk's ends from its own start; `>=` for `>`; the first end written.
    """
    dataset = data.load(data_helpers.config(tmp_path, data_helpers.texts(20)))
    whole, chunked, seen = tmp_path / "whole", tmp_path / "chunked", []
    export.to_megatron(dataset, whole)
    monkeypatch.setattr(export, "_CHUNK", 100)
    longest = max(len(text.encode()) for text in data_helpers.texts(20)) + 1
    monkeypatch.setattr(export, "_LONGEST", longest)
    export.to_megatron(dataset, chunked, seen.append)
    for path in whole.iterdir():
        assert (chunked / path.name).read_bytes() == path.read_bytes()
    expected = []
    for split in (dataset.train, dataset.validation):
        size = len(split.tokens)
        expected += [min(first + 100, size) for first in range(1, size, 100)]
    assert seen == expected
    monkeypatch.setattr(export, "_LONGEST", longest - 1)
    message = (
        f"a document has {longest} tokens, and Megatron's index holds {longest - 1}"
    )
    with pytest.raises(errors.DataError, match=message):
        export.to_megatron(dataset, tmp_path / "none")
    monkeypatch.undo()
    assert export._LONGEST == np.iinfo(np.int32).max


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "int32")]
)
def test_in_which_integers_tokens_are_exported(tmp_path, vocab_size, dtype):
    """Mutations: `<` for `<=`; another power of two."""
    tokens = np.array([256, 5, 6, 256], np.int32)
    split = types.SimpleNamespace(name="train", tokens=tokens, eot_id=256)
    tokenizer = types.SimpleNamespace(vocab_size=vocab_size, save=lambda path: None)
    validation = types.SimpleNamespace(name="validation", tokens=tokens, eot_id=256)
    made = types.SimpleNamespace(
        train=split, validation=validation, tokenizer=tokenizer
    )
    prefix, _ = export.to_megatron(made, tmp_path)
    pair = megatron_index.open_pair(prefix)
    assert pair.dtype == dtype and pair.num_tokens == 3


def test_pieces_of_no_file(tmp_path):
    """Zeros unless they have a value, and from the first token of a file. Mutations: defaults."""
    assert streams.Piece(None, "int32", 2).tokens().tolist() == [0, 0]
    assert streams.end(7).tokens().tolist() == [7]
    np.arange(4, dtype="<u2").tofile(tmp_path / "a.bin")
    piece = streams.Piece(tmp_path / "a.bin", "uint16", 3)
    assert piece.tokens().tolist() == [0, 1, 2]
    stream = streams.Stream([streams.end(70_000), piece])
    assert stream.dtype == np.int32 and stream[::2].tolist() == [70_000, 1]
    assert streams.Stream([piece]).dtype == np.uint16
    assert stream[np.zeros((0, 2), int)].shape == (0, 2)
    for at in (-1, 4):
        with pytest.raises(IndexError, match=f"tokens {at}..{at} of 4"):
            stream[np.array([at])]
