"""What evaluators share: what they are made of, and the loop over a few batches.

Start at `Evaluator`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from memoryformer import data
from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.notation import Array, Params

FEW = 4  # batches of validation text, to look at tables and slots with


class Stopped(Exception):
    """An evaluation was asked to stop between two batches: its values are not known."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, where its parameters lie, and the text to evaluate them on.

    token_bytes: [V], bytes of text that a token counts for (`data.Dataset`).
    every: steps from one evaluation to the next; 0: only after the last.
    num_batches: of the loss, spread over the text; 0: all of it.
    stop: asked before every batch of the loss; true raises `Stopped`.
    """

    model: model_lib.ModelConfig
    sharding: sharding_lib.Sharding
    batches: data.EvalBatches
    token_bytes: np.ndarray
    every: int = 0
    num_batches: int = 0
    stop: Callable[[], bool] = lambda: False

    def few(self) -> list[Mapping[str, Any]]:
        """The first batches."""
        return [self.batches[i] for i in range(min(len(self.batches), FEW))]


class Evaluator:
    """A figure of the parameters, by the names under which metrics.jsonl has it."""

    name: ClassVar[str]

    def __init__(self, subject: Subject):
        self.subject, self.every = subject, subject.every

    @staticmethod
    def measures(model_config: model_lib.ModelConfig) -> bool:
        """Whether a model has what this looks at."""
        return True

    def __call__(self, params: Params) -> dict[str, float]:
        """Measure; raises `Stopped`, or `DataError` where there is no text."""
        raise NotImplementedError


def is_due(evaluator: Evaluator, step: int, num_steps: int) -> bool:
    """Whether to measure after `step` of `num_steps` steps."""
    return step == num_steps or bool(evaluator.every and step % evaluator.every == 0)


def sums(
    step: Callable[..., Mapping[str, Array]],
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    sharding: sharding_lib.Sharding,
) -> dict[str, np.ndarray]:
    """Add up what `step(params, batch)` returns by name; {} without batches.

    On a mesh, `params` lie where their specs say; every process is given all rows of a batch.
    """
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        rows = sharding.local_rows(len(batch["inputs"]))
        inputs = {k: batch[k][rows] for k in ("inputs", "positions", "segment_ids")}
        for name, value in step(params, sharding.put_batch(inputs)).items():
            array = np.asarray(value)
            wide = np.int64 if array.dtype.kind == "i" else np.float64
            totals[name] = totals.get(name, 0) + array.astype(wide)
    return totals
