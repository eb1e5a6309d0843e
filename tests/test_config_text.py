"""Configs as people meet them: on the command line, at a run's start, in review."""

import json
import os
import pathlib
import subprocess
import sys

import golden_configs
import jax
import pytest
import test_config
import toy

from memoryformer import accounting, model
from memoryformer import config as config_lib
from memoryformer.sweep import points
from memoryformer.training import banner, experiment

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = str(ROOT / "configs" / "studies.py")


def test_shipped_configs_are_those_on_file():
    """A change of a config or of a default is a change of a file: `make golden-configs`.

    Mutation: `warmup_steps = 101` in configs/quickstart.py.
    """
    assert golden_configs.stale() == []


def sweeps():
    for path in test_config.SHIPPED:
        for name in points.available(path):
            yield pytest.param(path, name, id=f"{pathlib.Path(path).name}-{name}")


@pytest.mark.parametrize("path, name", list(sweeps()))
def test_every_sweep_expands(path, name, tmp_path):
    """Its points resolve, differ, are plain values, and their models build (shapes only).

    Mutations: `code_bits` 7 in `sweep_table3`; a rate twice in `sweep_table4`.
    """
    sweep = points.expand(path, [name], tmp_path)
    assert len(sweep.points) > 1
    for point in sweep.points:
        for value in point.overrides.values():
            assert isinstance(value, bool | int | float | str | tuple)
        jax.eval_shape(lambda run=point.run: model.init(run.model))
    with_seeds = points.expand(path, dict.fromkeys([name, "seed"]), tmp_path)
    assert len(with_seeds.points) == len(sweep.points) * (3 if name != "seed" else 1)


@pytest.mark.parametrize("size", ["", "mini"])
def test_what_the_studies_call_equal_is_equal(size, tmp_path):
    """Memory and dense: FLOPs within 3 %, parameters within 4 %; the paper's Table 3 widths.

    Mutation: width 48 in EQUAL_FLOPS.
    """
    config = f"{STUDIES}:{size}" if size else STUDIES

    def costs(name):
        sweep = points.expand(config, [name], tmp_path)
        found = {p.label.split(",")[0]: p.run.model for p in sweep.points}
        return [accounting.count(found[kind]) for kind in ("memory", "dense")]

    memory, dense = costs("equal_flops")
    assert dense.flops_per_token == pytest.approx(memory.flops_per_token, rel=0.03)
    memory, dense = costs("equal_parameters")
    assert dense.parameters.total == pytest.approx(memory.parameters.total, rel=0.04)
    table3 = points.expand(config, ["table3"], tmp_path).points
    found = {
        (p.run.model.embed_dim, p.run.model.code_bits, p.run.model.num_tables)
        for p in table3
    }
    true = {(512, 4, 128), (512, 8, 64), (510, 10, 51)}
    assert found == ({(80, 4, 20), (80, 8, 10), (80, 10, 8)} if size else true)


def test_the_miniature_reads_no_text_twice():
    """At its longest, less than the 11 million bytes of the training text.

    Mutation: `train.batch_size = 64` in configs/studies.py.
    """
    sweep = points.expand(f"{STUDIES}:mini", ["score"], "runs")
    longest = max(p.run.train.num_steps for p in sweep.points)
    run = sweep.points[0].run
    assert longest * run.train.batch_size * run.model.seq_len < 11e6
    assert run.data.tokenizer == "bytes"


def test_announcement(tmp_path):
    """The whole config, what the command line changed, what changed since the last run.

    Mutations: old and new swapped; the bytes of dense parameters; `experiment.complete(config_lib.load(preset))`; an unreadable config.json not survived.
    """
    preset = str(toy.config_file(tmp_path))
    config = config_lib.load(preset, **{"train.seed": 5})
    text = banner.text(config, preset, tmp_path)
    assert "embed_dim=16" in text and max(map(len, text.splitlines())) <= 200
    assert f"changed from {preset}:\n  train.seed: 0 -> 5" in text
    assert "since the last run" not in text
    entries = accounting.count(experiment.resolve(config).model).parameters.tables
    assert f"tables: {entries:,} entries of 12 bytes with their moments" in text
    stored = experiment.complete(config_lib.load(preset, **{"train.log_every": 7}))
    (tmp_path / "config.json").write_text(json.dumps(stored))
    text = banner.text(config_lib.load(preset), preset, tmp_path)
    assert f"nothing changed from {preset}" in text
    assert f"since the last run in {tmp_path}:\n  train.log_every: 7 -> 5" in text
    bare = tmp_path / "bare.py"
    bare.write_text("from memoryformer.training import experiment\n")
    with bare.open("a") as file:
        file.write("def get_config():\n    return experiment.default_config()\n")
    assert "model.embed_dim: None -> 16" in banner.text(config, bare, tmp_path)
    (tmp_path / "config.json").write_text('{"model": ')
    assert "since" not in banner.text(config, preset, tmp_path)


def test_train_announces(tmp_path):
    """train.py prints it before the first step.

    Mutation: the call after `training.loop.train`.
    """
    toy.corpus(tmp_path / "corpus")
    command = [sys.executable, "train.py", f"--config={toy.config_file(tmp_path)}"]
    command += [f"--workdir={tmp_path / 'run'}", "--config.train.num_steps=1"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "tests"),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    (tmp_path / "run").mkdir()
    before = experiment.complete(toy.run_config(tmp_path, **{"train.log_every": 9}))
    (tmp_path / "run" / "config.json").write_text(json.dumps(before))
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model: vocab_size=264")
    first_step = done.stdout.index("step 1")
    assert done.stdout.index("train.num_steps: 20 -> 1") < first_step
    assert done.stdout.index("train.log_every: 9 -> 5") < first_step
