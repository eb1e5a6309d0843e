"""ListOps, generated here: nested operations on digits, the answer one of ten classes.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]   ->   5

After Nangia and Bowman (2018) and the long sequences of Long Range Arena (Tay et al. 2021),
re-derived: trees are drawn until one has `min_len` to `max_len` tokens. Every batch is fresh
and a function of (seed, step), so there is no training set to fit by heart.

    python -m memoryformer.tasks --config=configs/listops.py:luna --workdir=runs/listops

Start at `batch` for the data, at `logits` for the classifier: the trunk of a `Transformer`
(two-sided with `model.causal=False`) on tokens and learned positions, the mean over its
tokens, and a linear head. `trainer` trains it.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memoryformer import config as config_lib
from memoryformer import model as model_lib
from memoryformer.errors import ConfigError
from memoryformer.evaluation import slots
from memoryformer.model import mixers
from memoryformer.notation import Array, Params
from memoryformer.tasks import trainer

OPERATIONS: dict[str, Callable[[list[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(np.median(values)),
    "SM": lambda values: sum(values) % 10,
}
TOKENS = ("<pad>", *map(str, range(10)), *(f"[{name}" for name in OPERATIONS), "]")
NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class ListOpsConfig(trainer.TrainerConfig):
    """Size of the trees, and of the training."""

    min_len: int = 10  # tokens
    max_depth: int = 10
    max_args: int = 10
    value_fraction: float = 0.75  # chance that an argument is a digit

    def __post_init__(self):
        super().__post_init__()
        if self.max_depth < 1:
            raise ConfigError(f"task.max_depth={self.max_depth}: must be >= 1.")
        if self.max_args < 2 or not 0 < self.value_fraction < 1:
            raise ConfigError(
                f"task.max_args={self.max_args} must be >= 2 and "
                f"task.value_fraction={self.value_fraction} between 0 and 1."
            )


def tree(rng: np.random.Generator, config: ListOpsConfig) -> tuple[list[str], int]:
    """Draw one expression: its tokens and its value."""

    def argument(depth):
        if depth >= config.max_depth or rng.random() < config.value_fraction:
            digit = int(rng.integers(10))
            return [str(digit)], digit
        return operation(depth + 1)

    def operation(depth):
        name = list(OPERATIONS)[rng.integers(len(OPERATIONS))]
        parts = [argument(depth) for _ in range(rng.integers(2, config.max_args + 1))]
        tokens = [token for part, _ in parts for token in part]
        value = OPERATIONS[name]([value for _, value in parts])
        return [f"[{name}", *tokens, "]"], value

    return operation(1)


def batch(
    config: ListOpsConfig, max_len: int, step: int, split: str = "train"
) -> dict[str, np.ndarray]:
    """Batch of a step: inputs and segment_ids [B, L] (0 = padding), labels [B]."""
    rng = np.random.default_rng([config.seed, step, split != "train"])
    ids = {token: i for i, token in enumerate(TOKENS)}
    inputs = np.zeros((config.batch_size, max_len), np.int32)
    labels = np.zeros(config.batch_size, np.int32)
    for row in range(config.batch_size):
        for _ in range(10_000):
            tokens, labels[row] = tree(rng, config)
            if config.min_len <= len(tokens) <= max_len:
                break
        else:
            raise ConfigError(
                f"task.min_len={config.min_len}, model.seq_len={max_len}: none of 10,000 "
                "trees is that long; widen the range or change task.max_depth, max_args."
            )
        inputs[row, : len(tokens)] = [ids[token] for token in tokens]
    segment_ids = (inputs != 0).astype(np.int32)
    return {"inputs": inputs, "segment_ids": segment_ids, "labels": labels}


def init(model_config: model_lib.ModelConfig, seed: int = 0) -> Params:
    """Draw a trunk's parameters, positions [L, D] and a head of zeros [D, 10].

    Positions are learned and added to the embedding whatever the mixer: two-sided Luna has
    none of its own and would read a bag of tokens.
    """
    params = model_lib.init(model_config, seed)
    shape = (model_config.seq_len, model_config.embed_dim)
    positions = jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1), shape)
    params["positions"] = {"embedding": model_config.embed_std * positions}
    params["classes"] = {"kernel": jnp.zeros((model_config.embed_dim, NUM_CLASSES))}
    return params


def _embedded(model_config, params, data):
    """Return the trunk, its input [B, L, D] and where the tokens stand."""
    trunk = {k: v for k, v in params.items() if k not in ("classes", "positions")}
    model = model_lib.merge(model_config, trunk)
    seq = mixers.SeqInfo.of_tokens(data["inputs"])
    seq = seq._replace(segment_ids=jnp.asarray(data["segment_ids"]))
    x = model.embed(data["inputs"])
    return model, x + params["positions"]["embedding"][None].astype(x.dtype), seq


def logits(
    model_config: model_lib.ModelConfig, params: Params, data: Mapping[str, Array]
) -> Array:
    """Class logits [B, 10] from the mean over a row's tokens."""
    model, x, seq = _embedded(model_config, params, data)
    if model.recurrence is None:
        x, _ = model.run_blocks(x, seq)
    else:
        x, _ = model.recurrence(model, x, seq)
    real = (data["segment_ids"] != 0)[..., None]
    mean = jnp.sum(jnp.where(real, x, 0), axis=1) / jnp.sum(real, axis=1)
    kernel: Any = params["classes"]["kernel"]
    return mean.astype(jnp.float32) @ kernel


def train(
    config: Mapping[str, Any], workdir: str | os.PathLike
) -> list[dict[str, float]]:
    """Train on fresh trees; write and return the rows of metrics.jsonl."""
    model_config = model_lib.ModelConfig.from_config(config.get("model", {}))
    task = config_lib.build(ListOpsConfig, config.get("task", {}), "task")
    if model_config.vocab_size < len(TOKENS):
        raise ConfigError(
            f"model.vocab_size={model_config.vocab_size}: ListOps has {len(TOKENS)} tokens."
        )

    def loss_and_accuracy(params, data):
        values = logits(model_config, params, data)
        losses = optax.softmax_cross_entropy_with_integer_labels(values, data["labels"])
        correct = jnp.argmax(values, axis=-1) == data["labels"]
        return jnp.mean(losses), jnp.mean(correct)

    return trainer.train(
        task,
        init(model_config, task.seed),
        loss_and_accuracy,
        lambda step, split: batch(task, model_config.seq_len, step, split),
        workdir,
        lambda params: _slot_figures(model_config, task, params),
        _kinds(model_config),
    )


def _kinds(model_config):
    """Whether each parameter is 'trained' or 'fixed', as random features are."""
    trunk = jax.tree.map(
        lambda group: "fixed" if group == "fixed" else "trained",
        model_lib.param_groups(model_config),
    )
    return trunk | {"positions": "trained", "classes": "trained"}


def _slot_figures(model_config, task, params):
    """How alike the slots of each layer's memory are; nothing without such memories."""
    if not slots.Slots.measures(model_config):
        return {}
    data = batch(task, model_config.seq_len, 0, "validation")
    sums = slots.figures(*_embedded(model_config, params, data))
    rows = float(sums.pop("rows"))
    return {f"degradation/{name}": float(x) / rows for name, x in sums.items()}
