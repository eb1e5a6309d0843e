"""The native lookup equals its definition, whatever the shape, path or thread count."""

import concurrent.futures
import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from memoryformer.ops import lookup
from memoryformer.ops.lookup import native as lookup_native
from memoryformer.ops.lookup import xla as lookup_xla

ROOT = pathlib.Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in lookup_native.COMPILERS),
    reason="no C++ compiler",
)
pytestmark = needs_compiler

# N, K, C, F: one of each, ragged, odd, narrow, wide, many buckets, many tokens.
SHAPES = (
    (1, 1, 2, 1),
    (7, 3, 4, 5),
    (33, 5, 16, 40),
    (300, 9, 8, 67),
    (513, 16, 64, 160),
    (1, 130, 16, 1024),
    (9, 3, 1024, 130),
    (64, 2, 2048, 24),
    (5000, 3, 32, 33),
)
IN_PLACE, PACKED = 1 << 40, 0  # values of packing_reuse that force either path


@pytest.fixture(autouse=True)
def default_settings():
    yield
    lookup_native.configure()


def operands(shape, seed=0, dtype=jnp.float32, margin=0):
    """Tables, codes, scores and dy; `margin` draws codes that far out of range."""
    N, K, C, F = shape
    random = np.random.default_rng(seed)
    return (
        jnp.asarray(random.normal(size=(K, C, F)), dtype),
        jnp.asarray(random.integers(-margin, C + margin, (N, K)), jnp.int32),
        jnp.asarray(random.normal(size=(N, K)), jnp.float32),
        jnp.asarray(random.normal(size=(N, F)), jnp.float32),
    )


def definition(tables, codes, scores, dy):
    """Y, dT and ds in float64 numpy, one table at a time."""
    tables, scores, dy = (np.asarray(a, np.float64) for a in (tables, scores, dy))
    codes = np.clip(np.asarray(codes), 0, tables.shape[1] - 1)
    y, dtables, dscores = np.zeros(dy.shape), np.zeros(tables.shape), 0 * scores
    for k in range(tables.shape[0]):
        rows = tables[k, codes[:, k]]
        y += scores[:, k, None] * rows
        np.add.at(dtables[k], codes[:, k], scores[:, k, None] * dy)
        dscores[:, k] = np.sum(rows * dy, axis=-1)
    return y, dtables, dscores


def value_and_gradients(tables, codes, scores, dy):
    y, vjp = jax.vjp(lambda t, s: lookup_native.native(t, codes, s), tables, scores)
    return y, *vjp(dy)


def assert_close(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        error = np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
        assert error <= tolerance, error


def assert_identical(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("instructions", lookup_native.INSTRUCTION_SETS)
def test_equals_the_definition(shape, instructions):
    """Red if PackSlice does not clear the padding, or SumColumns skips its last columns,
    or TableGradients forgets the last AddLaneSums."""
    args = operands(shape, margin=2)
    expected = definition(*args)
    for reuse in (IN_PLACE, PACKED):
        lookup_native.configure(instruction_set=instructions, packing_reuse=reuse)
        assert_close(value_and_gradients(*args), expected)


@pytest.mark.parametrize("tau", range(1, 12))
def test_equals_the_xla_lookup_for_every_code_length(tau):
    """Red if the group of tables is not cut to the cache (tau=11 then overruns `block`
    only under the sanitizer) or if codes are read as bytes."""
    args = tables, codes, scores, dy = operands((40, 5, 1 << tau, 48), seed=tau)
    y, vjp = jax.vjp(lambda t, s: lookup_xla.scan_tables(t, codes, s), tables, scores)
    expected = [np.asarray(a, np.float64) for a in (y, *vjp(dy))]
    assert_close(value_and_gradients(*args), expected)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (4, 0, 2, 3), (3, 2, 4, 0)], ids=str)
def test_empty_operands(shape):
    """Red if Forward goes on with no tokens (a division by their tiles) or Backward does
    not clear dT."""
    for got in value_and_gradients(*operands(shape)):
        assert not np.asarray(got).any()


def test_codes_out_of_range_are_clamped():
    """Red if `Clamp` returns its argument: a crash, or rows of the next table."""
    tables, codes, scores, dy = operands((50, 4, 8, 33))
    limits = jnp.iinfo(jnp.int32)
    wild = codes.at[0].set(limits.min).at[1].set(limits.max).at[2].set(-1).at[3].set(8)
    args = (tables, jnp.clip(wild, 0, 7), scores, dy)
    for reuse in (IN_PLACE, PACKED):
        lookup_native.configure(packing_reuse=reuse)
        got = value_and_gradients(tables, wild, scores, dy)
        assert_identical(got, value_and_gradients(*args))


def test_nothing_depends_on_the_number_of_threads():
    """Red if ParallelFor splits the columns of one dot product between threads, or if
    Backward lets two parts own one table."""
    args = operands((700, 11, 32, 200))
    lookup_native.configure(num_threads=1)
    expected = value_and_gradients(*args)
    for num_threads in (1, 2, 3, 8):
        for _ in range(3):
            lookup_native.configure(num_threads=num_threads)
            assert_identical(value_and_gradients(*args), expected)


CROWDED = """
import numpy as np, jax.numpy as jnp
from memoryformer.ops.lookup import native as lookup_native
lookup_native.configure(num_threads=64, packing_reuse=0)
for N, K, C, F in ((52, 1340, 2, 16), (1025, 256, 16, 16)):
    args = jnp.ones((K, C, F)), jnp.zeros((N, K), jnp.int32), jnp.ones((N, K))
    assert (lookup_native.native(*args) == K).all()
"""


def test_more_threads_than_tiles_of_tokens():
    """Tiles of 4, rounded up, hold 52 tokens in 13 of 16; in a process of its own, which a
    division by no tokens would end. Red if `num_tiles` is not counted again from `tile`."""
    result = run_python(CROWDED)
    assert result.returncode == 0, (result.returncode, result.stderr)


def test_a_token_does_not_depend_on_its_batch():
    """Decoding and prefill agree bit for bit. Red if either path adds tables in another
    order, such as two partial sums."""
    tables, codes, scores, _ = operands((600, 13, 16, 77))
    lookup_native.configure(packing_reuse=PACKED)
    packed = lookup_native.native(tables, codes, scores)
    lookup_native.configure(packing_reuse=IN_PLACE)
    assert_identical([lookup_native.native(tables, codes, scores)], [packed])
    one = [lookup_native.native(tables, codes[n : n + 1], scores[n : n + 1])[0]
           for n in (0, 599)]  # fmt: skip
    assert_identical(one, [packed[0], packed[599]])


@pytest.mark.parametrize("reuse", [IN_PLACE, PACKED])
def test_bfloat16_tables(reuse):
    """Rows widen exactly; dT is rounded once, to nearest even. Red if the store truncates
    instead of rounding."""
    lookup_native.configure(packing_reuse=reuse)
    args = operands((300, 6, 16, 70), dtype=jnp.bfloat16)
    y, dtables, dscores = value_and_gradients(*args)
    expected_y, expected_dtables, expected_dscores = definition(*args)
    assert y.dtype == jnp.float32 and dtables.dtype == jnp.bfloat16
    assert_close((y, dscores), (expected_y, expected_dscores))
    wide = value_and_gradients(args[0].astype(jnp.float32), *args[1:])[1]
    assert_identical([dtables], [wide.astype(jnp.bfloat16)])
    assert_close([dtables], [expected_dtables], tolerance=2**-8)


@pytest.mark.parametrize("reuse", [IN_PLACE, PACKED])
def test_int8_tables_with_a_scale_per_row(reuse):
    """Red if the scale of row 0 is used for every row of a table."""
    lookup_native.configure(packing_reuse=reuse)
    _, codes, scores, dy = operands((300, 6, 16, 70), margin=2)
    random = np.random.default_rng(1)
    tables = jnp.asarray(random.integers(-127, 128, (6, 16, 70)), jnp.int8)
    scales = jnp.asarray(random.uniform(0.5, 2, (6, 16)), jnp.float32)
    y = lookup_native.native_int8(tables, scales, codes, scores)
    wide = np.asarray(tables, np.float64) * np.asarray(scales, np.float64)[..., None]
    assert_close([y], [definition(wide, codes, scores, dy)[0]])


def test_inside_jit_scan_and_vmap():
    """Red if vmap_method is 'broadcast_all': the handler refuses arrays of rank 4."""
    tables, codes, scores, _ = operands((60, 4, 8, 20))
    whole = lookup_native.native(tables, codes, scores)
    split = (codes.reshape(3, 20, 4), scores.reshape(3, 20, 4))
    mapped = jax.jit(jax.vmap(lookup_native.native, in_axes=(None, 0, 0)))
    assert_identical([mapped(tables, *split).reshape(60, 20)], [whole])
    scanned = jax.lax.scan(
        lambda _, x: (None, lookup_native.native(tables, *x)), None, split
    )[1]
    assert_identical([scanned.reshape(60, 20)], [whole])
    stacked = jnp.stack([tables, 2 * tables])
    doubled = jax.vmap(lookup_native.native, in_axes=(0, None, None))
    assert_identical(doubled(stacked, codes, scores), [whole, 2 * whole])
    squares = jax.vmap(
        jax.grad(lambda t, c, s: jnp.sum(lookup_native.native(t, c, s) ** 2)),
        in_axes=(None, 0, 0),
    )
    expected = definition(tables, codes, scores, 2 * whole)[1]
    assert_close([squares(tables, *split).sum(0)], [expected])


def test_on_eight_devices_at_once():
    """Tokens over 8 devices, gradients summed. Red if working memory is one buffer shared
    by concurrent calls, or if a caller waits for helpers that never start."""
    args = operands((800, 5, 16, 96))

    def step(tables, codes, scores, dy):
        y, dtables, dscores = value_and_gradients(tables, codes, scores, dy)
        return y, jax.lax.psum(dtables, "data"), dscores

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = P("data")
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), rows, rows, rows),
        out_specs=(rows, P(), rows),
        check_vma=False,
    )
    expected = definition(*args)
    for _ in range(10):
        assert_close(jax.jit(sharded)(*args), expected)


def test_from_many_threads_at_once():
    """Red if Scratch hands one buffer to two calls (drop its lock and `erase`)."""
    cases = [operands(shape, seed=i) for i, shape in enumerate(SHAPES)]
    expected = [value_and_gradients(*case) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        results = list(executor.map(lambda c: value_and_gradients(*c), cases * 4))
    for got, wanted in zip(results, expected * 4, strict=True):
        assert_identical(got, wanted)


def test_auto_uses_it_on_cpu_and_only_there():
    """Red if `_auto` drops its `cpu=` branch, or calls native without platform_dependent."""
    tables, codes, scores, _ = operands((12, 3, 8, 20))
    traced = jax.jit(lookup.lookup).trace(tables, codes, scores)
    for platform, expected in (("cpu", True), ("tpu", False), ("cuda", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("memoryformer_lookup_forward" in text) == expected, platform


def test_auto_leaves_other_types_to_xla():
    """Red if `supports` returns True: float16 tables then raise."""
    tables, codes, scores, _ = operands((12, 3, 8, 20))
    y = lookup.lookup(tables.astype(jnp.float16), codes, scores)
    assert_close([y], [definition(tables, codes, scores, y)[0]], tolerance=1e-2)
    with pytest.raises(TypeError, match="use 'xla'"):
        lookup.lookup(tables.astype(jnp.float16), codes, scores, "native")


FALLBACK = """
import jax, jax.numpy as jnp
from memoryformer.ops import lookup
from memoryformer.ops.lookup import native as lookup_native
tables, codes = jnp.arange(24.0).reshape(2, 4, 3), jnp.array([[1, 3]])
scores = jnp.array([[1.0, 2.0]])
for _ in range(2):
    y = lookup.lookup(tables, codes, scores)
    assert (y == lookup.lookup(tables, codes, scores, "reference")).all()
    jax.clear_caches()
assert not lookup_native.available()
try:
    lookup.lookup(tables, codes, scores, "native")
except RuntimeError as error:
    print(error)
"""


def run_python(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"PATH": "", "CXX": ""}, "no C++ compiler found"),
        ({"CXX": "false"}, "false"),
        ({"MEMORYFORMER_CACHE": "/dev/null"}, "/dev/null"),
    ],
    ids=["no compiler", "a compiler that fails", "a cache that cannot be written"],
)
def test_without_a_compiler(environment, reason, tmp_path):
    """One warning and the XLA lookup. Red if `_warn_once` is not cached (two lines), or
    if `_auto` does not ask `available` (a crash)."""
    result = run_python(
        FALLBACK, **{"MEMORYFORMER_CACHE": str(tmp_path), **environment}
    )
    assert result.returncode == 0, result.stderr
    warnings = [w for w in result.stderr.splitlines() if "native lookup" in w]
    assert len(warnings) == 1 and reason in warnings[0]
    assert len(result.stdout.splitlines()) == 1 and reason in result.stdout


def test_a_compiler_with_options(monkeypatch, tmp_path):
    """$CXX is a command, as make reads it; what it builds is of this kind of machine.

    Red if $CXX is looked up as the name of one file, its options are left out of the key, or
    the key lacks the machine.
    """
    compiler = next(filter(shutil.which, lookup_native.COMPILERS))
    commands, built = [], set()

    def run(command, **unused):
        commands.append(command)
        if "-o" in command:
            pathlib.Path(command[-1]).touch()
        return subprocess.CompletedProcess(command, 0, "some version", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("MEMORYFORMER_CACHE", str(tmp_path))
    for options, machine in (("", "x"), (" -pthread", "x"), ("", "y"), ("", "x")):
        monkeypatch.setenv("CXX", f"{compiler}{options}")
        monkeypatch.setattr(
            lookup_native.platform, "machine", lambda name=machine: name
        )
        built.add(lookup_native._build())
    assert len(built) == 3
    path = shutil.which(compiler)
    assert [c[:2] for c in commands if c[1] == "-pthread"] == [[path, "-pthread"]] * 2
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(
        OSError, match=r"no C\+\+ compiler found .no-such-compiler -O1."
    ):
        lookup_native.find_compiler()


MEMORY = """
import resource
import jax, jax.numpy as jnp
from memoryformer.ops.lookup import native as lookup_native
N, K, C, F = 16384, 128, 256, 1024
tables = jnp.ones((K, C, F))
codes = jax.random.randint(jax.random.key(0), (N, K), 0, C)
scores, dy = jnp.ones((N, K)), jnp.ones((N, F))
lookup_native.native(tables[:1], codes[:, :1], scores[:, :1])
jax.block_until_ready((tables, codes, scores, dy))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y, vjp = jax.vjp(lambda t, s: lookup_native.native(t, codes, s), tables, scores)
results = jax.block_until_ready((y, *vjp(dy)))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024 - sum(r.nbytes for r in results) / 2**20)
"""


@pytest.mark.slow
def test_working_memory():
    """Below 100 MiB at N=16384, K=128, C=256, F=1024. Red if Backward packs all of dy
    once for each thread."""
    result = run_python(MEMORY)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 100


@pytest.mark.slow
def test_two_processes_may_build_at_once(tmp_path):
    """Red if the compiler writes to the final path: the second process loads half a file."""
    code = "from memoryformer.ops.lookup import native as n; assert n.available()"
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        runs = [
            executor.submit(run_python, code, MEMORYFORMER_CACHE=str(tmp_path))
            for _ in range(2)
        ]
    assert [run.result().returncode for run in runs] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


COMPILE_DRIVER = [
    "-std=c++17",
    "-Wno-psabi",
    f"-I{ROOT / 'memoryformer/ops/lookup/native'}",
    str(ROOT / "tests/native_driver.cc"),
]


def test_the_driver_fits_the_kernels():
    """The slow test below would not compile after a kernel's arguments had changed.

    Mutation tried: the driver's call of HashToken without `second`.
    """
    compiler = next(filter(shutil.which, lookup_native.COMPILERS))
    command = [compiler, *COMPILE_DRIVER, "-fsyntax-only"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_under_sanitizers(sanitizer, tmp_path):
    """Red if SumColumns rounds its columns up, if PackSlice always copies kWidth columns,
    if Clamp returns its argument, if ForwardPacked runs tiles that have no tokens, or if
    scores of the second row are written one further."""
    compiler = next(filter(shutil.which, lookup_native.COMPILERS))
    program = tmp_path / "driver"
    flags = ["-O1", "-g", "-pthread", "-ffp-contract=fast", "-fno-sanitize-recover=all"]
    build = [compiler, *COMPILE_DRIVER, *flags, f"-fsanitize={sanitizer}"]
    subprocess.run([*build, "-o", str(program)], check=True, timeout=300)
    result = subprocess.run([program], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stdout == "ok\n", result.stderr[-3000:]


def test_a_failed_build_says_why(tmp_path, monkeypatch):
    """The compiler's own words, or that it had none.

    Mutation tried: `and` for `or` before 'no message'.
    """
    monkeypatch.setenv("MEMORYFORMER_CACHE", str(tmp_path))

    for words, message in (("boom", "boom"), ("", "no message")):

        def fails(command, words=words, **options):
            assert options["capture_output"] and options["text"]
            broken = "--version" not in command
            return subprocess.CompletedProcess(command, int(broken), "", words)

        monkeypatch.setattr(lookup_native.subprocess, "run", fails)
        with pytest.raises(OSError, match=f"failed on lookup_native.cc: {message}"):
            lookup_native._build()
    assert not list(tmp_path.rglob("*.so"))


class Recorded:
    """Stands for the library: notes how it is configured."""

    def memoryformer_configure(self, threads, level, reuse):
        self.last = (threads, level, reuse.value)


def test_how_it_is_configured(monkeypatch):
    """Threads of the environment or one a core, all instructions, copies from four tokens.

    Mutations: any default; any of the checks of $MEMORYFORMER_THREADS left out.
    """
    library = Recorded()
    monkeypatch.delenv("MEMORYFORMER_THREADS", raising=False)
    lookup_native._configure(library)
    assert library.last[1:] == (2, 4)
    monkeypatch.setenv("MEMORYFORMER_THREADS", "3")
    lookup_native._configure(library)
    assert library.last == (3, 2, 4)
    lookup_native._configure(library, 5, "portable", 7)
    assert library.last == (5, 0, 7)
    lookup_native._configure(library, 1, "avx2")
    assert library.last == (1, 1, 4)
    for wrong in ("two", "-1", "1.5"):
        monkeypatch.setenv("MEMORYFORMER_THREADS", wrong)
        with pytest.raises(ValueError, match=f"MEMORYFORMER_THREADS='{wrong}'"):
            lookup_native._configure(library)


def test_how_the_compiler_is_called(monkeypatch, tmp_path):
    """Its words are kept, it may take five minutes, and the folder is made.

    Mutations: `text=False`; `check=False`; any of the seconds; `parents=False`.
    """
    calls = []

    def run(command, **how):
        calls.append((command, how))
        if "-o" in command:
            pathlib.Path(command[-1]).touch()
        return subprocess.CompletedProcess(command, 0, "some version", "")

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):  # the second finds what the first has built
        monkeypatch.setenv("MEMORYFORMER_CACHE", str(tmp_path / "a" / "b"))
        built = lookup_native._build()
    words = {"capture_output": True, "text": True}
    assert [how for _, how in calls] == [
        words | {"check": True, "timeout": 60},
        words | {"timeout": 300},
        words | {"check": True, "timeout": 60},
    ]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [built.name]
    assert calls[0][0][-1] == "--version" and "-O3" in calls[1][0]
    assert re.fullmatch(r"lookup_native-[0-9a-f]{32}\.so", built.name)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **how: subprocess.CompletedProcess(
            command, "-o" in command, "some version", "x" * 400
        ),
    )
    monkeypatch.setenv("MEMORYFORMER_CACHE", str(tmp_path / "c"))
    with pytest.raises(OSError, match=r"failed on lookup_native.cc: x{300}$"):
        lookup_native._build()


def test_where_it_is_built(monkeypatch):
    """Mutation: `and` for `or`."""
    monkeypatch.setenv("MEMORYFORMER_CACHE", "/some/where")
    assert lookup_native._cache_folder() == pathlib.Path("/some/where")
    monkeypatch.delenv("MEMORYFORMER_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    folder = pathlib.Path("/home/me/.cache/memoryformer")
    assert lookup_native._cache_folder() == folder


def test_why_there_is_none_is_said_once(monkeypatch, caplog):
    """Mutations: nothing said; `available` the other way round."""
    monkeypatch.setattr(lookup_native, "_load", lambda: (None, "a reason of this test"))
    assert not lookup_native.available() and not lookup_native.available()
    assert [r.getMessage().split(": ")[-1] for r in caplog.records] == [
        "a reason of this test"
    ]
    x, weights = jnp.ones((1, 2)), jnp.ones((3, 2))
    tables, codes, scores, _ = operands((12, 3, 8, 20))
    for call in (
        lookup_native.configure,
        lambda: lookup_native.native(tables, codes, scores),
        lambda: lookup_native.matrix_product(x, weights, None),
        lambda: lookup_native.memory_layer(x, tables, None, None, 0, 2.0, 1.0),
    ):
        with pytest.raises(RuntimeError, match="a reason of this test"):
            call()
    library = ctypes.CDLL(None)
    monkeypatch.setattr(lookup_native, "_load", lambda: (library, ""))
    assert lookup_native.available() and lookup_native._library() is library


def test_types_that_it_does_not_take():
    """Mutations: `and` for `or`; any of the checks left out."""
    tables, codes, scores, _ = operands((12, 3, 8, 20))
    half = jnp.float16
    for wrong in (
        (tables.astype(half), codes, scores),
        (tables, codes, scores.astype(half)),
    ):
        assert not lookup_native.supports(wrong[0], wrong[2])
        with pytest.raises(TypeError, match="use 'xla'"):
            lookup_native.native(*wrong)
    assert lookup_native.supports(tables, scores)
    with pytest.raises(ValueError, match="a score with the power 2 of"):
        lookup_native.memory_layer(jnp.ones((1, 9)), tables, None, None, 2, 1.0, 1.0)
