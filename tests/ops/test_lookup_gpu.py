"""The GPU lookup: its kernels interpreted on CPU, lowered for CUDA, compiled for an H200.

Interpretation runs every block's program one read and write at a time, so shapes are tiny.
"""

import functools
import inspect
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import memoryformer
from memoryformer.ops import attention, jax_private, lookup
from memoryformer.ops.lookup import gpu as lookup_gpu
from memoryformer.ops.lookup import gpu_kernels, gpu_order, xla


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
    assert first_runs.shape == (num_tables, num_buckets + 1)
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
    """Mutation: no `_check` in `forward`, or in `backward`."""
    tables, codes, scores, dy = operands(N=1, K=1, C=2, F=128)
    half, words = tables.astype(jnp.float16), "float32 or bfloat16 tables and float32"
    with pytest.raises(TypeError, match=words):
        lookup_gpu.gpu(half, codes, scores)
    with pytest.raises(TypeError, match=words):
        lookup_gpu.backward(half, codes, scores, dy)
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


def test_a_public_name_is_taken_where_jax_has_it(monkeypatch):
    """Mutation: None, which would compile for a GPU."""
    public = object()
    monkeypatch.setattr(
        jax_private.plgpu, "InterpretGPUParams", lambda: public, raising=False
    )
    assert jax_private.gpu_interpreter() is public


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


def test_where_it_can_run(monkeypatch):
    """From compute capability 9.0 on; of the GPU that is here where none is named.

    Mutations: `<=` for `<`; the backend not asked; every dot taken out of a version.
    """
    tables, _, scores, _ = operands(N=1, K=1, C=2, F=128)
    why = functools.partial(lookup_gpu.why_not, tables, scores)
    assert why() == why(9.0) == why(10.0) == ""
    assert why(8.9) == "the GPU's compute capability is 8.9, below 9.0"
    assert "float32 tables with float16 scores" in lookup_gpu.why_not(
        tables, scores.astype(jnp.float16)
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, number in (("8.6", 8.6), ("9.0", 9.0), ("gfx90a", 0.0), ("", 0.0)):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert lookup_gpu.own_capability() == number
        assert (why() == "") == (number >= 9)
        assert why(9.0) == ""  # named: not asked
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace()])
    assert lookup_gpu.own_capability() == 0.0
    odd = types.SimpleNamespace(compute_capability="9.0.0")
    monkeypatch.setattr(jax, "devices", lambda: [odd])
    assert lookup_gpu.own_capability() == 0.0


@pytest.mark.parametrize(
    "width, padded, tile, lanes",
    [
        (1, 128, 128, 1),
        (128, 128, 128, 1),
        (129, 256, 256, 2),
        (640, 640, 640, 1),
        (1024, 1024, 1024, 8),
        (1536, 1536, 1536, 4),
        (1664, 1664, 128, 1),
        (2048, 2048, 1024, 8),
        (2304, 2304, 768, 2),
        (3072, 3072, 1024, 8),
    ],
)
def test_tiles_of_a_width(width, padded, tile, lanes):
    """Wide reads first, then wide tiles, as measured.

    Mutations: the tile before its lanes; MAX_TILE, MAX_LANES or THREADS by one.
    """
    rows, found = lookup_gpu._tiled(jnp.zeros((1, 1, width)), lookup_gpu.MAX_TILE)
    assert rows.shape == (1, 1, padded)
    assert (found, gpu_kernels.num_lanes(found)) == (tile, lanes)
    assert (lookup_gpu.MAX_TILE, lookup_gpu.THREADS) == (1536, 128)


def launches(monkeypatch, N, K, C, F, dtype="bfloat16", direction="forward", **sizes):
    """What a direction launches for these shapes: [(grid, tile, sizes), ..]."""
    seen = []

    def launch(body, grid, results, tile, interpret, **sizes):
        assert interpret is False
        seen.append((grid, tile, sizes))
        made = jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), results)
        return lambda *operands: made

    monkeypatch.setattr(gpu_kernels, "launch", launch)
    tables, codes, scores, dy = shapes(N, K, C, F, dtype)
    operands = [tables, codes, scores] + [dy] * (direction == "backward")
    function = functools.partial(getattr(lookup_gpu, direction), **sizes)
    jax.eval_shape(function, *operands)
    return seen


@pytest.mark.parametrize(
    "shape, grid, tile, tokens, num_tables",
    [
        ((16384, 128, 256, 1024), (1, 1, 1024), 1024, 16, 128),
        ((16384, 128, 256, 3072), (3, 1, 1024), 1024, 16, 128),
        ((16384, 128, 256, 1536), (1, 1, 2048), 1536, 8, 128),
        ((1, 128, 256, 1024), (1, 128, 1), 1024, 1, 1),
        ((5, 128, 256, 1024), (1, 128, 1), 1024, 8, 1),
        ((368, 23, 16, 128), (1, 1, 23), 128, 16, 23),
        ((352, 24, 16, 128), (1, 24, 22), 128, 16, 1),
    ],
)
def test_blocks_of_a_forward_pass(monkeypatch, shape, grid, tile, tokens, num_tables):
    """As many tokens as registers hold; few tokens are spread over parts of the tables.

    Mutations: TOKENS, SUMS or BLOCKS by one; `_power_of_two_above` of one more.
    """
    [(found, width, sizes)] = launches(monkeypatch, *shape)
    assert tuple(found.values()) == grid and width == tile
    assert list(found) == ["features", "splits", "tokens"]
    assert sizes == {"tokens": tokens, "num_tables": num_tables}


def test_blocks_of_a_backward_pass(monkeypatch):
    """A block to a run of 256 tokens, two at a time, then one to a row.

    Mutations: RUN or UNROLL by one; a tile more.
    """
    shape = (16384, 4, 256, 2048)
    runs, rows = launches(monkeypatch, *shape, direction="backward")
    assert runs == (
        {"features": 2, "tables": 4, "runs": 256 + 64},
        1024,
        {"unroll": 2},
    )
    assert rows == ({"features": 2, "tables": 4, "rows": 256}, 1024, {})


def test_whole_numbers():
    """Mutations: any of them by one."""
    assert [lookup_gpu._power_of_two_below(n) for n in (1, 7, 8, 9)] == [1, 4, 8, 8]
    above = [lookup_gpu._power_of_two_above(n) for n in (0, 1, 2, 8, 9)]
    assert above == [1, 1, 2, 8, 16]
    cases = ((12, 0), (12, 1), (12, 5), (12, 6), (12, 99), (7, 6))
    assert [xla.largest_divisor(*case) for case in cases] == [1, 1, 4, 6, 12, 1]


def test_keys_fit_a_positive_int32():
    """Mutations: `>` for `>=`; 30 or 32 for 31."""

    def sort(num_tokens):
        codes = jax.ShapeDtypeStruct((num_tokens, 1), jnp.int32)
        return jax.eval_shape(lambda c: gpu_order.sort_by_code(c, 1 << 20), codes)

    assert sort((1 << 11) - 1).rows.shape == (1, (1 << 20) + 7)
    with pytest.raises(ValueError, match="2048 tokens of 1048576 codes"):
        sort(1 << 11)


def test_sizes_that_were_tuned():
    """On an H200: another one needs its measurement. Interpreting is for tests alone.

    Mutations: any of these numbers; a kernel that is interpreted unless told otherwise.
    """
    assert gpu_kernels.THREADS == 128 and gpu_kernels.MAX_LANES == 8
    assert lookup_gpu.MAX_TILE == 12 * gpu_kernels.THREADS
    assert (lookup_gpu.TOKENS, lookup_gpu.SUMS, lookup_gpu.UNROLL) == (16, 128, 2)
    assert lookup_gpu.BLOCKS == 4 * 132 and gpu_order.RUN == 256
    assert gpu_order.MAX_KEYS == 2**31
    for function in (
        lookup_gpu.gpu,
        lookup_gpu.forward,
        lookup_gpu.backward,
        attention.fused,
    ):
        assert inspect.signature(function).parameters["interpret"].default is False
