"""The bodies of the GPU lookup: what one block of 128 threads does, and how it is launched.

Start at `launch`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memoryformer.notation import Array
from memoryformer.ops import jax_private

THREADS = 128  # threads of a warpgroup, Mosaic GPU's unit of execution
MAX_LANES = 8  # neighbours that a thread reads at once: 16 bytes of bfloat16
Ref = Any  # an array in the GPU's memory, read and written in place


def launch(
    body: Callable[..., None],
    grid: Mapping[str, int],
    results: Any,
    tile: int,
    interpret: bool,
    **sizes: int,
) -> Callable[..., Any]:
    """Compile a body for a grid of blocks, or interpret it on this machine's CPU.

    `results` are the shapes of what it writes, `tile` the columns of one block, `sizes`
    further arguments of the body.
    """
    return plgpu.kernel(
        functools.partial(body, lanes=Lanes(tile, interpret), **sizes),
        out_type=results,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=f"lookup_{body.__name__}",
        # No block reads what it writes, so no barrier is needed around loads and stores.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=jax_private.gpu_interpreter() if interpret else None,
    )


def num_lanes(tile: int) -> int:
    """Neighbours that a thread reads at once: a power of two that divides its share."""
    return math.gcd(tile // THREADS, MAX_LANES)


class Lanes(NamedTuple):
    """A tile of columns over the threads of a block: groups of neighbours, dealt in turn.

    A group is as large as the tile allows, up to 16 bytes of bfloat16, where the default
    would be 8. Interpreted arrays have no layout.
    """

    tile: int
    interpret: bool

    def columns(self) -> slice | pl.Slice:
        """This block's columns."""
        return pl.ds(jax.lax.axis_index("features") * self.tile, self.tile)

    def zeros(self) -> Array:
        """Float32 [tile]."""
        return self._place(jnp.zeros((self.tile,), jnp.float32))

    def load(self, ref: Ref, *index: Any) -> Array:
        """This block's columns of one row: [tile]."""
        return self._place(ref[*index, self.columns()])

    def _place(self, array):
        if self.interpret:
            return array
        layout = plgpu.Layout.WG_STRIDED((self.tile,), num_lanes(self.tile))
        return plgpu.layout_cast(array, layout)


def forward(
    tables: Ref,
    codes: Ref,
    scores: Ref,
    y: Ref,
    *,
    lanes: Lanes,
    tokens: int,
    num_tables: int,
) -> None:
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


def backward(*refs: Ref, lanes: Lanes, unroll: int) -> None:
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
        tail = start + steps * unroll
        return jax.lax.fori_loop(tail, end, lambda i, a: add_tokens(dy, i, 1, a), drow)

    if narrow.dtype == dy.dtype:
        drow = add_run(dy)
    else:
        drow = jax.lax.cond(exact[0] != 0, lambda: add_run(narrow), lambda: add_run(dy))
    drows[k, r, lanes.columns()] = drow


def sum_runs(drows: Ref, first_runs: Ref, dtables: Ref, *, lanes: Lanes) -> None:
    """Add the runs of one row in order: [K,R,F], [K,C+1] -> [K,C,F]."""
    k, c = jax.lax.axis_index("tables"), jax.lax.axis_index("rows")

    def add_run(r, drow):
        return drow + lanes.load(drows, k, r)

    first, last = first_runs[k, c], first_runs[k, c + 1]
    drow = jax.lax.fori_loop(first, last, add_run, lanes.zeros())
    dtables[k, c, lanes.columns()] = drow.astype(dtables.dtype)
