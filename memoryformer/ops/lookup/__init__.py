"""The memory layer: y = sum_k s(z_k) * T_k[h(z_k)] + b (Eq. 11).

`lookup` sums one row of each table, weighted by its score:

    y[n]      = sum_k s[n, k] * T_k[h[n, k]]
    dT_k[c]   = sum_{n: h[n, k] = c} s[n, k] * dy[n]          (Eq. 12)
    ds[n, k]  = dy[n] . T_k[h[n, k]]

Implementations with the same signature live one to a file and are chosen by one argument:

    reference   gathers [.., K, F] and sums it: the definition, for tests
    xla         scans groups of tables; no array of shape [.., K, F], any platform
    onehot      the same sum as matrix products with one-hot codes: few bits, and TPU
    native      C++ on CPU, built on first use with the system compiler
    gpu         Pallas on an NVIDIA GPU of capability 9.0 or more
    auto        `onehot` on TPU up to 10 bits, `native` on CPU where it builds, `gpu` on a
                GPU that has it, else `xla`

Each takes scores as they are, whatever formula they come from. What is named and cannot run
is refused, never replaced (`why_not`). Start at `memory_layer`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from memoryformer.notation import AnyArray, Array, Codes, Float, Int, Scores
from memoryformer.ops import hashing, only_on
from memoryformer.ops.lookup import gpu as lookup_gpu
from memoryformer.ops.lookup import gpu_order
from memoryformer.ops.lookup import native as lookup_native
from memoryformer.ops.lookup import xla as lookup_xla

IMPLEMENTATIONS = ("auto", "reference", "xla", "onehot", "native", "gpu")
ONEHOT_MAX_BITS_TPU = 10  # a one-hot product costs 2^tau times a row read


def memory_layer(
    x: Float[Array, "*B D"],
    tables: Float[AnyArray, "K C F"],
    bias: Float[Array, " F"] | None = None,
    score: str = "softmax",
    temperature: float = 1.0,
    implementation: str = "auto",
    learned: hashing.Learned | None = None,
    rows_read: int = 1,
) -> Float[Array, "*B F"]:
    """Hash x, score it and sum the rows it selects: [.., K*tau] -> [.., F].

    Args:
      x: activations; chunk k of the last axis addresses table k.
      tables: [K, 2^tau, F].
      bias: [F], or None.
      score: a key of `hashing.SCORES`.
      temperature: t of the softmax scores.
      implementation: one of `IMPLEMENTATIONS`.
      learned: (beta, gamma) of the learned score.
      rows_read: of each table, 1 or 2; see `hashing`.

    Differentiable in x (through the scores), tables, bias and learned.
    """
    num_tables, num_buckets, _ = tables.shape
    code_bits = num_buckets.bit_length() - 1
    if num_buckets != 1 << code_bits or x.shape[-1] != num_tables * code_bits:
        raise ValueError(
            f"x has {x.shape[-1]} values, but {num_tables} tables of {num_buckets} rows "
            f"take {num_tables} codes of log2({num_buckets}) bits."
        )
    chunks = hashing.split_chunks(x, code_bits)
    read = hashing.addresses(chunks, score, temperature, learned, rows_read)
    y = lookup(tables, *read, implementation)
    y = y if rows_read == 1 else jnp.sum(y, axis=0)
    if bias is None:
        return y
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def lookup(
    tables: Float[AnyArray, "K C F"] | Int[AnyArray, "K C F"],
    codes: Codes,
    scores: Scores,
    implementation: str = "auto",
) -> Float[Array, "*B F"]:
    """Sum scored rows, y[.., :] = sum_k scores[.., k] * tables[k, codes[.., k], :].

    Args:
      tables: [K, C, F] of any float type; integers, which have no gradient, by XLA.
      codes: [.., K] integers in [0, C); what others read is not defined.
      scores: [.., K].
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      [.., F], accumulated in float32 (float64 for float64 tables).

    The gradients to tables and scores are exact and deterministic; codes have none. Raises
    ValueError where the implementation cannot run, at the latest when it is compiled.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r}: unknown; known: "
            f"{', '.join(IMPLEMENTATIONS)}."
        )
    if codes.shape != scores.shape or codes.shape[-1] != tables.shape[0]:
        raise ValueError(
            f"codes {codes.shape} and scores {scores.shape} must both be [.., K] for "
            f"tables [K, C, F] = {tables.shape}."
        )
    tables, codes, scores = map(jnp.asarray, (tables, codes, scores))
    dtype = jnp.promote_types(tables.dtype, jnp.float32)
    leading, num_tables = codes.shape[:-1], codes.shape[-1]
    codes = codes.reshape(-1, num_tables)  # [N, K]
    scores = scores.reshape(-1, num_tables).astype(dtype)
    functions: dict[str, Callable[[Array, Array, Array], Array]] = {
        "auto": _auto,
        "reference": _reference,
        "xla": lookup_xla.scan_tables,
        "onehot": lookup_xla.onehot_products,
        "native": _native,
        "gpu": _gpu,
    }
    y = functions[implementation](tables, codes, scores)
    return y.reshape(*leading, tables.shape[-1])


def _auto(tables, codes, scores):
    few_bits = tables.shape[1] <= 1 << ONEHOT_MAX_BITS_TPU
    on_tpu = lookup_xla.onehot_products if few_bits else lookup_xla.scan_tables
    on_cpu = lookup_xla.scan_tables
    # Built only where it will run; what is lowered for CPU elsewhere need not be fast.
    if jax.default_backend() == "cpu" and lookup_native.supports(tables, scores):
        on_cpu = lookup_native.native if lookup_native.available() else on_cpu
    # 13 times as fast as the scan, with gradients, on an H200 (docs/results.md).
    on_cuda = lookup_xla.scan_tables
    sortable = tables.shape[1] * codes.shape[0] < gpu_order.MAX_KEYS
    if sortable and not lookup_gpu.why_not(tables, scores):
        on_cuda = lookup_gpu.gpu
    return jax.lax.platform_dependent(
        tables,
        codes,
        scores,
        cpu=on_cpu,
        tpu=on_tpu,
        cuda=on_cuda,
        default=lookup_xla.scan_tables,
    )


def _native(tables, codes, scores):
    codes = only_on.platform(codes, "cpu", "lookup 'native'")
    return lookup_native.native(tables, codes, scores)


def _gpu(tables, codes, scores):
    if reason := lookup_gpu.why_not(tables, scores):
        raise ValueError(f"lookup 'gpu' cannot run: {reason}.")
    codes = only_on.platform(codes, "gpu", "lookup 'gpu'")
    # The other branch is for a machine without a GPU, whose kernels lower for CUDA only.
    return jax.lax.platform_dependent(
        tables, codes, scores, cuda=lookup_gpu.gpu, default=lookup_xla.scan_tables
    )


def why_not(
    implementation: str, dtype: DTypeLike, platform: str, capability: float | None
) -> str:
    """Say why an implementation cannot run for tables of `dtype`; '' if it can.

    `platform` is jax's name (cpu, gpu, tpu), `capability` a GPU's, None where not known.
    """
    tables = jax.ShapeDtypeStruct((1, 2, 1), dtype)
    scores = jax.ShapeDtypeStruct((1, 1), jnp.promote_types(dtype, jnp.float32))
    wanted = {"native": "cpu", "gpu": "gpu"}.get(implementation, platform)
    if platform != wanted:
        return f"the platform is {platform}, not {wanted}"
    if implementation == "native":
        if not lookup_native.supports(tables, scores):
            return f"it takes float32 or bfloat16, not {tables.dtype}"
        return lookup_native.why_not_built()
    if implementation == "gpu":
        return lookup_gpu.why_not(tables, scores, capability)
    return ""


def _reference(tables, codes, scores):
    rows = tables[jnp.arange(tables.shape[0]), codes]  # [N, K, F]
    return jnp.einsum("nk,nkf->nf", scores, rows.astype(scores.dtype))
