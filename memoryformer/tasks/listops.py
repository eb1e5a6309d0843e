"""ListOps, generated here: nested operations on digits, the answer one of ten classes.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]   ->   5

After Nangia and Bowman (2018) and the long sequences of Long Range Arena (Tay et al. 2021),
re-derived: trees are drawn until one has `min_len` to `max_len` tokens. Every batch is fresh
and a function of (seed, step), so there is no training set to fit by heart.

    python -m memoryformer.tasks listops --config=configs/listops.py:luna --workdir=runs/listops

Start at `batch`; the model is `trunk.Classifier`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.tasks import base, trunk

OPERATIONS: dict[str, Callable[[list[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(np.median(values)),
    "SM": lambda values: sum(values) % 10,
}
TOKENS = ("<pad>", *map(str, range(10)), *(f"[{name}" for name in OPERATIONS), "]")


@dataclasses.dataclass(frozen=True)
class ListOpsConfig(base.TrainerConfig):
    """Size of the trees, and of the training."""

    min_len: int = field("numbers", 10, doc="Fewest tokens of a row.")
    max_depth: int = field("numbers", 10, doc="Most operations around a digit.")
    max_args: int = field("numbers", 10, doc="Most arguments of an operation.")
    value_fraction: float = field(
        "numbers", 0.75, doc="Chance that an argument is a digit."
    )

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
    rng = base.rng(config.seed, step, split)
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


class ListOps(trunk.Classifier):
    """The value of an expression, one of ten digits."""

    Options = ListOpsConfig
    num_classes = 10

    @property
    def vocab_size(self) -> int:
        """Padding, digits, operations and the closing bracket."""
        return len(TOKENS)

    def batch(self, step: int, split: str) -> dict[str, np.ndarray]:
        """See `batch`."""
        return batch(self.options, self.model.seq_len, step, split)
