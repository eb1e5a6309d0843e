"""The GPU lookup: its kernels interpreted on CPU, lowered for CUDA, compiled for an H200.

Interpretation runs every block's program one read and write at a time, so shapes are tiny.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import memoryformer
from memoryformer.ops import lookup
from memoryformer.ops.lookup import gpu as lookup_gpu
from memoryformer.ops.lookup import gpu_order


def relative(got, expected):
    """The largest difference, over the largest entry."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(got).all()  # the interpreter fills fresh memory with NaN
    return np.abs(got - expected).max() / np.abs(expected).max()


def operands(N, K, C, F, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    tables = jnp.asarray(rng.normal(size=(K, C, F)), dtype)
    codes = jnp.asarray(rng.integers(0, C, (N, K)), jnp.int32)
    scores = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(N, F)), jnp.float32)
    return tables, codes, scores, dy


def definition(tables, codes, scores, dy):
    """The sum, dT and ds with loops in float64."""
    t, c, s, d = (np.asarray(a, np.float64) for a in (tables, codes, scores, dy))
    y, dt, ds = np.zeros((len(c), t.shape[2])), np.zeros_like(t), np.zeros_like(s)
    for n, k in np.ndindex(*c.shape):
        row = k, int(c[n, k])
        y[n] += s[n, k] * t[row]
        dt[row] += s[n, k] * d[n]
        ds[n, k] = d[n] @ t[row]
    return y, dt, ds


def interpreted(tables, codes, scores, dy):
    y, pullback = jax.vjp(
        lambda t, s: lookup_gpu.gpu(t, codes, s, True), tables, scores
    )
    return y, *pullback(dy)


def test_ragged_shapes():
    """No size is a multiple of a block's; the oracle's layer; codes outside are clamped.

    Mutations: no `jnp.clip` in `by_table`; `splits` partial sums of which one is left out
    (`y[0]` always); `tail = end` in the backward kernel.
    """
    tables, codes, scores, dy = operands(N=5, K=3, C=4, F=130)
    codes = codes.at[0, 0].set(-3).at[1, 1].set(99)
    y, dtables, dscores = jax.jit(interpreted)(tables, codes, scores, dy)
    clamped = jnp.clip(codes, 0, 3)
    expected = definition(tables, clamped, scores, dy)
    for got, wanted in zip((y, dtables, dscores), expected, strict=True):
        assert got.shape == wanted.shape and got.dtype == jnp.float32
        assert relative(got, wanted) < 1e-6
    chunks = np.random.default_rng(1).normal(size=(1, 3, 2))  # and from x to y
    codes, s = oracle.codes(chunks), oracle.scores(chunks, "l1_softmax")
    wanted = oracle.memory_layer(
        chunks.reshape(1, 6), np.asarray(tables, np.float64), None, "l1_softmax"
    )
    one = lookup_gpu.forward(
        tables,
        jnp.asarray(codes, jnp.int32),
        jnp.asarray(s, jnp.float32),
        interpret=True,
    )
    assert relative(one, wanted) < 1e-6


def test_popular_rows_in_bfloat16():
    """Rows cut into runs, two tiles of columns, dy of either kind, unread rows zero.

    ds is as exact as with float32 tables, bit for bit, whether dy is read as bfloat16
    (where that is exact) or not: no rounding of dy. Mutations: `exact` true; a run
    left out of `sum_runs`; `dscores[0]` alone for their sum over tiles.
    """
    tables, codes, scores, noise = operands(N=7, K=2, C=2, F=256, dtype="bfloat16")
    codes = codes.at[:, 1].set(1)  # one row for all tokens
    sizes = {"run": 3, "unroll": 2, "interpret": True, "max_tile": 128}
    backward = jax.jit(functools.partial(lookup_gpu.backward, **sizes))
    rounded = noise.astype(jnp.bfloat16).astype(jnp.float32)
    for dy in (noise, rounded):
        dtables, dscores = backward(tables, codes, scores, dy)
        _, dt, ds = definition(tables, codes, scores, dy)
        assert dtables.dtype == jnp.bfloat16
        assert relative(dtables, dt) < 4e-3  # rounded once, at the end
        assert relative(dscores, ds) < 1e-6
        wide = backward(tables.astype(jnp.float32), codes, scores, dy)
        np.testing.assert_array_equal(dscores, wide[1])
        np.testing.assert_array_equal(dtables, wide[0].astype(jnp.bfloat16))


@pytest.mark.parametrize("N, K, C, run", [(1, 1, 1, 1), (13, 3, 4, 4), (40, 2, 8, 7)])
def test_runs_hold_every_token_once(N, K, C, run):
    """In order of code and index, one code to a run, no code without one, none too long.

    Mutations: keys without `+ index`; `runs` without its `maximum(1, ..)`.
    """
    sort = jax.jit(gpu_order.sort_by_code, static_argnums=(1, 2))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        codes = rng.integers(0, max(1, C - seed % 3), (N, K))
        check_order(codes, C, run, sort(jnp.asarray(codes), C, run))


def check_order(codes, num_buckets, run, order):
    num_tokens, num_tables = codes.shape
    tokens, rows, starts, ends, first_runs = map(np.asarray, order)
    assert rows.shape[1] == num_buckets + num_tokens // run
    for k in range(num_tables):
        assert (tokens[k] == np.argsort(codes[:, k], kind="stable")).all()
        position = 0
        for c in range(num_buckets):
            first, last = first_runs[k, c : c + 2]
            assert last > first
            for r in range(first, last):
                assert rows[k, r] == c and starts[k, r] == position
                assert ends[k, r] - starts[k, r] <= run
                assert (codes[tokens[k, starts[k, r] : ends[k, r]], k] == c).all()
                position = ends[k, r]
        assert position == num_tokens
        past = slice(first_runs[k, -1], None)
        assert (starts[k, past] == ends[k, past]).all()


def value_and_gradients(tables, codes, scores, dy):
    y, pullback = jax.vjp(
        lambda t, s: lookup.lookup(t, codes, s, "gpu"), tables, scores
    )
    return y, *pullback(dy)


def shapes(N, K, C, F, dtype, mesh=None, specs=()):
    layout = [NamedSharding(mesh, s) for s in specs] if mesh else [None] * 4
    sizes = (K, C, F), (N, K), (N, K), (N, F)
    types = dtype, "int32", "float32", "float32"
    return [
        jax.ShapeDtypeStruct(size, kind, sharding=where)
        for size, kind, where in zip(sizes, types, layout, strict=True)
    ]


@pytest.mark.parametrize("sharded", [False, True])
def test_lowers_for_cuda(sharded):
    """`implementation='gpu'` becomes three kernels for CUDA and is refused for CPU, also
    split over F in a `shard_map`; the sizes of the reference problem.

    Red if `_gpu` does not mark its codes: another lookup would be lowered in silence.
    """
    function, mesh, specs = value_and_gradients, None, ()
    if sharded:
        mesh = jax.make_mesh((2,), ("model",))
        last = P(None, None, "model")
        specs = (last, P(), P(), P(None, "model"))
        function = jax.shard_map(
            function, mesh=mesh, in_specs=specs, check_vma=False,
            out_specs=(P(None, "model"), last, P()),
        )  # fmt: skip
    arguments = shapes(16384, 128, 256, 1024, "bfloat16", mesh, specs)
    traced = jax.jit(function).trace(*arguments)
    kernels = ("lookup_forward", "lookup_backward", "lookup_sum_runs")
    on_cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(kernel in on_cuda for kernel in kernels)
    with pytest.raises(
        ValueError, match="lookup 'gpu' cannot run: the platform is cpu"
    ):
        traced.lower(lowering_platforms=("cpu",))


def test_mistakes_are_named():
    """Mutation: no `_check` in `forward`."""
    tables, codes, scores, _ = operands(N=1, K=1, C=2, F=128)
    with pytest.raises(TypeError, match="float32 or bfloat16 tables and float32"):
        lookup_gpu.gpu(tables.astype(jnp.float16), codes, scores)
    assert "float16" in lookup_gpu.why_not(tables.astype(jnp.float16), scores)
    with pytest.raises(ValueError, match="3000000 tokens of 1024 codes"):
        jax.eval_shape(
            lambda c: gpu_order.sort_by_code(c, 1024),
            jax.ShapeDtypeStruct((3_000_000, 1), jnp.int32),
        )


def test_one_module_names_what_jax_keeps_private():
    """Mutation: `import jax._src` in another module of the package."""
    root = pathlib.Path(memoryformer.__file__).parent
    private = [path for path in root.rglob("*.py") if "jax._src" in path.read_text()]
    assert private == [root / "ops" / "jax_private.py"]


def test_auto_leaves_more_keys_than_sort_fits_to_the_scan():
    """What no key of the sort can hold is not traced for a GPU, and fails nowhere.

    Mutation: `sortable = True` in `_auto`.
    """
    N, K, C, F = 2**21, 2, 2**10, 8
    tables = jax.ShapeDtypeStruct((K, C, F), jnp.float32)
    z = jax.ShapeDtypeStruct((N, K * 10), jnp.float32)

    def total(tables, z):
        return lookup.memory_layer(z, tables=tables, implementation="auto").sum()

    assert jax.eval_shape(jax.grad(total), tables, z).shape == (K, C, F)
