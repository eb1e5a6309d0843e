"""The lookup on an NVIDIA GPU of compute capability 9.0 or more, in Pallas Mosaic GPU.

Forward: a block of 128 threads owns a few tokens and a tile of columns, keeps their float32
sums in registers and reads one row at a time. Backward: the tokens of each table are sorted
by code (`gpu_order`); a block owns one row T_k[c] and a run of at most RUN of its tokens,
reads each dy once and makes both gradients from it. Runs of one row are then added in order.
No atomics: every sum has one order, and the result is the same bits each time.

A model in bfloat16 rounds y, so that its dy is float32 that holds bfloat16 values. Where
every value does, the backward kernel reads half the bytes, and its result is the same.

The kernels (`gpu_kernels`) also run on a CPU, interpreted and slow (`interpret=True`): tests
do. Start at `gpu`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from memoryformer.notation import Array, ArrayOrShape, Codes, Float, Scores, Tables
from memoryformer.ops.lookup import gpu_kernels, gpu_order
from memoryformer.ops.lookup.gpu_kernels import THREADS
from memoryformer.ops.lookup.xla import largest_divisor

MAX_TILE = 1536  # columns of one block, 12 a thread: dT and ds are summed once a tile
TOKENS = 16  # of one forward block: as many rows are in flight
SUMS = 128  # float32 registers of a thread that hold a forward block's sums
UNROLL = 2  # tokens of one step of the backward loop
BLOCKS = 528  # fill the GPU: 4 blocks on each of an H200's 132 multiprocessors
MIN_CAPABILITY = 9.0  # Mosaic GPU's own
DTYPES = (jnp.float32, jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gpu(
    tables: Tables, codes: Codes, scores: Scores, interpret: bool = False
) -> Float[Array, "N F"]:
    """Sum scored rows on a GPU: float32 or bfloat16 [K,C,F], [N,K], [N,K] -> [N,F].

    Codes outside [0, C) are clamped. Sums are in float32 and in the order of k, but for
    few tokens: then parts of the tables are summed apart and added in order. A width F
    that is no multiple of 128 costs a padded copy of the tables.
    Raises TypeError for other types.
    """
    return forward(tables, codes, scores, interpret=interpret)


def why_not(
    tables: Float[ArrayOrShape, "K C F"],
    scores: Float[ArrayOrShape, "*B K"],
    capability: float | None = None,
) -> str:
    """Say why `gpu` cannot serve this; '' if it can, on a GPU of capability 9.0.

    `capability` is that of the GPU to compile for; None asks the one that is here, if any.
    """
    if not _supports(tables, scores):
        return f"it takes no {tables.dtype} tables with {scores.dtype} scores"
    if capability is None and jax.default_backend() == "gpu":
        capability = own_capability()
    if capability is not None and capability < MIN_CAPABILITY:
        return f"the GPU's compute capability is {capability}, below {MIN_CAPABILITY}"
    return ""


def own_capability() -> float:
    """Return the compute capability of this process's first GPU; 0 if it is not NVIDIA's."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    number = capability.replace(".", "", 1)
    return float(capability) if number.isdecimal() else 0.0


def forward(
    tables: Tables,
    codes: Codes,
    scores: Scores,
    *,
    tokens: int = TOKENS,
    max_tile: int = MAX_TILE,
    interpret: bool = False,
) -> Float[Array, "N F"]:
    """`gpu` without a gradient; a block has at most `tokens` tokens, `max_tile` columns."""
    _check(tables, scores)
    num_tables, num_buckets, features = tables.shape
    num_tokens = codes.shape[0]
    tables, tile = _tiled(tables, max_tile)
    fitting = _power_of_two_below(SUMS * THREADS // tile)
    tokens = min(tokens, fitting, _power_of_two_above(num_tokens))
    codes, scores = gpu_order.by_table(codes, num_buckets), scores.T
    codes, scores = (_pad(a, 1, tokens) for a in (codes, scores))
    grid = (tables.shape[2] // tile, codes.shape[1] // tokens)
    splits = largest_divisor(num_tables, BLOCKS // max(1, math.prod(grid)))
    y = gpu_kernels.launch(
        gpu_kernels.forward,
        {"features": grid[0], "splits": splits, "tokens": grid[1]},
        jax.ShapeDtypeStruct((splits, codes.shape[1], tables.shape[2]), jnp.float32),
        tile,
        interpret,
        tokens=tokens,
        num_tables=num_tables // splits,
    )(tables, codes, scores)
    y = y[0] if splits == 1 else jnp.sum(y, axis=0)
    return y[:num_tokens, :features]


def backward(
    tables: Tables,
    codes: Codes,
    scores: Scores,
    dy: Float[Array, "N F"],
    *,
    run: int = gpu_order.RUN,
    unroll: int = UNROLL,
    max_tile: int = MAX_TILE,
    interpret: bool = False,
) -> tuple[Tables, Scores]:
    """Both gradients, dT in the tables' type and ds in float32; dy of any float type.

    A block has at most `run` tokens and `max_tile` columns, and reads `unroll` tokens at
    a time.
    """
    _check(tables, scores)
    num_tables, num_buckets, features = tables.shape
    num_tokens = codes.shape[0]
    rows, tile = _tiled(tables, max_tile)
    dy = _pad(dy.astype(jnp.float32), 1, rows.shape[2])
    if tables.dtype == jnp.bfloat16:
        # Not `astype` and back, which XLA may leave out. A NaN is not equal to itself.
        exact = jnp.all(jax.lax.reduce_precision(dy, 8, 7) == dy)
        narrow = dy.astype(jnp.bfloat16)
    else:
        narrow, exact = dy, jnp.zeros((), bool)
    order = gpu_order.sort_by_code(codes, num_buckets, run)
    grid = {"features": rows.shape[2] // tile, "tables": num_tables}
    partial, dscores = gpu_kernels.launch(
        gpu_kernels.backward,
        grid | {"runs": order.rows.shape[1]},
        [
            jax.ShapeDtypeStruct((*order.rows.shape, rows.shape[2]), jnp.float32),
            jax.ShapeDtypeStruct(
                (grid["features"], num_tables, num_tokens), jnp.float32
            ),
        ],
        tile,
        interpret,
        unroll=unroll,
    )(rows, scores.T, dy, narrow, exact.astype(jnp.int32)[None], *order[:4])
    dtables = gpu_kernels.launch(
        gpu_kernels.sum_runs,
        grid | {"rows": num_buckets},
        jax.ShapeDtypeStruct(rows.shape, tables.dtype),
        tile,
        interpret,
    )(partial, order.first_runs)
    return dtables[:, :, :features], jnp.sum(dscores, axis=0).T


def _gpu_fwd(tables, codes, scores, interpret):
    return gpu(tables, codes, scores, interpret), (tables, codes, scores)


def _gpu_bwd(interpret, residuals, dy):
    tables, codes, scores = residuals
    dtables, dscores = backward(tables, codes, scores, dy, interpret=interpret)
    return dtables, None, dscores


gpu.defvjp(_gpu_fwd, _gpu_bwd)


def _check(tables, scores):
    if not _supports(tables, scores):
        raise TypeError(
            "implementation='gpu' takes float32 or bfloat16 tables and float32 scores, "
            f"not {tables.dtype} and {scores.dtype}: use 'xla'."
        )


def _supports(tables, scores):
    return tables.dtype in DTYPES and scores.dtype == jnp.float32


def _tiled(tables, max_tile):
    """Tables whose width the tiles divide, and the tile: a multiple of 128 to max_tile.

    Wide reads come first, then wide tiles: 768 of 2304 columns, 1024 of 3072.
    """
    tables = _pad(tables, 2, THREADS)
    width = tables.shape[2]
    tiles = range(THREADS, min(width, max_tile) + 1, THREADS)
    fitting = (tile for tile in tiles if width % tile == 0)
    return tables, max(fitting, key=lambda tile: (gpu_kernels.num_lanes(tile), tile))


def _pad(array, axis, multiple):
    extra = [(0, 0)] * array.ndim
    extra[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, extra)


def _power_of_two_below(number):
    return 1 << (number.bit_length() - 1)


def _power_of_two_above(number):
    return 1 << max(0, number - 1).bit_length()
