"""A trained run under noise: worse with more of it, resumable, and the same wherever it is."""

import json
import shutil

import numpy as np
import pytest

from memoryformer import cli, errors
from memoryformer.cim import __main__ as command
from memoryformer.cim import experiment, settings
from memoryformer.cim.cells import Gaussian
from memoryformer.cim.devices import Flips, Pcm, Stuck
from memoryformer.cim.periphery import Periphery
from memoryformer.cim.settings import Setting
from memoryformer.training import evaluate_run

SEEDS = range(10)


@pytest.fixture(scope="module")
def trial(toy_run):
    return experiment.Trial(toy_run, 0)


def mean(trial, setting):
    return np.mean([trial.measure(setting, seed)["bits_per_byte"] for seed in SEEDS])


def test_without_noise_it_is_the_evaluation(toy_run, trial):
    """The loss of `eval.py` on the whole text, and no code differs. Mutation: the first batch
    alone; codes compared with those of the batch before."""
    whole = evaluate_run.evaluate_checkpoint(toy_run)
    ideal = trial.measure(experiment.IDEAL, 0)
    assert ideal["bits_per_byte"] == pytest.approx(whole["val/bits_per_byte"], abs=1e-6)
    assert ideal["tokens"] == whole["val/tokens"]
    assert len(ideal["flips"]) == 3 and not any(ideal["flips"].values())
    again = trial.measure(Setting("gaussian", 0.0, Gaussian(sigma=0.0)), 5)
    assert again == ideal


@pytest.mark.parametrize(
    "levels",
    [
        [Setting("gaussian", s, Gaussian(sigma=s)) for s in (0.0, 0.05, 0.2, 0.8)],
        [Setting("stuck", s, Stuck(share=s)) for s in (0.0, 0.01, 0.1)],
        [Setting("flips", r, Flips(rate=r)) for r in (0.0, 0.003, 0.03)],
        [Setting("pcm", t, Pcm(compensate=False), t) for t in (0.0, 3e3, 3e7)],
    ],
    ids=lambda levels: levels[0].kind,
)
def test_more_noise_is_worse(trial, levels):
    """In the mean of ten seeds. Mutations: sigma squared; drift with the sign of its exponent
    turned; a share of stuck cells that is 1 - share."""
    losses = [mean(trial, setting) for setting in levels]
    assert np.all(np.diff(losses) > 0), losses


def test_flip_rates_are_of_bits_and_real_tokens(trial):
    """One bit of one code of four tokens, one of which is padding. Mutations: `!=` of codes for
    bits; padding counted."""
    clean = [{"a": np.array([[[3, 0], [1, 2], [0, 0], [5, 5]]])}]
    noisy = [
        ({"a": np.array([[[2, 0], [1, 2], [0, 0], [2, 5]]])}, np.array([[1, 1, 2, 0]]))
    ]
    rates = experiment.flip_rates(clean, noisy, {"a": 4})
    assert rates == {"a": 1 / (3 * 2 * 4)}
    narrow = Setting("io", 4, periphery=Periphery(3, 3))
    assert all(rate > 0 for rate in trial.measure(narrow, 0)["flips"].values())


def test_the_command_goes_on_where_it_was_stopped(
    toy_run, tmp_path, monkeypatch, capsys
):
    """Table, picture and results; nothing is measured twice, and more seeds measure only these.
    Mutations: the seed left out of the key; results written at the end."""
    workdir, folder = tmp_path / "run", tmp_path / "out"
    shutil.copytree(toy_run, workdir)
    words = ["cim", f"--workdir={workdir}", f"--beside={toy_run}", f"--output={folder}"]
    words += ["--technology=pcm", "--seconds=3600", "--num_batches=1"]
    measured, limit = [], [4]
    measure = experiment.Trial.measure

    def counted(self, setting, seed):
        measured.append((setting.kind, seed))
        if len(measured) > limit[0]:
            raise errors.StorageError("stopped here")
        return measure(self, setting, seed)

    def run(*more):
        measured.clear()
        with pytest.raises(SystemExit) as ended:
            command.main([*words, *more])
        return ended.value.code

    monkeypatch.setattr(experiment.Trial, "measure", counted)
    assert run("--seeds=1") == 45
    kept = json.loads((folder / "results.json").read_text())
    assert 0 < len(kept) < 5
    limit[0] = 1000
    assert run("--seeds=1") == 0
    text = (folder / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "pcm_uncompensated | 3600 seconds | 1 |" in text and "mixer.qkv" in text
    assert (folder / "noise.png").stat().st_size > 10_000
    assert run("--seeds=1") == 0 and measured == []
    assert run("--seeds=2") == 0
    assert {seed for kind, seed in measured if kind != "ideal"} == {1}


def test_settings():
    """All that there is, times up to the one asked for, and refusals. Mutations: `<=` for `<`
    in `_times`; a kind without an axis."""
    every = settings.settings(["all"], settings.DAY, {"roles": ("tables",)})
    assert {s.kind for s in every} == settings.AXES.keys()
    assert len(set(every)) == len(every)
    assert every[0] == experiment.IDEAL
    times = [s.seconds for s in every if s.kind == "pcm"]
    assert times == [1.0, settings.HOUR, settings.DAY]
    year = settings.settings(["reram"], settings.YEAR, {})
    assert [s.seconds for s in year[1:]] == [
        1.0,
        settings.HOUR,
        settings.DAY,
        172_800.0,
    ]
    for names, seconds in (
        ([""], 1.0),
        (["pmc"], 1.0),
        (["pcm"], float("nan")),
        ([], 1.0),
    ):
        with pytest.raises(errors.ConfigError):
            settings.settings(names, seconds, {})
    assert cli.COMMANDS["cim"][0] == "cim"
