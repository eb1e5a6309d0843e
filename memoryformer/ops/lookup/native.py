"""The lookup on CPU as C++, compiled on first use and called through XLA's FFI.

The system compiler ($CXX, or the first of c++, g++, clang++) builds `lookup_native.cc` into
$MEMORYFORMER_CACHE (default ~/.cache/memoryformer), once per source, flags, compiler, kind
of machine and jax. Without a compiler `available` is False and callers use `xla`.

$MEMORYFORMER_THREADS bounds the threads of one call (default: the cores this process may
use); results do not depend on it, bit for bit. Start at `native`.
"""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from memoryformer.notation import Array, ArrayOrShape, Codes, Float, Int, Scores, Tables

SOURCE = "lookup_native.cc"  # it includes the headers beside it
FLAGS = (
    "-O3 -std=c++17 -fPIC -shared -pthread -ffp-contract=fast -fno-math-errno -w"
).split()
COMPILERS = ("c++", "g++", "clang++")
BUILD_SECONDS = 300  # a compiler that hangs must not hang the run
TARGETS = (
    "lookup_forward",
    "lookup_backward",
    "memory_layer",
    "cache_attention",
    "blocks",
    "first_largest",
    "matrix_product",
    "integer_product",
    "screened_top",
    "gradient_norm",
    "adamw",
    "head_nats",
)
INT4_GROUP = 64  # 4-bit weights that share a scale
INSTRUCTION_SETS = ("portable", "avx2", "avx512")
POWERS = (0, 1)  # of ||z||_1 in a score, that `memory_layer` computes
PACKING_REUSE = 4  # tokens per bucket from which copying a table's slice pays

_LOG = logging.getLogger(__name__)


@jax.custom_vjp
def native(tables: Tables, codes: Codes, scores: Scores) -> Float[Array, "N F"]:
    """Sum scored rows on CPU: float32 or bfloat16 [K,C,F], int32 [N,K], [N,K] -> [N,F].

    Codes outside [0, C) are clamped. Sums are in float32 and in the order of k.
    Raises RuntimeError without a compiler, TypeError for other types.
    """
    return _forward(tables, codes, scores, jnp.zeros((0,), jnp.float32))


def native_int8(
    tables: Int[Array, "K C F"],
    scales: Float[Array, "K C"],
    codes: Codes,
    scores: Scores,
) -> Float[Array, "N F"]:
    """Sum scored int8 rows, sum_k s[n,k] * scale_k[h] * T_k[h]; not differentiable."""
    return _forward(tables, codes, scores, scales.astype(jnp.float32))


def memory_layer(
    x: Float[Array, "N D"],
    tables: Tables | Int[Array, "K C F"],
    scales: Float[Array, "K C"] | None,
    bias: Float[Array, " F"] | None,
    power: int,
    beta: ArrayLike,
    gamma: ArrayLike,
    rows_read: int = 1,
) -> Float[Array, "N F"]:
    """Hash, score and sum in one call: sum_k s(z_k) T_k[h(z_k)] + b; not differentiable.

    Tables are float32, bfloat16, or int8 with `scales`; `power`, beta and gamma are those of
    `hashing.SCORES`; `rows_read` of 2 adds the rows of `hashing.second_bucket`. Codes equal `hashing.hash_codes` bit for bit, scores to 1e-6.
    Raises ValueError for a power that is not in `POWERS`.
    """
    if power not in POWERS:
        raise ValueError(
            f"a score with the power {power} of |z|: the native memory layer has only "
            f"{POWERS}; let XLA compute it."
        )
    knobs = jnp.stack([jnp.asarray(v, jnp.float32) for v in (beta, gamma)])
    y = jax.ShapeDtypeStruct((x.shape[0], tables.shape[2]), jnp.float32)
    call = ffi_call("memory_layer", y, vmap_method="sequential")
    floats = (_float32_or_empty(a) for a in (scales, bias))
    two = rows_read == 2
    x = x.astype(jnp.float32)
    return call(x, tables, *floats, knobs, power=bool(power), two_rows=two)


def matrix_product(
    x: Float[Array, "N D"], weights: Array, scales: Array | None
) -> Float[Array, "N V"]:
    """Multiply a few vectors with a matrix stored by output; not differentiable.

    Weights are float32 or bfloat16 [V, D], int8 with scales [V], or uint8 [V, D / 2] pairs
    of 4 bits with scales [V, D / INT4_GROUP] (see `narrow`).
    """
    y = jax.ShapeDtypeStruct((x.shape[0], weights.shape[0]), jnp.float32)
    call = ffi_call("matrix_product", y, vmap_method="sequential")
    return call(x.astype(jnp.float32), weights, _float32_or_empty(scales))


def read_counts(counts: ctypes.Array) -> None:
    """Copy what `screened.top` has counted into four int64; leave them where nothing is built."""
    library = _load()[0]
    if library is not None:
        library.memoryformer_screen_counts(counts)


def _float32_or_empty(array):
    return jnp.zeros((0,), jnp.float32) if array is None else array.astype(jnp.float32)


def ffi_call(target: str, results: Any, **options: Any) -> Callable[..., Any]:
    """Return XLA's call of one of `TARGETS`; raises RuntimeError without a compiler."""
    _library()
    return jax.ffi.ffi_call(f"memoryformer_{target}", results, **options)


def supports(
    tables: Float[ArrayOrShape, "K C F"], scores: Float[ArrayOrShape, "*B K"]
) -> bool:
    """Whether `native` takes these types."""
    return scores.dtype == jnp.float32 and tables.dtype in (jnp.float32, jnp.bfloat16)


def available() -> bool:
    """Whether the library is built and loaded; builds it, and warns once if it cannot."""
    if reason := why_not_built():
        _warn_once(reason)
    return not reason


def why_not_built() -> str:
    """Say why there is no library, after trying to build it; '' if there is one."""
    return _load()[1]


def configure(
    num_threads: int | None = None,
    instruction_set: str = "avx512",
    packing_reuse: int = PACKING_REUSE,
) -> None:
    """Bound threads and instructions of later calls in this process (for measurements).

    `num_threads` None means $MEMORYFORMER_THREADS, or one per core.
    """
    _configure(_library(), num_threads, instruction_set, packing_reuse)


def _native_fwd(tables, codes, scores):
    return native(tables, codes, scores), (tables, codes, scores)


def _native_bwd(residuals, dy):
    tables, _, scores = residuals
    dtables, dscores = _call("backward", (tables, scores), *residuals, dy)
    return dtables, None, dscores


native.defvjp(_native_fwd, _native_bwd)


def _forward(tables, codes, scores, scales):
    shape = (codes.shape[0], tables.shape[2])
    y = jax.ShapeDtypeStruct(shape, jnp.float32)
    return _call("forward", (y,), tables, codes, scores, scales)[0]


def _call(direction, results, tables, codes, scores, *others):
    kinds = (jnp.float32, jnp.bfloat16, jnp.int8)
    if scores.dtype != jnp.float32 or tables.dtype not in kinds:
        raise TypeError(
            f"implementation='native' takes float32 or bfloat16 tables and float32 "
            f"scores, not {tables.dtype} and {scores.dtype}: use 'xla'."
        )
    operands = (tables, codes.astype(jnp.int32), scores, *others)
    results = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results]
    call = ffi_call(f"lookup_{direction}", results, vmap_method="sequential")
    return call(*operands)


@functools.cache
def _warn_once(reason: str) -> None:
    _LOG.warning("native lookup unavailable, the slower XLA lookup is used: %s", reason)


def _library() -> ctypes.CDLL:
    library, error = _load()
    if library is None:
        raise RuntimeError(error)
    return library


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Build, load and register once per process: (library, '') or (None, reason)."""
    try:
        library = ctypes.CDLL(str(_build()))
        for target in TARGETS:
            name = f"memoryformer_{target}"
            capsule = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
        _configure(library)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return None, " ".join(str(error).split())
    return library, ""


def _configure(
    library, num_threads=None, instruction_set="avx512", packing_reuse=PACKING_REUSE
):
    if num_threads is None:
        variable = os.environ.get("MEMORYFORMER_THREADS", "0")
        if not variable.isdecimal():
            raise ValueError(f"MEMORYFORMER_THREADS={variable!r}: not a whole number.")
        num_threads = int(variable)
    level = INSTRUCTION_SETS.index(instruction_set)
    library.memoryformer_configure(num_threads, level, ctypes.c_int64(packing_reuse))


def _build() -> pathlib.Path:
    """Compile unless the cache holds it; processes that race all end with a whole file."""
    folder = pathlib.Path(__file__).with_name("native")
    compiler = find_compiler()
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    parts = [
        path.read_text() for path in [folder / SOURCE, *sorted(folder.glob("*.h"))]
    ]
    parts += [*FLAGS, *compiler, version, jax.__version__, jax.lib.__version__]
    parts.append(platform.machine())  # of machines that share a home, not all alike
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    target = _cache_folder() / f"lookup_native-{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        output = pathlib.Path(temporary) / target.name
        include = jax.ffi.include_dir()
        command = [*compiler, *FLAGS, f"-I{include}", str(folder / SOURCE)]
        result = subprocess.run(
            [*command, "-o", str(output)],
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
        )
        if result.returncode:
            detail = result.stderr.strip()[:300] or "no message"
            raise OSError(f"{' '.join(compiler)} failed on {SOURCE}: {detail}")
        os.replace(output, target)
    return target


def find_compiler() -> list[str]:
    """Return the words of $CXX, or the first compiler found; raises OSError."""
    wanted = shlex.split(os.environ.get("CXX", ""))  # such as 'ccache g++'
    for name in wanted[:1] or COMPILERS:
        if path := shutil.which(name):
            return [path, *wanted[1:]]
    tried = " ".join(wanted) or ", ".join(COMPILERS)
    raise OSError(f"no C++ compiler found ({tried}): install g++ or set CXX.")


def _cache_folder() -> pathlib.Path:
    folder = os.environ.get("MEMORYFORMER_CACHE", "")
    return pathlib.Path(folder or "~/.cache/memoryformer").expanduser()
