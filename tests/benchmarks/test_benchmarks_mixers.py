"""The mixers' benchmarks run, resume and tabulate, at toy size."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import toy

from memoryformer import model

ROOT = pathlib.Path(__file__).parents[2]


def _load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_quality_table_resumes(tmp_path, monkeypatch):
    """Red if a finished run is trained again, or softmax is not what speed is against."""
    toy.corpus(tmp_path / "corpus")
    benchmark = _load("mixers")
    command = [
        f"--config={toy.config_file(tmp_path)}",
        f"--folder={tmp_path / 'runs'}",
        "--mixers=softmax,linear",
        "--projections=memory",
        "--seeds=1",
        "--steps=10",
        "--rounds=2",
    ]
    rows = benchmark.main(command)
    lines = benchmark.table(rows).splitlines()
    assert lines[2].startswith("| softmax | memory |")
    assert "| 1.00 [1.00, 1.00] |" in lines[2]
    assert len(lines) == 4 and rows[1]["bits_per_byte"][0] > 0
    monkeypatch.setattr(benchmark.loop, "train", lambda *_: pytest.fail("trained"))
    again = benchmark.main([*command, "--rounds=0"])
    assert [row["bits_per_byte"] for row in again] == [r["bits_per_byte"] for r in rows]
    assert "| - |" in benchmark.table(again).splitlines()[2]


@pytest.mark.slow
def test_decode_length(tmp_path):
    """Red if a linear mixer's state grows, or the cache of softmax does not."""
    benchmark = _load("decode_length")
    rows = benchmark.main(
        [
            "--mixers=softmax,performer,linformer",
            "--contexts=8,256",
            "--tokens=2",
            "--rounds=1",
            f"--output={tmp_path / 'rows.json'}",
            f"--plot={tmp_path / 'plot.png'}",
        ]
    )
    by_mixer = [[row["state_bytes"] for row in rows[i : i + 2]] for i in (0, 2, 4)]
    assert by_mixer[0][1] > 2 * by_mixer[0][0]
    assert by_mixer[1][0] == by_mixer[1][1] and by_mixer[2][0] == by_mixer[2][1]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_cache_inside_a_state_is_filled_too():
    """Recurformer's lies beside its recurrent heads. Mutation: only a block's own is filled."""
    benchmark = _load("decode_length")
    config = toy.model_config(mixer="recurformer", num_layers=1)
    state = model.merge(config, model.init(config)).init_state(1, 64)
    (block,) = benchmark._seen(state, 40)
    assert (block.cache.length == 40).all() and (block.cache.segment_ids == 1).all()
    jax.tree.map(np.testing.assert_array_equal, block.recurrent, state[0].recurrent)


@pytest.mark.slow
def test_prefill(tmp_path):
    """A figure for each length and kind. Mutation: kinds and lengths paired off."""
    result = _load("prefill").main(
        [
            "--size=toy",
            "--layers=1",
            "--lengths=3,40",
            "--tables=int8,bfloat16",
            "--rounds=2",
            f"--output={tmp_path / 'prefill.json'}",
        ]
    )
    assert [(row["tables"], row["length"]) for row in result["works"]] == [
        ("int8", 3),
        ("int8", 40),
        ("bfloat16", 3),
        ("bfloat16", 40),
    ]
    assert all(row["micros"][0] > 0 for row in result["works"])
