"""Speed against loss of runs: the figures are those of the run."""

import json

import pytest
import toy

from benchmarks import converted
from benchmarks.decode import peers
from memoryformer import accounting
from memoryformer.training import evaluate_run, experiment


@pytest.mark.slow
def test_a_row_is_of_its_run(toy_run, tmp_path, capsys):
    """Bytes, loss and a plot from the file. No other engine holds memory layers.

    Mutations: float32 bytes; the loss before rounding; engines of a run that is not dense.
    """
    output = tmp_path / "out.json"
    words = [str(toy_run), "--rounds=2", "--tokens=4", "--clock=cpu"]
    words.append("--peers=dense-int4")
    result = converted.main([*words, f"--output={output}"])
    (row,) = result["runs"]
    run, _, _ = experiment.load(toy_run)
    cost = accounting.count(run.model, value_bytes=1)
    assert row["bytes_a_token"] == cost.decode_bytes_per_token - cost.decode_state_bytes
    rounded = evaluate_run.evaluate_checkpoint(toy_run, kinds=converted.KINDS)
    assert row["loss"] == rounded["val/loss"]
    assert row["loss"] != evaluate_run.evaluate_checkpoint(toy_run)["val/loss"]
    assert row["faster"] == [1.0, 1.0, 1.0] and min(row["tokens_per_second"]) > 0
    printed = capsys.readouterr().out
    assert "+0.0000" in printed and f"{toy_run} is no dense run" in printed
    again = converted.main([str(output), f"--plot={tmp_path / 'plot.png'}"])
    assert again == json.loads(output.read_text()) and not again["engines"]
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.slow
def test_engines_decode_the_dense_run(tmp_path, monkeypatch):
    """With layer norms, in every round. Mutations: norms as they were; the warm round counts."""
    run = toy.trained(tmp_path, **{"model.projection": "dense"})
    decoded = []

    def of_twin(name, twin, folder):
        config, params = twin()
        assert name == "dense-int4" and config.norm == "layernorm"
        assert params["blocks"]["0"]["norm1"].keys() == {"scale", "bias"}
        return peers.Peer(lambda *work: decoded.append(work), None, 1000)

    monkeypatch.setattr(peers, "of_twin", of_twin)
    output = tmp_path / "out.json"
    words = [str(run), "--rounds=2", "--tokens=4", "--peers=dense-int4"]
    result = converted.main([*words, f"--output={output}"])
    assert decoded == [(1, 4)] * 3
    engine = result["engines"]["dense-int4"]
    assert engine["weight_bytes"] == 1000 and engine["faster"][1] > 1
    converted.main([str(output), f"--plot={tmp_path / 'plot.png'}"])
    assert (tmp_path / "plot.png").stat().st_size > 0
