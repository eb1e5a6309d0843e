"""The memory layer: every implementation against the released code and its definition."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracle
import pytest
from released import CASES, golden

from memoryformer.ops import hashing, lookup
from memoryformer.ops.lookup import native as lookup_native

HERE = [name for name in lookup.IMPLEMENTATIONS if name != "gpu"]  # see test_lookup_gpu
IMPLEMENTATIONS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "native" and not lookup_native.available(), reason="no C++ compiler"
        ),
    )
    for name in HERE
]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
WIDE = [p for p in HERE if p != "native"]  # what takes float64


def relative(got, expected):
    """The largest difference, over the largest entry."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
@every_implementation
def test_released_layer(case, implementation):
    """Outputs and all gradients of the released layer within 1e-5.

    Mutations: `scores_g[k]` left out of `scan_tables`; ds without its sum over F; `-beta`
    for `beta` in `_score_bwd`.
    """

    def layer(x, tables, bias):
        return lookup.memory_layer(x, tables, bias, "l1_softmax", 1.0, implementation)

    names = ("x", "tables", "bias")
    y, pullback = jax.vjp(layer, *(jnp.asarray(golden(case, n)) for n in names))
    assert relative(y, golden(case, "y")) < 1e-5
    for name, gradient in zip(names, pullback(golden(case, "dy")), strict=True):
        assert relative(gradient, golden(case, f"d{name}")) < 1e-5, name


@pytest.mark.parametrize("kind", hashing.SCORES)
@pytest.mark.parametrize("implementation", WIDE)
def test_gradients_in_float64(kind, implementation):
    """In x, tables, bias, beta and gamma, against central differences of the oracle.

    Mutation: `.astype(jnp.float32)` on dscores in `_scan_bwd`.
    """
    rng = np.random.default_rng(0)
    x, tables, bias, dy = (
        rng.normal(size=size) for size in ((6, 12), (3, 16, 5), (5,), (6, 5))
    )
    arguments = (x, tables, bias, np.float64(1.3), np.float64(0.7))
    with jax.enable_x64(True):

        def layer(x, tables, bias, beta, gamma):
            learned = (beta, gamma)
            return lookup.memory_layer(
                x, tables, bias, kind, 0.8, implementation, learned
            )

        y, pullback = jax.vjp(layer, *map(jnp.asarray, arguments))
        assert y.dtype == jnp.float64
        gradients = pullback(jnp.asarray(dy))
    read = np.flatnonzero(np.abs(gradients[1]).sum(axis=-1))[:3] * 5 + 2
    indices = [range(0, 72, 7), [*read, 3], range(5), [0], [0]]

    def definition(x, tables, bias, beta, gamma):
        return oracle.memory_layer(
            x, tables, bias, kind, 0.8, float(beta), float(gamma)
        )

    np.testing.assert_allclose(y, definition(*arguments), rtol=1e-10)
    differences = oracle.central_differences(definition, arguments, dy, indices)
    for got, where, expected in zip(gradients, indices, differences, strict=True):
        got = np.ravel(got)[list(where)]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


def operands(dtype="float32"):
    """Leading axes [2, 7], a prime number of tables, a width of no special size."""
    rng = np.random.default_rng(5)
    tables = jnp.asarray(rng.normal(size=(11, 32, 9)), dtype)
    codes = jnp.asarray(rng.integers(0, 32, (2, 7, 11)), jnp.int32)
    scores = jnp.asarray(rng.normal(size=(2, 7, 11)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(2, 7, 9)), jnp.float32)
    return tables, codes, scores, dy


def value_and_gradients(tables, codes, scores, dy, implementation):
    y, pullback = jax.vjp(
        lambda t, s: lookup.lookup(t, codes, s, implementation), tables, scores
    )
    return y, *pullback(dy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_implementation
def test_implementations_agree(dtype, implementation):
    """The oracle's sums; float32 accumulation from bfloat16 tables; the same bits twice.

    Mutation: `y` of `scan_tables` in the dtype of the tables.
    """
    tables, codes, scores, dy = operands(dtype)
    compiled = jax.jit(
        functools.partial(value_and_gradients, implementation=implementation)
    )
    y, dtables, dscores = compiled(tables, codes, scores, dy)
    assert (y.dtype, dtables.dtype, dscores.dtype) == (np.float32, dtype, np.float32)
    t, c, s, d = (np.asarray(a, np.float64) for a in (tables, codes, scores, dy))
    rows = t[np.arange(11), c.astype(int)]  # [2, 7, 11, 9]
    assert relative(y, np.einsum("blk,blkf->blf", s, rows)) < 1e-6
    assert relative(dscores, np.einsum("blf,blkf->blk", d, rows)) < 1e-6
    expected = np.zeros_like(t)
    for b, n, k in np.ndindex(*c.shape):
        expected[k, int(c[b, n, k])] += s[b, n, k] * d[b, n]
    tolerance = 1e-6 if dtype == "float32" else 4e-3  # rounded once, at the end
    assert relative(dtables, expected) < tolerance
    for first, second in zip(
        (y, dtables, dscores), compiled(tables, codes, scores, dy), strict=True
    ):
        np.testing.assert_array_equal(first, second)


@functools.cache
def temporary_bytes(implementation, dtype="float32"):
    """Of forward and backward, compiled (not run) at N=16384, K=128, tau=8, F=1024."""
    shape = jax.ShapeDtypeStruct
    compiled = jax.jit(
        functools.partial(value_and_gradients, implementation=implementation)
    ).lower(
        shape((128, 256, 1024), dtype),
        shape((16384, 128), "int32"),
        shape((16384, 128), "float32"),
        shape((16384, 1024), "float32"),
    )
    return compiled.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["xla", "onehot", "auto"])
def test_temporary_memory(implementation, dtype):
    """At most 600 MiB, where an array [N, K, F] takes 8 GiB.

    Mutation: `_reference` in place of `scan_tables`.
    """
    assert temporary_bytes(implementation, dtype) <= 600 * 2**20


def test_the_definition_builds_what_the_others_do_not():
    """The measure of the test above sees [N, K, F]: 8 GiB.

    Mutation: 'xla' for 'reference' here.
    """
    assert temporary_bytes("reference") > 8 * 2**30


@pytest.mark.parametrize("kind, unexplained", [("constant", 0.363), ("l1", 0.318)])
def test_closed_form(kind, unexplained):
    """A linear map fitted from Gaussian inputs leaves this part of the variance.

    Each bucket's optimum is a weighted mean, sum s y / sum s^2, of which both sums are
    the layer's own gradients; the variance left is of fresh inputs. constant: 1 - 2/pi;
    l1: 1 - (1 + (tau - 1) 2/pi) / tau.

    Mutation: `power` of `l1` 0, or of `constant` 1.
    """
    num_tables, code_bits, features, samples = 2, 8, 16, 1 << 18
    size = num_tables * code_bits
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (size, features))
    zeros = jnp.zeros((num_tables, 1 << code_bits, features))

    def layer(x, tables):
        return lookup.memory_layer(x, tables, None, kind, implementation="xla")

    @jax.jit
    def fit(x):
        wanted = x @ weights
        _, pullback = jax.vjp(functools.partial(layer, x), zeros)
        (moments,) = pullback(wanted)  # sum s y
        chunks = hashing.split_chunks(x, code_bits)
        s = hashing.scores(chunks, kind)
        _, pullback = jax.vjp(
            lambda t: lookup.lookup(t, hashing.hash_codes(chunks), s**2, "xla"), zeros
        )
        (norms,) = pullback(jnp.ones_like(wanted))  # sum s^2
        return moments / norms

    @jax.jit
    def left(x, tables):
        wanted = x @ weights
        return jnp.var(wanted - layer(x, tables)) / jnp.var(wanted)

    tables = fit(jax.random.normal(keys[1], (samples, size)))
    fresh = jax.random.normal(keys[2], (samples, size))
    assert abs(float(left(fresh, tables)) - unexplained) < 0.01


@pytest.mark.parametrize("implementation", ["reference", "xla", "onehot", "auto"])
def test_numpy_tables_and_no_rows(implementation):
    """What `runs.steps.load` returns works inside `jit`, and so does an empty batch.

    Mutations: `tables` not made a JAX array; `reshape(.., -1, tau)` in `split_chunks`.
    """
    tables = np.ones((2, 16, 3), np.float32)

    @jax.jit
    def layer(x):
        return lookup.memory_layer(x, tables, None, "constant", 1.0, implementation)

    np.testing.assert_array_equal(layer(jnp.ones((2, 8))), np.full((2, 3), 2.0))
    assert layer(jnp.ones((0, 8))).shape == (0, 3)


def test_mistakes_are_named(monkeypatch):
    """Mutation: no check of shapes in `memory_layer`, where a reshape would go wrong."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it comes first
    tables = jnp.zeros((3, 16, 5))
    with pytest.raises(ValueError, match="x has 13 values, but 3 tables of 16 rows"):
        lookup.memory_layer(jnp.zeros((2, 13)), tables)
    with pytest.raises(ValueError, match=r"3 codes of log2\(12\) bits"):
        lookup.memory_layer(jnp.zeros((2, 9)), jnp.zeros((3, 12, 5)))
    with pytest.raises(ValueError, match="'scan': unknown; known: auto"):
        lookup.memory_layer(jnp.zeros((2, 12)), tables, implementation="scan")
    codes = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"codes \(2, 4\) and scores \(2, 4\)"):
        lookup.lookup(tables, codes, jnp.zeros((2, 4)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_without_a_scatter(dtype, monkeypatch):
    """On other platforms than CPU a product with one-hot codes stands for it: the same sums.

    Mutations: scores left out of `product`, or divided by.
    """
    tables, codes, scores, dy = operands(dtype)
    wanted = value_and_gradients(tables, codes, scores, dy, "xla")
    monkeypatch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *operands, default, **others: default(*operands),
    )
    got = value_and_gradients(tables, codes, scores, dy, "xla")
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert relative(one, other) < (1e-6 if dtype == "float32" else 4e-3)


def chosen(monkeypatch, num_buckets, dtype="float32"):
    """What `auto` takes on each platform, by name."""
    seen = {}

    def platform_dependent(*operands, **functions):
        seen.update({name: f.__name__ for name, f in functions.items()})
        return functions["default"](*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", platform_dependent)
    tables = jax.ShapeDtypeStruct((2, num_buckets, 8), dtype)
    codes = jax.ShapeDtypeStruct((3, 2), "int32")
    scores = jax.ShapeDtypeStruct((3, 2), "float32")
    jax.eval_shape(lookup.lookup, tables, codes, scores)
    return seen


def test_what_auto_takes(monkeypatch):
    """Products up to ten bits on a TPU; C++ on CPU, only where it will run.

    Mutations: nine or eleven bits; `<` for `<=`; `or` for `and`.
    """
    built = "native" if lookup_native.available() else "scan_tables"
    few = {"cpu": built, "tpu": "onehot_products", "cuda": "gpu"}
    few["default"] = "scan_tables"
    assert chosen(monkeypatch, 1 << 10) == few
    assert chosen(monkeypatch, 1 << 11) == few | {"tpu": "scan_tables"}
    half = few | {"cpu": "scan_tables", "cuda": "scan_tables"}
    assert chosen(monkeypatch, 1 << 10, "float16") == half
    monkeypatch.setattr(lookup_native, "available", lambda: False)
    assert chosen(monkeypatch, 2) == few | {"cpu": "scan_tables"}
    monkeypatch.setattr(lookup_native, "available", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert chosen(monkeypatch, 4) == few | {"cpu": "scan_tables"}


@pytest.mark.parametrize(
    "implementation, dtype, platform, capability, reason",
    [
        ("xla", "float64", "tpu", None, ""),
        ("native", "float32", "gpu", None, "the platform is gpu, not cpu"),
        ("native", "float64", "cpu", None, "it takes float32 or bfloat16, not float64"),
        ("gpu", "float32", "cpu", None, "the platform is cpu, not gpu"),
        ("gpu", "float32", "gpu", 9.0, ""),
        (
            "gpu",
            "float32",
            "gpu",
            8.0,
            "the GPU's compute capability is 8.0, below 9.0",
        ),
        (
            "gpu",
            "float16",
            "gpu",
            9.0,
            "it takes no float16 tables with float32 scores",
        ),
    ],
)
def test_why_not(implementation, dtype, platform, capability, reason):
    """Mutations: any of the checks left out."""
    with jax.enable_x64(True):
        found = lookup.why_not(implementation, jnp.dtype(dtype), platform, capability)
    assert found == reason


@pytest.mark.parametrize("reason", ["", "no compiler"])
def test_why_the_native_library_is_not_there(monkeypatch, reason):
    """Mutation: None for the reason."""
    monkeypatch.setattr(lookup_native, "why_not_built", lambda: reason)
    assert lookup.why_not("native", jnp.dtype("float32"), "cpu", None) == reason


def test_a_layer_as_in_the_paper_unless_asked_otherwise():
    """Score, temperature and implementation. Mutations: any default of `memory_layer`."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 12)), jnp.float32)
    tables = jnp.asarray(rng.normal(size=(3, 16, 5)), jnp.float32)
    plain = lookup.memory_layer(x, tables)
    named = lookup.memory_layer(x, tables, None, "softmax", 1.0, "auto", None)
    np.testing.assert_array_equal(plain, named)
    chunks = hashing.split_chunks(x, 4)
    np.testing.assert_array_equal(
        hashing.scores(chunks), hashing.scores(chunks, "softmax", 1.0)
    )
    one = jnp.float32(1.0)
    np.testing.assert_allclose(
        hashing.scores(chunks, "learned", 0.5),
        hashing.scores(chunks, "learned", 9.0, (4 * one, one)),
        rtol=1e-6,
    )
