"""Recurrences inside whole runs: training, its meter, and what they are counted to cost."""

import json
import math

import jax
import pytest
import toy

from memoryformer import accounting, model
from memoryformer.model import recurrence
from memoryformer.runs import metrics


@pytest.mark.parametrize(
    ("kind", "projection"),
    [
        ("rmt", "dense"),
        pytest.param("memformer", "memory", marks=pytest.mark.slow),
        pytest.param("pmi", "memory", marks=pytest.mark.slow),
    ],
)
def test_a_run_logs_its_memory(tmp_path, kind, projection):
    """Red if the trainer packs documents, or the meter does not know the state."""
    workdir = toy.trained(
        tmp_path,
        **{
            "model.recurrence": kind,
            "model.recurrence_options.chunk_size": 8,
            "model.recurrence_options.num_slots": 3,
            "model.projection": projection,
            "model.ffn_activation": "gelu" if projection == "dense" else "none",
            "data.align_documents": 8,
            "train.num_steps": 10,
        },
    )
    rows = metrics.read(workdir)
    assert any("degradation/recurrence/cosine" in json.dumps(row) for row in rows)
    ranks = [
        r["degradation/recurrence/effective_rank"] for r in rows if "val/loss" in r
    ]
    most = 16 if kind == "pmi" else 3  # 3 slots and 15 of long-term memory, 16 wide
    assert all(1 <= rank <= most + 1e-4 for rank in ranks)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("projection", ["memory", "dense"])
@pytest.mark.parametrize("kind", recurrence.KINDS)
def test_costs_are_those_of_the_model(kind, projection):
    """Red if a memory gains an array that its formula does not know."""
    sizes = {"seq_len": 24, "recurrence_options": {"chunk_size": 6, "num_slots": 3}}
    config = toy.model_config(projection, recurrence=kind, **sizes)
    counted = accounting.count(config, value_bytes=4)
    params = jax.eval_shape(lambda: model.init(config))
    assert counted.parameters.total == _size(params)

    def state():
        return model.merge(config, model.init(config)).init_state(1, 24)

    kept = [x for x in jax.tree.leaves(jax.eval_shape(state)) if x.dtype.kind == "f"]
    assert counted.decode_state_bytes == 4 * _size(kept)


def _size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_operations():
    """By hand. Red if memory tokens are not projected, or a chunk mixes over the row."""
    dense = {"seq_len": 24, "num_layers": 2, "embed_dim": 16}
    plain = accounting.count(toy.model_config("dense", **dense))
    sizes = {"recurrence_options": {"chunk_size": 6, "num_slots": 3}}
    rmt = accounting.count(
        toy.model_config("dense", recurrence="rmt", **dense, **sizes)
    )
    token = 12 * 16 * 16  # q, k, v, o and two layers of four times the width
    assert plain.block.mixing == 2 * 24 * 24 * 16
    assert rmt.block.mixing == 4 * 2 * 6 * 6 * 16
    longer = 6 * token + 2 * (12 * 12 - 6 * 6) * 16
    assert rmt.recurrence_multiply_adds == 4 * 2 * longer
    memformer = accounting.count(
        toy.model_config("dense", recurrence="memformer", **dense, **sizes)
    )
    square = 16 * 16
    read = 6 * 2 * square + 3 * 2 * square + 2 * 6 * 3 * 16
    write = 3 * square + (6 + 3) * 2 * square + 2 * 3 * 7 * 16
    assert memformer.recurrence_multiply_adds == 4 * (2 * read + write)
    sizes["recurrence_options"] |= {"num_fragments": 5}
    pmi = accounting.count(
        toy.model_config("dense", recurrence="pmi", **dense, **sizes)
    )
    read = 6 * square + 2 * 2 * 6 * 3 * 16
    write = 3 * square + (6 + 6) * 2 * square + 2 * 3 * 6 * 16  # attention
    write += 3 * square + 2 * 5 * 3 * 16 + (3 + 1) * 2 * square  # f, M_l, gates
    assert pmi.recurrence_multiply_adds == 4 * (2 * read + write)
    assert plain.recurrence_multiply_adds == 0
