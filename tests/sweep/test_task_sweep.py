"""A sweep over a generated task: points, states, tables, by the sweep of language models."""

import math

import pytest
import toy_task

from memoryformer.errors import ConfigError
from memoryformer.runs import metrics
from memoryformer.sweep import best, commands, files, kinds, points, statistics, worker
from memoryformer.tasks import registry

CONFIG = '''"""The made-up task."""

import toy_task


def get_config():
    return toy_task.config()


def metrics():
    return ("val/loss",)


def sweep_rate():
    for rate in (0.1, 1e-4):
        yield {"task.learning_rate": rate}


def sweep_seed():
    for seed in range(2):
        yield {"task.seed": seed}
'''


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Two learning rates times two seeds."""
    monkeypatch.setitem(registry.TASKS, "adding", toy_task.Adding)
    path = tmp_path / "adding.py"
    path.write_text(CONFIG, encoding="utf-8")
    return points.expand(str(path), ("rate", "seed"), tmp_path / "sweeps")


def test_points_of_a_task_are_trained_and_tabulated(sweep):
    """Seeds are one variant, each side takes its best rate, and the numbers are the runs'.

    Mutations: SEEDS without task.seed (four variants of one seed); `learning_rate` of
    language models for both kinds (no table of the best).
    """
    assert {p.variant for p in sweep.points} == {
        "learning_rate=0.1",
        "learning_rate=0.0001",
    }
    assert len({kinds.program(p.run) for p in sweep.points}) == 2
    assert {files.state(p).name for p in sweep.points} == {"new"}
    for point in sweep.points:
        assert worker.train(kinds.as_dict(point.run), str(point.workdir)) == (0, "")
    assert {files.state(p).name for p in sweep.points} == {"done"}
    last = [metrics.read(p.workdir)[-1]["val/loss"] for p in sweep.points]
    table = statistics.collect(sweep)
    assert "4 of 4 points are done" in table
    for pair in (last[:2], last[2:]):
        assert statistics.number(math.fsum(pair) / 2) in table
    assert [row["parameters"] for row in statistics.rows(sweep)] == [3] * 4
    chosen = best.table(sweep)
    assert any("at the best learning_rate" in line for line in chosen)
    assert any("| 0.1 (highest tried)" in line for line in chosen)
    line = points.command(sweep, sweep.points[0])
    assert " -m memoryformer.tasks --config=" in line
    assert line.endswith("--config.task.learning_rate=0.1 --config.task.seed=0")


def test_options_that_one_point_has_not(tmp_path):
    """Softmax has no slots, and its row no such column; the table is made all the same.

    Mutation: `flat[field]` of every field, a KeyError.
    """
    found = points.expand("shared_memory:texts", ("memory",), tmp_path)
    slots = "model.mixer_options.num_slots"
    rows = statistics.rows(found)
    assert [row.get(slots) for row in rows] == [None, 1, 1, 16, 16, 16, 16]
    assert "0 of 7 points are done" in statistics.collect(found)


def test_memory_is_not_estimated(sweep):
    """Mutation: the check left out (a traceback of the dry run's)."""
    with pytest.raises(
        ConfigError, match="sweep check: estimates the memory of language"
    ):
        commands.check(sweep, commands.Options())
