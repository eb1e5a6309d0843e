"""ListOps: the answers are right, the batches reproducible, and a trunk learns."""

import ast
import pathlib
import statistics

import numpy as np
import pytest
import toy

from memoryformer import config, errors
from memoryformer.tasks import experiment, listops, trainer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TASK = listops.ListOpsConfig(1, batch_size=4, learning_rate=1e-3, warmup_steps=0)


def _value(tokens):
    """A second evaluator: rewrite the tokens as a Python expression."""
    functions = {
        "MIN": min,
        "MAX": max,
        "MED": lambda values: int(statistics.median(values)),
        "SM": lambda values: sum(values) % 10,
    }
    text = " ".join(f"({t[1:]!r}," if t[0] == "[" else f"{t}," for t in tokens)
    nested = ast.literal_eval(text.replace("],", "),").rstrip(","))

    def reduce(node):
        return (
            node
            if isinstance(node, int)
            else functions[node[0]]([reduce(child) for child in node[1:]])
        )

    return reduce(nested)


def test_answers():
    """Red if an operation takes the wrong arguments, or a bracket is lost."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        tokens, value = listops.tree(rng, TASK)
        assert _value(tokens) == value
        seen.add(tokens[0])
    assert seen == {"[MIN", "[MAX", "[MED", "[SM"}


def test_batches_follow_from_seed_step_and_split():
    """Red if validation repeats training, or a batch depends on the ones before."""
    a, b = (listops.batch(TASK, 64, 3) for _ in range(2))
    np.testing.assert_array_equal(a["inputs"], b["inputs"])
    others = [listops.batch(TASK, 64, 4), listops.batch(TASK, 64, 3, "validation")]
    assert all((other["inputs"] != a["inputs"]).any() for other in others)
    assert ((a["inputs"] != 0) == (a["segment_ids"] != 0)).all()
    lengths = a["segment_ids"].sum(axis=1)
    assert lengths.min() >= TASK.min_len and a["inputs"].max() < len(listops.TOKENS)


@pytest.mark.slow
def test_a_two_sided_trunk_learns(tmp_path):
    """Red if the labels are not those of the inputs, or the head gets no gradient.

    Flat lists of two digits: their first token decides most of the answer.
    """
    loaded = config.load(f"{CONFIGS}/listops.py:conv_luna")
    with loaded.unlocked():
        loaded.model.update(
            {"embed_dim": 32, "num_layers": 1, "num_heads": 2, "seq_len": 8}
        )
        loaded.task.update({"num_steps": 150, "min_len": 4, "max_depth": 1})
        loaded.task.update({"max_args": 2, "learning_rate": 1e-2})
        loaded.task.update({"warmup_steps": 10, "batch_size": 64})
    rows = trainer.train(loaded, tmp_path)
    assert "degradation/blocks.0.mixer/effective_rank" in rows[-1]
    assert rows[-1]["val/accuracy"] > 0.3  # 0.1 is chance
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == len(rows)


@pytest.mark.parametrize("mixer", ["luna", "softmax"])
def test_the_order_of_tokens_matters(mixer):
    """Mutation: a trunk without positions; luna then reads a bag of tokens."""
    task = experiment.resolve(config.load(f"{CONFIGS}/listops.py:{mixer}")).task
    params = task.init(0)
    params["classes"]["kernel"] += np.random.default_rng(0).normal(size=(128, 10))
    data = listops.batch(TASK, task.model.seq_len, 0)
    turned = {k: v.copy() for k, v in data.items()}
    turned["inputs"][:, 1:4] = data["inputs"][:, [2, 3, 1]]  # first tokens of a list
    assert (turned["inputs"] != data["inputs"]).any(axis=1).all()
    logits = toy.quick_jit(task.logits)
    change = logits(params, data) - logits(params, turned)
    assert np.abs(change).max() > 1e-3


def test_a_mixer_without_a_two_sided_form_is_refused():
    """Red if performer is run causally where the config says otherwise."""
    loaded = config.load(f"{CONFIGS}/listops.py:performer")
    with pytest.raises(errors.ConfigError, match="has only a causal form"):
        trainer.train(loaded, "unused")


@pytest.mark.parametrize("warmup", [20, 21])
def test_a_warmup_that_does_not_fit_is_refused(warmup, tmp_path):
    """Mutation tried: the check dropped (optax's traceback), or `>` for `>=`."""
    loaded = config.load(f"{CONFIGS}/listops.py:conv_luna")
    with loaded.unlocked():
        loaded.task.update({"num_steps": 20, "warmup_steps": warmup})
    with pytest.raises(errors.ConfigError, match="must be below"):
        trainer.train(loaded, tmp_path / "run")
    assert not (tmp_path / "run").exists()
