"""The studies: what is known of them in advance, and that nothing is trained twice."""

import json

import numpy as np
import pytest

from memoryformer import errors
from memoryformer.identifiability import __main__ as command
from memoryformer.identifiability import linear_attention, studies
from memoryformer.tasks import experiment, linear_maps, trainer


@pytest.fixture
def small(monkeypatch):
    """A study of one data set, of 40 steps of Adam with two heads."""
    whole = studies.config

    def config(*args):
        values = whole(*args)
        values.task.update(num_steps=40, warmup_steps=5, eval_every=40, eval_batches=1)
        return values

    monkeypatch.setattr(studies, "config", config)
    monkeypatch.setattr(studies, "HEADS", (2,))
    monkeypatch.setitem(studies.DATA, "teachers", [{"width": 2, "num_examples": 90}])


def test_the_exact_fit_finds_the_teacher_and_adam_is_beside_it(
    small, tmp_path, monkeypatch
):
    """1e-12 in function, squared; the second time nothing is trained and the table is the same.

    Mutations: distance from another seed's teacher; errors on the examples that were fitted;
    the outcome not looked at.
    """
    table = studies.run("teachers", tmp_path, 2)
    rows = json.loads((tmp_path / "study.json").read_text())
    assert [row["method"] for row in rows] == ["exact"] * 2 + ["Adam, 2"] * 2
    for exact, adam in zip(rows[:2], rows[2:], strict=True):
        assert exact["error"] < 1e-24 and exact["distance"] < 1e-12
        assert 1e-3 < adam["error"] < 1e4 and adam["distance"] > 1e-2
        assert exact["certificate"] == adam["certificate"] > 0
    assert table.count("\n") == 3 and "error on normal" not in table
    monkeypatch.setattr(trainer, "train", None)
    assert studies.run("teachers", tmp_path, 2) == table


def test_orthogonal_pairs_do_not_determine_the_layer():
    """lambda_min is 0 to rounding; the fit is exact there, elsewhere it is another function.

    Mutation: normal pairs in place of orthogonal ones.
    """
    found = {}
    for normal in (0.0, 1.0):
        data = {"width": 4, "normal": normal, "num_examples": 1000}
        values = studies.config("associative", data, 0, 1)
        chosen = experiment.resolve(values).task.options
        Z, Y = linear_maps.dataset(chosen)
        heads = linear_attention.fit_heads(Z, Y)
        certificate = linear_attention.certificate(Z)
        found[normal] = certificate, *studies.figures(chosen, heads)
    certificate, error, error_normal, distance = found[0.0]
    assert certificate < 1e-25 and error < 1e-24
    assert error_normal > 1e-2 and distance > 0.1
    certificate, error, error_normal, distance = found[1.0]
    assert certificate > 1e-2 and error == error_normal < 1e-24 and distance < 1e-12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name one of --study"),
        (["--study=teachers", "--workdir=x"], "name one of --study"),
        (["--study=teachers"], "--output is missing"),
        (["--study=teachers", "--output=x", "--step=3"], "--step: is of a run"),
        (["--workdir=x", "--output=x"], "--output: is of a study"),
    ],
)
def test_flags_that_do_not_go_together(words, said, capsys):
    """One line, exit code 2. Mutation: one of the checks left out."""
    with pytest.raises(SystemExit) as ended:
        command.main(["identifiability", *words])
    assert ended.value.code == errors.ConfigError.exit_code
    assert said in capsys.readouterr().err


def test_the_table_has_medians_and_the_worst():
    """Mutation: means, which one bad seed rules."""
    rows = [
        studies.Row("d", "m", seed, 0.5, error, error + 1, 2 * error)
        for seed, error in enumerate((1.0, 9.0, 2.0))
    ]
    line = studies.table(rows).splitlines()[-1]
    cells = ["d", "m", "5.0e-01", "2.0e+00 (9.0e+00)", "3.0e+00 (1.0e+01)"]
    assert line == f"| {' | '.join([*cells, '4.0e+00 (1.8e+01)'])} |"
    assert np.isfinite(rows[0].error)
