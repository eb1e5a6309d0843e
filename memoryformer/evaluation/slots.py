"""The memory degradation meter: do the slots of a memory fall together?

    cosine          mean over pairs of slots of r_i . r_j / |r_i| |r_j|
    effective rank  exp(entropy of sigma / sum(sigma)), sigma the singular values of the slots

m slots of width D that are all alike have cosine 1 and effective rank 1, independent ones
about 0 and at most min(m, D). "On Difficulties of Attention Factorization through Shared
Memory" (Yorsh et al. 2024) finds that Luna's memory collapses in training, and that a filter
before the memory (`conv_luna`) repairs it. What a collapse is for MemoryFormer's tables is
measured by `buckets.utilisation`.

Start at `collect`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from memoryformer import errors
from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.evaluation import base
from memoryformer.model import mixers
from memoryformer.notation import Activations, Array, Float, Params
from memoryformer.ops import collectives


class Slots(base.Evaluator):
    """The evaluator of how alike a memory's slots are, over the first batches."""

    name = "slots"

    @staticmethod
    def measures(model_config: model_lib.ModelConfig) -> bool:
        """Whether there are memories that `collect` can read."""
        if model_config.recurrence != "none":
            return True
        return mixers.MIXERS[model_config.mixer].HAS_SLOTS

    def __call__(self, params: Params) -> dict[str, float]:
        """{'degradation/MEMORY/cosine', ...}, see `collect`."""
        subject = self.subject
        return collect(subject.model, params, subject.few(), subject.sharding)


def cosine(rows: Float[Array, "*B m D"]) -> Float[Array, "*B"]:
    """Mean cosine of two different rows; 0 for a single row."""
    m = rows.shape[-2]
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    unit = rows / jnp.maximum(norm, 1e-30)
    total = jnp.sum(jnp.sum(unit, axis=-2) ** 2, axis=-1)
    return (total - jnp.sum(unit**2, axis=(-2, -1))) / max(m * (m - 1), 1)


def effective_rank(rows: Float[Array, "*B m D"]) -> Float[Array, "*B"]:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
    values = jnp.linalg.svd(rows, compute_uv=False)
    total = jnp.sum(values, axis=-1, keepdims=True)
    share = values / jnp.maximum(total, 1e-30)
    logs = jnp.log(jnp.where(share > 0, share, 1))
    return jnp.exp(-jnp.sum(share * logs, axis=-1))


@functools.lru_cache(maxsize=4)  # runs of one model share it
def make_step(
    model_config: model_lib.ModelConfig, sharding: sharding_lib.Sharding
) -> Callable[..., dict[str, Array]]:
    """Compile `(params, batch) -> sums over rows` of both figures, and the rows' number.

    Raises `ConfigError` for other mixers.
    """
    if not Slots.measures(model_config):
        able = [name for name, mixer in mixers.MIXERS.items() if mixer.HAS_SLOTS]
        raise errors.ConfigError(
            f"model.mixer={model_config.mixer!r}: has no memory to measure; "
            f"{' and '.join(able)} and recurrences have."
        )
    specs = model_lib.partition_specs(model_config, sharding)

    def per_device(params, batch):
        model = model_lib.merge(model_config, sharding_lib.gather_params(params, specs))
        seq = mixers.SeqInfo(batch["positions"], batch["segment_ids"])
        sums = figures(model, model.embedded(batch["inputs"], seq), seq)
        tokens = collectives.TOKEN_AXES
        return jax.tree.map(lambda x: collectives.psum(x, tokens), sums)

    in_specs = (specs, sharding.specs.batch_bl)
    return jax.jit(sharding.shard_map(per_device, in_specs, P()))


def figures(
    model: model_lib.Transformer, x: Activations, seq: mixers.SeqInfo
) -> dict[str, Array]:
    """Sums of both figures over this device's rows x [B, L, D], and the rows' number.

    A row's memory is the one after its last token; two-sided, what its last document packed.
    """
    real, memories = _memories(model, x, seq)
    real &= _holds_the_end()
    sums = {"rows": jnp.sum(real)}
    for name, rows in memories.items():
        rows = collectives.all_gather(rows, collectives.MODEL_AXIS, -1)  # [B, m, D]
        for figure in (cosine, effective_rank):
            values = jnp.where(real, figure(rows), 0)
            sums[f"{name}/{figure.__name__}"] = jnp.sum(values)
    return sums


def _memories(model, x, seq):
    """Which rows hold a memory [B], and each memory by name, [B, m, D / n]."""
    if model.recurrence is not None:
        rows = model.recurrence.memory_after(model, x, seq)
        real = jnp.ones(x.shape[:1], bool)
        return real, {"recurrence": rows.astype(jnp.float32)}
    if model.blocks[0].mixer.causal:
        _, state = model.run_blocks(x, seq, model.init_blocks(*x.shape[:2]))
        slots = [jnp.moveaxis(block.memory.sums.mT, 1, 2) for block in state]
        real = state[0].memory.segment_ids != 0
    else:
        slots, real, memory = [], jnp.any(seq.segment_ids != 0, axis=1), None
        for block in model.blocks:
            slots.append(block.mixer.packed(block.norm1(x), seq, memory))
            x, memory = block(x, seq, memory)
    memories = {
        f"blocks.{i}.mixer": rows.reshape(*rows.shape[:2], -1)  # of [B, m, H, E]
        for i, rows in enumerate(slots)
    }
    return real, memories


def _holds_the_end():
    """Whether this device holds the last tokens of its rows."""
    axis = collectives.SEQUENCE_AXIS
    return collectives.axis_index(axis) == collectives.axis_size(axis) - 1


def collect(
    model_config: model_lib.ModelConfig,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    sharding: sharding_lib.Sharding | None = None,
) -> dict[str, float]:
    """Metrics of every memory: 'degradation/blocks.0.mixer/cosine' and '.../effective_rank';
    a memory carried over chunks is 'degradation/recurrence/..'.

    Means over the rows of `batches`, see `base.sums`.
    """
    sharding = sharding or sharding_lib.make("single")
    step = make_step(model_config, sharding)
    totals = base.sums(step, params, batches, sharding)
    rows = totals.pop("rows", 0)
    if not rows:
        raise errors.DataError("no row to measure a memory on: batches is empty.")
    return {
        f"degradation/{name}": float(value / rows) for name, value in totals.items()
    }
