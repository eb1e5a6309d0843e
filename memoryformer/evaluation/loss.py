"""Evaluation: the loss over every token of the validation text, per token and per byte.

    val/loss          = sum of nats / tokens
    val/perplexity    = exp(val/loss)
    val/bits_per_byte = sum of nats / ln 2 / bytes of the text

Rows are computed in groups of a fixed size and their sums added exactly in float64, so on one
device the result is the same to the bit whatever the batch size. Start at `Loss`.
"""

import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from memoryformer import data
from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.errors import DataError
from memoryformer.evaluation import base
from memoryformer.model import losses
from memoryformer.notation import Array, Params
from memoryformer.ops import collectives

# Tokens of a group of rows: XLA rounds by the shape of a product, so all have one shape.
GROUP_TOKENS = 2048


class Loss(base.Evaluator):
    """The evaluator of the loss."""

    name = "loss"

    def __call__(self, params: Params) -> dict[str, float]:
        """{'val/loss', ...}, see `evaluate`."""
        subject = self.subject
        return evaluate(
            make_eval_step(subject.model, subject.sharding),
            params,
            subject.batches,
            subject.token_bytes,
            subject.sharding,
            num_batches=subject.num_batches,
            stop=subject.stop,
        )


@functools.lru_cache(maxsize=4)  # runs of one model share it
def make_eval_step(
    model_config: model_lib.ModelConfig, sharding: sharding_lib.Sharding
) -> jax.stages.Wrapped:
    """Compile `(params, batch) -> nats of each row, [B]`."""
    specs = model_lib.partition_specs(model_config, sharding)

    def per_device(params, batch):
        params = sharding_lib.gather_params(params, specs)

        def row_nats(group):
            nats = losses.batch_nats(model_config, params, group)
            return jnp.sum(nats, axis=-1)

        rows = _by_groups(row_nats, batch)
        rows = collectives.psum(rows, collectives.SEQUENCE_AXIS)
        # Every process reads them all.
        for axis in reversed(collectives.ROW_AXES):
            rows = collectives.all_gather(rows, axis, 0)
        return rows

    in_specs = (specs, sharding.specs.batch_bl)
    return jax.jit(sharding.shard_map(per_device, in_specs, P(None)))


def _by_groups(function, batch):
    """Map `function`, of a batch of a fixed number of rows, over a batch of any number."""
    num_rows, length = batch["inputs"].shape
    size = max(1, GROUP_TOKENS // length)
    padding = -num_rows % size

    def split(rows):
        return jnp.pad(rows, ((0, padding), (0, 0))).reshape(-1, size, length)

    results = jax.lax.map(function, jax.tree.map(split, batch))
    return results.reshape(-1)[:num_rows]


def evaluate(
    eval_step: Callable[..., Array],
    params: Params,
    batches: data.EvalBatches,
    token_bytes: np.ndarray,
    sharding: sharding_lib.Sharding,
    *,
    num_batches: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Evaluate `params` on `num_batches` batches spread over the text (0: on all).

    `token_bytes` [V] are the bytes of text that a token counts for (`data.Dataset`).
    Returns {'val/loss', 'val/perplexity', 'val/bits_per_byte', 'val/tokens', 'val/bytes',
    'val/seconds'}; raises `base.Stopped` if `stop()` says so before a batch.
    """
    started = time.perf_counter()
    count = min(num_batches or len(batches), len(batches))
    nats = weight = num_bytes = 0.0
    pending = None  # one batch is computed while the next is read
    for i in range(count):
        if stop():
            raise base.Stopped
        batch = batches[i * len(batches) // count]
        weight += float(batch["weights"].sum(dtype=np.float64))
        num_bytes += float((token_bytes[batch["targets"]] * batch["weights"]).sum())
        ours = sharding.local_rows(len(batch["inputs"]))
        local = {name: rows[ours] for name, rows in batch.items()}
        rows = eval_step(params, sharding.put_batch(local))
        nats += 0.0 if pending is None else _total(pending)
        pending = rows
    nats += 0.0 if pending is None else _total(pending)
    if not weight or not num_bytes:
        raise DataError("validation: no text to evaluate on; give more documents.")
    loss = nats / weight
    return {
        "val/loss": loss,
        "val/perplexity": math.exp(min(loss, 700.0)),
        "val/bits_per_byte": nats / math.log(2) / num_bytes,
        "val/tokens": int(weight),
        "val/bytes": round(num_bytes),
        "val/seconds": time.perf_counter() - started,
    }


def _total(rows: Array) -> float:
    return math.fsum(np.asarray(rows, np.float64).tolist())
