"""Documents that begin at multiples of a number of positions: every token once, in place."""

import dataclasses

import numpy as np
import pytest
import toy

from memoryformer import data, errors, presets
from memoryformer.data import layout
from memoryformer.training import experiment

EOT = 9


def test_places():
    """Red if padding is counted as tokens, or a document of full length gets some."""
    tokens = np.array([EOT, 1, 2, 3, 4, EOT, 5, 6, 7, EOT, 8, EOT])
    made = layout.make(tokens, EOT, 4)
    assert made.num_places == 8 + 4 + 4  # the last token is only a target
    index, real = made.at(np.arange(16))
    want = [0, 1, 2, 3, 4, -1, -1, -1, 5, 6, 7, 8, 9, 10, -1, -1]
    np.testing.assert_array_equal(np.where(real, index, -1), want)
    for plain in (0, 1):
        made = layout.make(tokens, EOT, plain)
        index, real = made.at(np.arange(11))
        np.testing.assert_array_equal(index, np.arange(11))
        assert real.all() and made.num_places == 11


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned")
    toy.corpus(folder / "corpus")
    config = toy.run_config(folder, **{"data.align_documents": 8})
    return data.load(experiment.resolve(config).data)


def test_batches(dataset):
    """Documents begin at multiples of 8, and evaluation sees every target once.

    Red if a row's padding is given a weight, or a target is of the next place in the row.
    """
    split = dataset.validation
    batches = split.eval_batches(32, 4)
    parts = [batches.batch(i) for i in range(len(batches))]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    real = joined["segment_ids"] != 0
    np.testing.assert_array_equal(real, joined["weights"] > 0)
    np.testing.assert_array_equal(joined["targets"][real], split.tokens[1:])
    np.testing.assert_array_equal(joined["inputs"][real], split.tokens[:-1])
    begins = (joined["inputs"] == split.eot_id) & real
    assert begins.sum() > 3 and not begins[:, np.arange(32) % 8 != 0].any()
    for row in dataset.train.batches(32, 4, 0).batch(2)["segment_ids"].reshape(-1, 8):
        assert len(set(row[row != 0])) == 1


def test_a_chunk_with_two_documents_is_refused(tmp_path):
    """Red if packed documents reach a memory that is carried over chunks."""
    fields = {"model.recurrence": "rmt", "model.recurrence_options.chunk_size": 4}
    for align in (0, 2):
        config = toy.run_config(tmp_path, **fields, **{"data.align_documents": align})
        with pytest.raises(
            errors.ConfigError, match=r"inside a chunk.*documents=4"
        ) as e:
            experiment.resolve(config)
        assert "\n" not in str(e.value)
    config = toy.run_config(tmp_path, **{"data.align_documents": 3})
    with pytest.raises(errors.ConfigError, match=r"does not divide model\.seq_len=16"):
        experiment.resolve(config)


@pytest.mark.parametrize("name", ["rmt", "memformer", "pmi"])
def test_presets_align(name):
    """Red if a named experiment with a memory packs documents."""
    run = experiment.resolve(presets.with_mixer(presets.pythia("410m"), name))
    assert run.data.align_documents == 512 and run.model.recurrence == name


@pytest.mark.parametrize("align, seq_len", [(8, 12), (2, 5)])
def test_rows_must_hold_whole_chunks(dataset, align, seq_len):
    """Red if a chunk crosses rows, the shortest that there are too."""
    split = dataclasses.replace(dataset.train, align=align)
    words = f"align_documents={align} does not divide"
    with pytest.raises(errors.ConfigError, match=words):
        split.batches(seq_len, 2, 0)


def test_a_long_stream_is_looked_at_in_parts(monkeypatch):
    """The same places whatever the part. Mutations: parts that overlap, or leave a gap."""
    tokens = np.array([1, 2, EOT, 3, EOT, 4, 5, 6, EOT, 7, EOT])
    whole = layout.make(tokens, EOT, 3)
    assert whole.starts.tolist() == [0, 2, 4, 8]  # the first begins inside a document
    assert whole.lengths.tolist() == [2, 2, 4, 2]
    assert whole.places.tolist() == [0, 3, 6, 12] and whole.num_places == 15
    for size in (1, 2, 5):
        monkeypatch.setattr(layout, "SCAN", size)
        part = layout.make(tokens, EOT, 3)
        np.testing.assert_array_equal(part.starts, whole.starts)
