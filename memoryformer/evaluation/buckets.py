"""How evenly a model's tokens fall into the buckets of its tables (the paper's Fig. 4).

    counts   n[k, c], tokens that read row c of table k            [K, C]
    used     share of rows read at least once
    entropy  -sum_c q_c log q_c / log C with q = n / sum n         1: uniform
    load     max_c n[k, c] / mean_c n[k, c]                        1: uniform
    bits     how often each bit of a code is set, from the counts  [K, tau]

Start at `summary`; `collect` counts over batches, the rest are pure functions.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from memoryformer import errors
from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.evaluation import base
from memoryformer.model import codes as codes_lib
from memoryformer.model import mixers, parts
from memoryformer.notation import Array, Codes, Float, Int, Params
from memoryformer.ops import collectives


class Buckets(base.Evaluator):
    """The evaluator of how evenly tables are read, over the first batches."""

    name = "buckets"

    @staticmethod
    def measures(model_config: model_lib.ModelConfig) -> bool:
        """Whether there are tables."""
        return parts.has_tables(model_config)

    def __call__(self, params: Params) -> dict[str, float]:
        """{'utilisation/LAYER/used_fraction', ...}, see `summary`."""
        subject = self.subject
        return summary(collect(subject.model, params, subject.few(), subject.sharding))


@dataclasses.dataclass(frozen=True)
class Utilisation:
    """How evenly the rows of each of K tables are read; every field is [K]."""

    used_fraction: Float[np.ndarray, " K"]
    entropy: Float[np.ndarray, " K"]  # as a fraction of log C
    max_over_mean: Float[np.ndarray, " K"]


@dataclasses.dataclass(frozen=True)
class BitRates:
    """How often each bit is set and flips, [K, tau], the high bit (first value) first."""

    set_rate: Float[np.ndarray, "K tau"]
    flip_rate: Float[np.ndarray, "K tau"]


def codes(
    config: model_lib.ModelConfig,
    params: Params,
    batch: dict[str, Array],
) -> dict[str, Codes]:
    """Return the hash codes of every memory layer, by path: {path: int32 [B, L, K]}."""
    seq = mixers.SeqInfo(batch["positions"], batch["segment_ids"])
    model = model_lib.merge(config, params)
    return codes_lib.of_tokens(model, batch["inputs"], seq)


def bucket_counts(
    codes: Int[Array, "*B K"],
    num_buckets: int,
    keep: Array | None = None,
) -> Int[Array, "K C"]:
    """Count how often each row of each table is read.

    `codes` holds values in [0, num_buckets); a code outside is not counted. `keep` [*B]
    is true (or 1) where a token counts; all of them if left out. Can be traced by jit.
    """
    num_tables = codes.shape[-1]
    flat = codes.reshape(-1, num_tables)
    ones = jnp.ones(flat.shape, jnp.int32)
    if keep is not None:
        ones = ones * keep.reshape(-1, 1).astype(jnp.int32)
    # Negative codes would wrap round to the last rows: send them past the end instead.
    flat = jnp.where(flat < 0, num_buckets, flat)
    tables = jnp.broadcast_to(jnp.arange(num_tables), flat.shape)
    zeros = jnp.zeros((num_tables, num_buckets), jnp.int32)
    return zeros.at[tables, flat].add(ones, mode="drop")


def utilisation(counts: Int[np.ndarray, "K C"]) -> Utilisation:
    """Used fraction, entropy and load of each table.

    With fewer tokens than rows none of them can reach its uniform value. Raises
    `DataError` if no token was counted.
    """
    share = _shares(counts)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy = -np.sum(share * logs, axis=-1) / np.log(share.shape[-1])
    return Utilisation(
        used_fraction=np.mean(share > 0, axis=-1),
        entropy=entropy,
        max_over_mean=np.max(share, axis=-1) * share.shape[-1],
    )


def bit_rates(counts: Int[np.ndarray, "K C"]) -> BitRates:
    """How often each bit is set, p, and flips, 2 p (1 - p).

    The flip rate is the chance that the bit differs between two tokens drawn
    independently: 1/2 for a balanced bit, 0 for a bit that never changes and so halves
    the rows its table can use. Neighbouring tokens are not compared. Raises `DataError`
    if no token was counted.
    """
    share = _shares(counts)
    code_bits = (share.shape[-1] - 1).bit_length()
    codes = np.arange(share.shape[-1])
    bits = (codes[:, None] >> np.arange(code_bits)[::-1]) & 1  # [C, tau]
    rate = share @ bits
    return BitRates(set_rate=rate, flip_rate=2 * rate * (1 - rate))


def summary(counts_by_layer: Mapping[str, Int[np.ndarray, "K C"]]) -> dict[str, float]:
    """Metrics of every layer: 'utilisation/blocks.0.mixer.qkv/used_fraction' and so on.

    `used_fraction`, `entropy` and `flip_rate` are means over the layer's tables (and
    bits), `max_over_mean` is that of its worst table.
    """
    metrics: dict[str, float] = {}
    for name, counts in counts_by_layer.items():
        use = utilisation(counts)
        values = {
            "used_fraction": np.mean(use.used_fraction),
            "entropy": np.mean(use.entropy),
            "max_over_mean": np.max(use.max_over_mean),
            "flip_rate": np.mean(bit_rates(counts).flip_rate),
        }
        metrics |= {f"utilisation/{name}/{key}": float(v) for key, v in values.items()}
    return metrics


def collect(
    model_config: model_lib.ModelConfig,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    sharding: sharding_lib.Sharding | None = None,
) -> dict[str, Int[np.ndarray, "K C"]]:
    """Bucket counts of every memory layer, summed over `batches`, padding left out.

    See `base.sums`. Returns layer name -> [K, C]. Raises `ConfigError` for a model without
    tables and `DataError` if there is no batch.
    """
    sharding = sharding or sharding_lib.make("single")
    step = make_count_step(model_config, sharding)
    totals = base.sums(step, params, batches, sharding)
    if not totals:
        raise errors.DataError("utilisation: no batch of data to count codes on.")
    return totals


@functools.lru_cache(maxsize=4)  # runs of one model share it
def make_count_step(
    model_config: model_lib.ModelConfig, sharding: sharding_lib.Sharding
) -> Callable[..., dict[str, Int[Array, "K C"]]]:
    """Compile `(params, batch) -> counts of each layer`, the same on every device."""
    if not parts.has_tables(model_config):
        raise errors.ConfigError(
            f"model.projection={model_config.projection!r}: has no tables to look at; "
            "only 'memory' has."
        )
    specs = model_lib.partition_specs(model_config, sharding)

    def per_device(params, batch):
        params = sharding_lib.gather_params(params, specs)
        keep = batch["segment_ids"] > 0
        counts = {}
        for name, read in codes(model_config, params, batch).items():
            ours = bucket_counts(read, _num_buckets(params, name), keep)
            ours = collectives.psum(ours, collectives.TOKEN_AXES)  # [K / n, C]
            counts[name] = collectives.all_gather(ours, collectives.MODEL_AXIS, 0)
        return counts

    in_specs = (specs, sharding.specs.batch_bl)
    return jax.jit(sharding.shard_map(per_device, in_specs, P()))


def _num_buckets(params: Any, name: str) -> int:
    for key in name.split("."):
        params = params[key]
    return params["tables"].shape[1]


def _shares(counts: Int[np.ndarray, "K C"]) -> Float[np.ndarray, "K C"]:
    counts = np.asarray(counts, np.float64)
    totals = counts.sum(axis=-1, keepdims=True)
    if not np.all(totals > 0):
        raise errors.DataError("utilisation: a table was read by no token.")
    return counts / totals
