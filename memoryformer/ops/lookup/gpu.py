"""The lookup on an NVIDIA GPU of compute capability 9.0 or more, in Pallas Mosaic GPU.

    y[n]      = sum_k s[n, k] * T_k[h[n, k]]
    dT_k[c]   = sum_{n: h[n, k] = c} s[n, k] * dy[n]          (Eq. 12)
    ds[n, k]  = dy[n] . T_k[h[n, k]]

Forward: a block of 128 threads owns a few tokens and a tile of columns, keeps their float32
sums in registers and reads one row at a time. Backward: the tokens of each table are sorted
by code; a block owns one row T_k[c] and a run of at most RUN of its tokens, reads each dy
once and makes both gradients from it. Runs of one row are then added in order. No atomics:
every sum has one order, and the result is the same bits each time.

A model in bfloat16 rounds y, so that its dy is float32 that holds bfloat16 values. Where
every value does, the backward kernel reads half the bytes, and its result is the same.

The kernels' bodies also run on a CPU, interpreted and slow (`interpret=True`): tests do.
Start at `gpu`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memoryformer.notation import Array, Codes, Float, Int, Scores, Tables

THREADS = 128  # threads of a warpgroup, Mosaic GPU's unit of execution
MAX_TILE = 1536  # columns of one block, 12 a thread: dT and ds are summed once a tile
MAX_LANES = 8  # neighbours that a thread reads at once: 16 bytes of bfloat16
TOKENS = 16  # of one forward block: as many rows are in flight
SUMS = 128  # float32 registers of a thread that hold a forward block's sums
UNROLL = 2  # tokens of one step of the backward loop
RUN = 256  # tokens of one backward block: bounds what a popular row costs
BLOCKS = 528  # fill the GPU: 4 blocks on each of an H200's 132 multiprocessors
MAX_KEYS = 1 << 31  # of a sort: code * N + n is an int32
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


def why_not(tables: Tables, scores: Scores, capability: float | None = None) -> str:
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
    codes, scores = _by_table(codes, num_buckets), scores.T
    codes, scores = (_pad(a, 1, tokens) for a in (codes, scores))
    grid = (tables.shape[2] // tile, codes.shape[1] // tokens)
    splits = _divisor(num_tables, BLOCKS // max(1, math.prod(grid)))
    y = _launch(
        _forward_body,
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
    run: int = RUN,
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
    order = sort_by_code(codes, num_buckets, run)
    grid = {"features": rows.shape[2] // tile, "tables": num_tables}
    partial, dscores = _launch(
        _backward_body,
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
    dtables = _launch(
        _sum_runs_body,
        grid | {"rows": num_buckets},
        jax.ShapeDtypeStruct(rows.shape, tables.dtype),
        tile,
        interpret,
    )(partial, order.first_runs)
    return dtables[:, :, :features], jnp.sum(dscores, axis=0).T


class Order(NamedTuple):
    """The tokens of each table sorted by code, and cut into runs of one code each."""

    tokens: Int[Array, "K N"]  # token indices; by code, and within a code by index
    rows: Int[Array, "K R"]  # the code of each run; every code has at least one run
    starts: Int[Array, "K R"]  # a run is tokens[starts:ends]; empty past the last run
    ends: Int[Array, "K R"]
    first_runs: Int[Array, "K C+1"]  # runs of code c: first_runs[c] : first_runs[c + 1]


def sort_by_code(codes: Codes, num_buckets: int, run: int = RUN) -> Order:
    """Sort [N, K] codes by table and cut them into R = C + N // run runs a table."""
    num_tokens = codes.shape[0]
    if num_buckets * num_tokens >= MAX_KEYS:
        raise ValueError(
            f"{num_tokens} tokens of {num_buckets} codes: code * N + n does not fit 31 "
            "bits; look up fewer tokens at a time."
        )
    codes = _by_table(codes, num_buckets)
    # One key holds code and token: all differ, so no sort can order them in two ways.
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    keys = jnp.sort(codes * num_tokens + index[None], axis=1, stable=False)
    edges = jnp.arange(num_buckets + 1, dtype=jnp.int32) * num_tokens
    edges = _search(keys, edges, "left")
    counts = edges[:, 1:] - edges[:, :-1]
    runs = jnp.maximum(1, -(-counts // run))  # an unread row needs its zeros
    first_runs = jnp.pad(jnp.cumsum(runs, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    number = jnp.arange(num_buckets + num_tokens // run, dtype=jnp.int32)

    rows = _search(first_runs, number, "right") - 1  # num_buckets past the last run
    used = rows < num_buckets
    rows = jnp.minimum(rows, num_buckets - 1)

    def at_row(a):
        return jnp.take_along_axis(a, rows, axis=1)

    starts = at_row(edges) + run * (number[None] - at_row(first_runs))
    ends = jnp.minimum(starts + run, at_row(edges[:, 1:]))
    ends = jnp.where(used, ends, starts)
    return Order(keys % num_tokens, rows, starts, ends, first_runs)


def _search(rows, values, side):
    """Where each value goes in each of the sorted rows: [K, A], [B] -> int32 [K, B]."""

    def one_row(row):  # unrolled: one kernel, where a loop is many
        return jnp.searchsorted(row, values, side=side, method="scan_unrolled")

    return jax.vmap(one_row)(rows).astype(jnp.int32)


def _gpu_fwd(tables, codes, scores, interpret):
    return gpu(tables, codes, scores, interpret), (tables, codes, scores)


def _gpu_bwd(interpret, residuals, dy):
    dtables, dscores = backward(*residuals, dy, interpret=interpret)
    return dtables, None, dscores


gpu.defvjp(_gpu_fwd, _gpu_bwd)


# --- Kernels: what one block of 128 threads does. -------------------------------------


class Lanes(NamedTuple):
    """A tile of columns over the threads of a block: groups of neighbours, dealt in turn.

    A group is as large as the tile allows, up to 16 bytes of bfloat16, where the default
    would be 8. Interpreted arrays have no layout.
    """

    tile: int
    interpret: bool

    def columns(self) -> pl.Slice:
        """This block's columns."""
        return pl.ds(jax.lax.axis_index("features") * self.tile, self.tile)

    def zeros(self) -> Array:
        """Float32 [tile]."""
        return self._place(jnp.zeros((self.tile,), jnp.float32))

    def load(self, ref, *index) -> Array:
        """This block's columns of one row: [tile]."""
        return self._place(ref[*index, self.columns()])

    def _place(self, array):
        if self.interpret:
            return array
        layout = plgpu.Layout.WG_STRIDED((self.tile,), _lanes(self.tile))
        return plgpu.layout_cast(array, layout)


def _forward_body(tables, codes, scores, y, *, lanes, tokens, num_tables):
    """Rows of `tokens` tokens: [K,C,F], [K,N], [K,N] -> [splits, N, F]."""
    split = jax.lax.axis_index("splits")
    first = jax.lax.axis_index("tokens") * tokens

    def add_table(i, sums):
        k = split * num_tables + i
        # All reads before the first use of one, so that they wait together.
        rows = [lanes.load(tables, k, codes[k, first + n]) for n in range(tokens)]
        return tuple(
            s + scores[k, first + n] * row.astype(jnp.float32)
            for n, (s, row) in enumerate(zip(sums, rows, strict=True))
        )

    sums = jax.lax.fori_loop(0, num_tables, add_table, (lanes.zeros(),) * tokens)
    for n in range(tokens):
        y[split, first + n, lanes.columns()] = sums[n]


def _backward_body(*refs, lanes, unroll):
    """One run: its part of dT_k[c] to drows [K,R,F], ds of its tokens [F/tile,K,N]."""
    tables, scores, dy, narrow, exact, tokens, rows, starts, ends, drows, dscores = refs
    f, k, r = (jax.lax.axis_index(name) for name in ("features", "tables", "runs"))
    row = lanes.load(tables, k, rows[k, r]).astype(jnp.float32)
    start, end = starts[k, r], ends[k, r]
    steps = (end - start) // unroll

    def add_tokens(dy, first, number, drow):
        n = [tokens[k, first + i] for i in range(number)]
        each = [lanes.load(dy, i).astype(jnp.float32) for i in n]
        for i, dy_n in zip(n, each, strict=True):
            drow += scores[k, i] * dy_n
            dscores[f, k, i] = jnp.sum(row * dy_n)
        return drow

    def add_run(dy):
        def add_step(i, drow):
            return add_tokens(dy, start + i * unroll, unroll, drow)

        drow = jax.lax.fori_loop(0, steps, add_step, lanes.zeros())
        rest = start + steps * unroll
        return jax.lax.fori_loop(rest, end, lambda i, a: add_tokens(dy, i, 1, a), drow)

    if narrow.dtype == dy.dtype:
        drow = add_run(dy)
    else:
        drow = jax.lax.cond(exact[0] != 0, lambda: add_run(narrow), lambda: add_run(dy))
    drows[k, r, lanes.columns()] = drow


def _sum_runs_body(drows, first_runs, dtables, *, lanes):
    """Add the runs of one row in order: [K,R,F], [K,C+1] -> [K,C,F]."""
    k, c = jax.lax.axis_index("tables"), jax.lax.axis_index("rows")

    def add_run(r, drow):
        return drow + lanes.load(drows, k, r)

    first, last = first_runs[k, c], first_runs[k, c + 1]
    drow = jax.lax.fori_loop(first, last, add_run, lanes.zeros())
    dtables[k, c, lanes.columns()] = drow.astype(dtables.dtype)


def _launch(body, grid, results, tile, interpret, **sizes):
    """Compile a body for a grid of blocks, or interpret it on this machine's CPU."""
    return plgpu.kernel(
        functools.partial(body, lanes=Lanes(tile, interpret), **sizes),
        out_type=results,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name="lookup" + body.__name__.removesuffix("_body"),
        # No block reads what it writes, so no barrier is needed around loads and stores.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=_interpreter() if interpret else None,
    )


def _interpreter():
    """Mosaic GPU's interpreter, public since jax 0.11."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.InterpretGPUParams()


# --- Shapes. --------------------------------------------------------------------------


def _check(tables, scores):
    if not _supports(tables, scores):
        raise TypeError(
            "implementation='gpu' takes float32 or bfloat16 tables and float32 scores, "
            f"not {tables.dtype} and {scores.dtype}: use 'xla'."
        )


def _supports(tables, scores):
    return tables.dtype in DTYPES and scores.dtype == jnp.float32


def _by_table(codes, num_buckets):
    """[N, K] -> int32 [K, N], none of which reads outside its table."""
    return jnp.clip(codes.astype(jnp.int32), 0, num_buckets - 1).T


def _tiled(tables, max_tile):
    """Tables whose width the tiles divide, and the tile: a multiple of 128 to max_tile.

    Wide reads come first, then wide tiles: 768 of 2304 columns, 1024 of 3072.
    """
    tables = _pad(tables, 2, THREADS)
    width = tables.shape[2]
    tiles = range(THREADS, min(width, max_tile) + 1, THREADS)
    return tables, max(
        (t for t in tiles if width % t == 0), key=lambda t: (_lanes(t), t)
    )


def _lanes(tile):
    """Neighbours that a thread reads at once: a power of two that divides its share."""
    return math.gcd(tile // THREADS, MAX_LANES)


def _pad(array, axis, multiple):
    extra = [(0, 0)] * array.ndim
    extra[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, extra)


def _divisor(number, limit):
    """The largest divisor of `number` that is at most `limit`, or 1."""
    return max(
        d for d in range(1, number + 1) if number % d == 0 and d <= max(1, limit)
    )


def _power_of_two_below(number):
    return 1 << (number.bit_length() - 1)


def _power_of_two_above(number):
    return 1 << max(0, number - 1).bit_length()
