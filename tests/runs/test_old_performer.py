"""A performer's run from before its random features were stored: gone on with, and exported.

Its logits and figures are in test_old_runs.py.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
import toy

from memoryformer.convert import export, safetensors_file, transfer
from memoryformer.errors import ConfigError
from memoryformer.model import older
from memoryformer.runs import manifest, metrics
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment, loop

FIXTURE = pathlib.Path(__file__).parents[1] / "data" / "runs_of_old.tar.xz"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The folder of the fixture; its config names the corpus relative to it."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def _inside(old, monkeypatch):
    monkeypatch.chdir(old)


def _config(old):
    """The run's, on one device."""
    return experiment.complete(run_steps.facts(old / "performer")["config"]) | {
        "mesh": "single"
    }


def test_a_run_with_its_own_seed_of_features_is_not_gone_on_with(old, tmp_path):
    """Its redraws would be others; it is still read, with its own draw.

    Mutations: `check_redraws` not called, or of one field alone; `facts["retired"]` lost
    when a manifest is amended.
    """
    _, plain, facts = experiment.load(old / "performer")
    rows = plain["blocks"]["0"]["mixer"]["random_rows"]
    for name in ("performer_seed", "performer_draw"):
        workdir = tmp_path / name
        shutil.copytree(old / "performer", workdir)
        _rewrite(workdir, facts["step"], **{name: 3})
        step = workdir / run_steps.FOLDER / str(facts["step"])
        manifest.amend(step, note=1)
        with pytest.raises(ConfigError, match=f"model.{name}=3: an older") as caught:
            loop.train(_config(old), workdir)
        assert "\n" not in str(caught.value)
        _, params, _ = experiment.load(workdir)
        assert (params["blocks"]["0"]["mixer"]["random_rows"] != rows).any()


def test_only_redraws_depend_on_what_an_older_version_drew(old):
    """Features that stay, and models without any, go on. Mutation: the first `return` left out."""
    config = experiment.load(old / "performer")[0].model
    drawn = {"performer_seed": 3, "performer_draw": 1}
    with pytest.raises(ConfigError, match="performer_seed=3: an older"):
        older.check_redraws(config, drawn)
    options = dataclasses.replace(config.mixer_options, redraw_every=0)
    older.check_redraws(dataclasses.replace(config, mixer_options=options), drawn)
    older.check_redraws(toy.model_config(), drawn)


def test_training_goes_on_as_if_it_had_been_stored(old):
    """Two more steps: of the old run, and of one that was trained by this code from the start.

    Mutations: the redraws since the first step not counted in `older.random_features`;
    `absent_params` not given to the checkpointer (refused), or another draw; an old
    step taken for one that was not evaluated.
    """
    config = _config(old)
    loop.train(config, old / "new")
    # Its last step was evaluated: the metrics say so, for the checkpoint does not.
    assert "evaluated" not in run_steps.facts(old / "performer")
    assert loop.train(config, old / "performer") == {}
    config["train"]["num_steps"] = 6
    rows = []
    for name in ("performer", "new"):
        loop.train(config, old / name, allow=("train.num_steps",))
        rows.append(
            [
                row["train/loss"]
                for row in metrics.read(old / name)
                if "train/loss" in row and row["step"] > 4
            ]
        )
    assert len(rows[0]) == 2
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-6)
    leaves = run_steps.facts(old / "performer")["leaves"]
    assert any(path[-1] == "random_rows" for path, _, _ in leaves)


def test_features_are_redrawn_before_the_batch_that_begins_a_period():
    """Every 5 steps: batches 0 to 4 saw the first draw, so 5 steps have one, and 6 two.

    Mutation: a step counted before it is done, or after.
    """
    config = toy.model_config(
        mixer="performer", mixer_options={"num_features": 4, "redraw_every": 5}
    )
    stored = {"performer_seed": 0, "performer_draw": 0}

    def rows(step):
        params = older.random_features(config, stored, seed=1, step=step)
        return np.asarray(params["blocks"]["0"]["mixer"]["random_rows"])

    first = rows(0)
    for step, same in ((1, True), (5, True), (6, False), (10, False)):
        assert (rows(step) == first).all() == same, step
    assert (rows(6) == rows(10)).all() and (rows(11) != rows(10)).any()


def test_an_export_of_old_is_read_with_its_draw(old, tmp_path):
    """Its config names seed and draw, and its arrays lack the features.

    Mutation: `load_export` without `older.random_features`.
    """
    transfer.export_run(old / "performer", tmp_path / "export")
    _, params = export.load_export(tmp_path / "export")
    path = tmp_path / "export" / "model.safetensors"
    arrays, _ = safetensors_file.read(path)
    older = {name: x for name, x in arrays.items() if "random_rows" not in name}
    assert len(older) < len(arrays)
    path.unlink()
    safetensors_file.write(path, older, {"format": "np"})
    config_path = tmp_path / "export" / "config.json"
    fields = json.loads(config_path.read_text())
    seed = fields["source"]["config"]["train"]["seed"]
    fields["model"] |= {"performer_seed": seed, "performer_draw": 1}
    config_path.write_text(json.dumps(fields))
    _, again = export.load_export(tmp_path / "export")
    np.testing.assert_array_equal(
        again["blocks"]["0"]["mixer"]["random_rows"],
        params["blocks"]["0"]["mixer"]["random_rows"],
    )


def _rewrite(workdir, step, **changed):
    """Change fields of the model in the config that a step was written with."""
    path = workdir / run_steps.FOLDER / str(step) / manifest.MANIFEST
    content = json.loads(path.read_bytes().partition(b"\n")[2])
    content["facts"]["config"]["model"] |= changed
    body = json.dumps(content, sort_keys=True).encode()
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
