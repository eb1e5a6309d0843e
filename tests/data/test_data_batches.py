"""Batches: a pure function of (data, seed, step), every token once, segments right."""

import hashlib
import json
import subprocess
import sys

import data_helpers
import numpy as np
import pytest

from memoryformer import data, errors
from memoryformer.data import batches as batches_lib

SEQ_LEN, BATCH = 32, 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    return data.load(data_helpers.config(path, data_helpers.texts(60)))


def digest(batch):
    parts = [batch[key].tobytes() for key in sorted(batch)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_a_batch_depends_on_seed_and_step_only(dataset):
    """Red if batch() draws from an iterator (np.random, next()) instead of its index."""
    batches = dataset.train.batches(SEQ_LEN, BATCH, seed=3)
    steps = [5, 0, 17, 5, 300]
    first = [digest(batches.batch(step)) for step in steps]
    again = dataset.train.batches(SEQ_LEN, BATCH, seed=3)
    assert [digest(again.batch(step)) for step in steps] == first
    assert first[0] == first[3] and len(set(first)) == 4
    other = dataset.train.batches(SEQ_LEN, BATCH, seed=4)
    assert digest(other.batch(0)) != first[1]


def test_a_fresh_process_draws_the_same_batches(dataset):
    """Red if the order depends on hash(), object ids or time (seed + hash('x'))."""
    program = (
        "import sys, json, hashlib\n"
        "from memoryformer import data\n"
        "b = data.load_directory(sys.argv[1]).train.batches(32, 8, 3)\n"
        "d = lambda x: hashlib.sha256(b''.join(x[k].tobytes() for k in sorted(x)))\n"
        "print(json.dumps([d(b.batch(s)).hexdigest() for s in (0, 40)]))\n"
        "assert 'tensorflow' not in sys.modules\n"
        "assert 'tensorflow_datasets' not in sys.modules, 'slow import while training'\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, str(dataset.directory)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    batches = dataset.train.batches(SEQ_LEN, BATCH, seed=3)
    assert json.loads(output) == [digest(batches.batch(s)) for s in (0, 40)]


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_host_rows_join_to_the_global_batch(dataset, hosts):
    """Red if a host shuffles by itself or `rows` indexes steps instead of rows."""
    batches = dataset.train.batches(SEQ_LEN, BATCH, seed=0)
    evals = dataset.validation.eval_batches(SEQ_LEN, BATCH)
    share = BATCH // hosts
    for draw in (
        lambda rows: batches.batch(9, rows),
        lambda rows: evals.batch(1, rows),
    ):
        whole = draw(slice(None))
        parts = [draw(slice(h * share, (h + 1) * share)) for h in range(hosts)]
        for key, value in whole.items():
            joined = np.concatenate([part[key] for part in parts])
            np.testing.assert_array_equal(joined, value)


def test_an_epoch_holds_every_window_once_and_epochs_differ(dataset):
    """Red if repeat comes before shuffle, or the seed is not renewed each epoch."""
    batches = dataset.train.batches(SEQ_LEN, 1, seed=0)
    count = batches.windows_per_epoch
    epochs = [
        [batches.batch(e * count + i)["inputs"].tobytes() for i in range(count)]
        for e in (0, 1)
    ]
    stream = np.array(dataset.train.tokens, np.int32)
    windows = [stream[i * SEQ_LEN :][:SEQ_LEN].tobytes() for i in range(count)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(windows)
    assert epochs[0] != epochs[1] and epochs[0] != windows
    assert count == (len(stream) - 1) // SEQ_LEN


def test_evaluation_predicts_every_token_once_in_order(dataset):
    """Red if the last partial window is dropped, or padding has weight 1."""
    split = dataset.validation
    stream = np.array(split.tokens, np.int32)
    for seq_len, batch_size in ((32, 8), (7, 3), (len(stream) - 1, 1), (5000, 2)):
        batches = split.eval_batches(seq_len, batch_size)
        drawn = list(batches)
        assert len(drawn) == len(batches)
        kept = [batch["weights"].astype(bool) for batch in drawn]
        for key, expected in (("inputs", stream[:-1]), ("targets", stream[1:])):
            values = [b[key][mask] for b, mask in zip(drawn, kept, strict=True)]
            np.testing.assert_array_equal(np.concatenate(values), expected)
        for batch, mask in zip(drawn, kept, strict=True):
            np.testing.assert_array_equal(batch["segment_ids"] > 0, mask)
            assert batch["inputs"].shape == (batch_size, seq_len)
    with pytest.raises(IndexError):
        batches.batch(len(batches))


def test_target_bytes_of_evaluation_are_the_bytes_of_the_text(dataset):
    """Red if an end of document counts as bytes, or a token is lost."""
    batches = dataset.validation.eval_batches(SEQ_LEN, BATCH)
    counted = sum(
        (dataset.tokenizer.token_bytes[b["targets"]] * b["weights"]).sum()
        for b in batches
    )
    assert counted == dataset.manifest.splits["validation"].bytes


def test_segments_and_positions_restart_at_each_document(dataset):
    """Oracle in plain loops. Red if a segment starts after its eot, or positions run on."""
    eot = dataset.tokenizer.eot_id
    batch = dataset.train.batches(600, 6, seed=1).batch(2)
    assert (batch["inputs"] == eot).sum() >= 6
    for row, inputs in enumerate(batch["inputs"]):
        segment, position = 0, 0
        for column, token in enumerate(inputs):
            if token == eot or column == 0:
                segment, position = segment + 1, 0
            assert batch["segment_ids"][row, column] == segment
            assert batch["positions"][row, column] == position
            position += 1
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert {k: v.dtype.name for k, v in batch.items()} == {
        "inputs": "int32",
        "targets": "int32",
        "positions": "int32",
        "segment_ids": "int32",
        "weights": "float32",
    }


def test_a_corpus_too_small_for_one_window_says_so(dataset):
    with pytest.raises(errors.DataError, match=r"too few for one window .*seq_len"):
        dataset.train.batches(10**6, 1, seed=0)
    with pytest.raises(errors.ConfigError, match="batch_size=0"):
        dataset.train.batches(8, 0, seed=0)


def test_an_id_outside_the_vocabulary_is_named(dataset, tmp_path):
    """Red if batch() does not look at the ids it draws."""
    split = dataset.train
    bad = np.array(split.tokens)
    bad[40:] = 999
    path = tmp_path / "train.bin"
    bad.tofile(path)
    damaged = data.Split("train", path, split.facts, split.dtype, 257, 256)
    message = "token id 999 is outside the vocabulary of 257"
    with pytest.raises(errors.DataError, match=message):
        damaged.batches(SEQ_LEN, BATCH, 0).batch(0)
    with pytest.raises(errors.DataError, match=message):
        list(damaged.eval_batches(SEQ_LEN, BATCH))


def test_a_dataset_does_not_print_its_manifest(dataset):
    """Mutation: `repr=True`."""
    assert "manifest=" not in repr(dataset) and "train=Split" in repr(dataset)


@pytest.mark.parametrize("name, value", [("seq_len", 0), ("batch_size", 0)])
def test_sizes_of_a_batch_are_at_least_one(dataset, name, value):
    """Mutations: `<=` for `<`; 2 for 1."""
    for make, least in (
        (lambda **sizes: dataset.train.batches(**sizes, seed=0), 1),
        (dataset.validation.eval_batches, 1),
    ):
        sizes = {"seq_len": 4, "batch_size": 2}
        assert make(**sizes | {name: least})
        with pytest.raises(
            errors.ConfigError, match=f"{name}={value}: must be at least"
        ):
            make(**sizes | {name: value})


def test_the_smallest_split_of_one_window(dataset):
    """A window takes one token more than its length. Mutation: any sign of the count."""
    length = len(dataset.train.tokens) - 1
    assert dataset.train.batches(length, 1, 0).windows_per_epoch == 1
    message = rf"has {length + 1} tokens, too few .* seq_len \+ 1 = {length + 2};"
    with pytest.raises(errors.DataError, match=message):
        dataset.train.batches(length + 1, 1, 0)
    evals = dataset.validation.eval_batches(8, 2)
    assert evals.num_targets == len(dataset.validation.tokens) - 1
    for index in (-1, len(evals)):
        with pytest.raises(IndexError, match=f"batch {index} of {len(evals)}"):
            evals.batch(index)
    windows = batches_lib.Windows(dataset.train, 8)
    sha256 = dataset.manifest.splits["train"].sha256
    assert repr(windows) == f"Windows(train {sha256[:16]}, seq_len=8)"
    assert len(windows) == length // 8 and windows[1].shape == (3, 8)


def test_indices_out_of_range_are_refused(dataset):
    """None counts from the end, as the memory map would, and none is a fraction.

    Mutations tried: each of the three checks left out; `index < len` alone in it.
    """
    batches = dataset.train.batches(SEQ_LEN, BATCH, seed=0)
    evals = dataset.validation.eval_batches(SEQ_LEN, BATCH)
    windows = batches_lib.Windows(dataset.train, SEQ_LEN)
    for index in (-1, len(windows), np.int64(-1), 2**70):
        with pytest.raises(IndexError, match=f"window {index} of {len(windows)}"):
            windows[index]
    with pytest.raises(IndexError, match="step -1: the first is 0"):
        batches.batch(-1)
    for read in (windows.__getitem__, batches.batch, evals.batch, evals.__getitem__):
        for wrong in (0.5, slice(0, 1), None):
            with pytest.raises(TypeError, match="interpreted as an integer"):
                read(wrong)
        np.testing.assert_equal(read(np.int64(0)), read(0))
        np.testing.assert_equal(read(np.uint8(0)), read(0))
    np.testing.assert_array_equal(
        windows[np.uint8(200 % len(windows))], windows[200 % len(windows)]
    )
    with pytest.raises(IndexError):
        evals.batch(0, np.array([BATCH]))
