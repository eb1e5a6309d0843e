"""Tasks on PMI's encoder: their configs, one run, and what is counted."""

import pathlib

import jax
import numpy as np
import pytest
import toy

from memoryformer import config as config_lib
from memoryformer import runs
from memoryformer.errors import ConfigError
from memoryformer.runs import metrics
from memoryformer.tasks import experiment, trainer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SMALL = {
    "model.embed_dim": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.key_dim": 8,
    "model.ffn_dim": 16,
    "task.batch_size": 32,
}


def _task(argument, **fields):
    config = config_lib.load(f"{CONFIGS}/pmi.py:{argument}", **(SMALL | fields))
    return experiment.resolve(config).task


@pytest.mark.slow
def test_a_run_learns(tmp_path):
    """Which answers a question of each kind has, in 120 steps; and its folder is a run's.

    Mutation: labels of another batch.
    """
    steps = {"task.num_steps": 120, "task.warmup_steps": 5}
    steps |= {"task.learning_rate": 1e-2, "task.eval_every": 60}
    config = config_lib.load(f"{CONFIGS}/pmi.py:relations", **(SMALL | steps))
    first, last = trainer.train(config, tmp_path)
    assert first["step"] == 60 and metrics.read(tmp_path) == [first, last]
    assert last["val/loss"] < first["val/loss"] < np.log(10)
    assert last["val/accuracy"] > 0.3
    assert runs.load(tmp_path)[1].keys() == {"cls", "encoder", "head", "inputs"}


def test_what_is_counted(monkeypatch):
    """Rows do not meet, words in padding are not read, and kinds are told apart.

    Mutations: `real` left out of the encoder; CLS read at the last token; a kind counted among
    all rows.
    """
    task = _task("stories-working")
    shapes, rng = jax.eval_shape(lambda: task.init(0)), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes
    )
    data, logits = task.batch(0, "train"), toy.quick_jit(task.logits)
    want = np.asarray(logits(params, data))
    assert want.shape == (32, task.num_classes)
    turned = {name: value[::-1] for name, value in data.items()}
    np.testing.assert_allclose(logits(params, turned)[::-1], want, atol=1e-5)
    noise = data | {"inputs": data["inputs"].copy()}
    noise["inputs"][~data["real"]] = 1
    np.testing.assert_allclose(logits(params, noise), want, atol=1e-6)
    monkeypatch.setattr(type(task), "logits", lambda *args: want)  # compiled already
    guess = want.argmax(axis=1)
    data["labels"][::2] = guess[::2]
    sums = task.sums(params, data)
    right, kinds = guess == data["labels"], data["kinds"]
    for i, kind in enumerate(task.kinds):
        total, count = sums[f"accuracy/{kind}"]
        assert (int(total), int(count)) == (sum(right & (kinds == i)), sum(kinds == i))
    assert int(sums["accuracy"][0]) == sum(right) >= 16


def test_triangles_are_points():
    """Mutation: a token for each cluster."""
    task = _task("triangles-none")
    params = jax.eval_shape(lambda: task.init(0))
    batch = task.batch(0, "train")
    assert jax.eval_shape(task.logits, params, batch).shape == (32, 2)
    assert batch["inputs"].shape == (32, 24, 2)


def test_groups():
    """Biases, norms and scalars are not decayed. Mutation: all of them."""
    task = _task("relations-no-sharing")
    params = jax.eval_shape(lambda: task.init(0))
    groups = task.groups(params)
    assert jax.tree.structure(groups) == jax.tree.structure(params)
    mixer = groups["encoder"]["blocks"]["01"]["mixer"]
    assert mixer["query"] == {"kernel": "decayed", "bias": "undecayed"}
    assert mixer["norm3"] == {"scale": "undecayed", "bias": "undecayed"}
    assert mixer["forget_bias"] == mixer["gate_scale"] == "undecayed"
    assert mixer["gate_slots"] == groups["cls"] == "decayed"


def test_other_names_are_refused():
    """Mutation: `get_config` takes any word for the default."""
    for argument, message in (
        ("relation", "did you mean 'relations'"),
        ("relations-sums", "did you mean 'sum'"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_lib.load(f"{CONFIGS}/pmi.py:{argument}")
