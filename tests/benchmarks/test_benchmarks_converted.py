"""Speed against loss of runs: the figures are those of the run."""

import json

import pytest

from benchmarks import converted
from memoryformer import accounting
from memoryformer.training import evaluate_run, experiment


@pytest.mark.slow
def test_a_row_is_of_its_run(toy_run, tmp_path, capsys):
    """Bytes, loss and a plot from the file. Mutations: float32 bytes; the loss before rounding."""
    output = tmp_path / "out.json"
    words = [str(toy_run), "--rounds=2", "--tokens=4", "--clock=cpu"]
    result = converted.main([*words, f"--output={output}"])
    (row,) = result["runs"]
    run, _, _ = experiment.load(toy_run)
    cost = accounting.count(run.model, value_bytes=1)
    assert row["bytes_a_token"] == cost.decode_bytes_per_token - cost.decode_state_bytes
    rounded = evaluate_run.evaluate_checkpoint(toy_run, kinds=converted.KINDS)
    assert row["loss"] == rounded["val/loss"]
    assert row["loss"] != evaluate_run.evaluate_checkpoint(toy_run)["val/loss"]
    assert row["faster"] == [1.0, 1.0, 1.0] and min(row["tokens_per_second"]) > 0
    assert "+0.0000" in capsys.readouterr().out
    again = converted.main([str(output), f"--plot={tmp_path / 'plot.png'}"])
    assert again == json.loads(output.read_text())
    assert (tmp_path / "plot.png").stat().st_size > 0
