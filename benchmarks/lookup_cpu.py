"""The native CPU lookup beside what people would use instead: one command, one process.

    python -m benchmarks.lookup_cpu                       # all cores
    python -m benchmarks.lookup_cpu --cores=1             # one core, for every peer
    python -m benchmarks.lookup_cpu --cores=1 --clock=cpu --keep_memory  # a busy machine
    python -m benchmarks.lookup_cpu --cases=decode --rounds=50

Peers: the XLA lookup, XLA's dense layer, and, if PyTorch is installed, `embedding_bag`
and the dense layer (MKL). Results are checked against each other before anything is
timed. Every round draws fresh codes, scores and gradients and runs every peer once, in
another order each round; the figures are medians of wall time and of the ratio within a
round, with quartiles. Writes lookup_cpu.json and prints a table.

The limit, written down before measuring (AMD Zen 5 at 3.7 GHz, one core, AVX-512):
119 GMAC/s; random 256-byte reads 119 GB/s from L2, 50 to 90 from L3; DRAM 37 GB/s in
sequence, 13 to 19 at random; first touch of memory 2 GB/s, with huge pages 17.
N tokens, d = F = 1024, tau = 8: a token reads K F = 131,072 values, 1/8 of dense.

    work               bytes that bind                          limit     dense at peak
    forward N=4096     512 KiB a token from L2: 18 ms,          22 ms     36 ms
                       134 MB of tables from DRAM once: 4 ms
    backward N=4096    512 KiB of dy a token from L2/L3: 18     30 ms     72 ms
                       to 23 ms, T read and dT written: 11 ms
    N=1, float32       512 KiB of random 4 KiB rows: 30 us      30 us     113 us
    N=1, int8          128 KiB of random 1 KiB rows: 8 us       8 us

Prediction: 1.4x the dense forward, 1.8x forward and backward, 3.5 to 4x at N=1 and 8x
with int8, less what threads and misses of the TLB cost. Measured, on two cores with
AVX-512: 2.2x MKL's dense layer, 2.4x with gradients, 5.2x at N=1 and 6.4x with int8
rows; docs/results.md has the rest.
"""

import ctypes
import dataclasses
import importlib.util
import json
import pathlib
import types
from collections.abc import Callable

from benchmarks import arguments, timing

FLAGS = arguments.Parser(__doc__)
FLAGS.names("cases")
FLAGS.number("rounds", 21, low=2)
FLAGS.cores()
FLAGS.output("output", "lookup_cpu.json")
FLAGS.clock()
FLAGS.add_argument("--keep_memory", action="store_true")
FLAGS.output("plot")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.ops.lookup import narrow as narrow_rows
from memoryformer.ops.lookup import native as lookup_native
from memoryformer.ops.lookup import xla as lookup_xla

HAVE_TORCH = importlib.util.find_spec("torch") is not None
DECODE_LAYERS = 16  # their rows and weights do not fit the caches
TOLERANCE = 1e-4  # relative to the largest value, between float32 sums of any order

LOOKUPS = {"native": lookup_native.native, "xla lookup": lookup_xla.scan_tables}

Peers = dict[str, Callable]  # name -> function of the round's inputs


def main(argv: list[str] | None = None) -> None:
    """Run the cases asked for; print and write what was measured."""
    flags = FLAGS.parse_args(argv)
    chosen = FLAGS.chosen("cases", flags.cases, CASES)
    if flags.keep_memory:
        keep_memory()
    cores = timing.use_cores(flags.cores)
    if not lookup_native.available():
        raise SystemExit("no C++ compiler: nothing to measure")
    results = {
        "cores": cores,
        "clock": flags.clock,
        "keep_memory": flags.keep_memory,
        "cases": {},
    }
    if HAVE_TORCH:
        import torch

        torch.set_num_threads(cores)
    for name in chosen:
        draw, peers, check = CASES[name]()
        inputs = draw(0)
        check({peer: run(inputs) for peer, run in peers.items()})
        clock = timing.CLOCKS[flags.clock]
        times = timing.in_turns(peers, flags.rounds, clock, draw)
        results["cases"][name] = summarise(times)
        print_case(name, results["cases"][name])
    flags.output.write_text(json.dumps(results, indent=2) + "\n")
    if flags.plot:
        plot(results["cases"], flags.plot)


def keep_memory() -> None:
    """Let malloc reuse what is freed: the same as MALLOC_MMAP_MAX_=0, and no trimming.

    Otherwise every large result is fresh memory, whose first touch can cost more than
    the work: 134 MB of table gradients took 10 to 300 ms on a virtual machine.
    """
    libc = ctypes.CDLL(None)
    m_mmap_max, m_trim_threshold = -4, -1
    if not (libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, -1)):
        raise SystemExit("--keep_memory needs glibc")


def summarise(times: dict[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    """Quartiles of milliseconds, and of the ratio to the first peer round by round."""
    first = times[next(iter(times))]
    return {
        name: {
            "ms": timing.quartiles([1e3 * t for t in series]),
            "ratio": timing.ratio(series, first),
        }
        for name, series in times.items()
    }


def print_case(name: str, summary: dict) -> None:
    """One table: milliseconds, and how many times the native lookup's."""
    print(f"\n{name:24} {'median ms':>10} {'quartiles':>18} {'x native':>9}")
    for peer, s in summary.items():
        low, median, high = s["ms"]
        spread = f"{low:.3f}..{high:.3f}"
        ratio = "{1:.2f} [{0:.2f}, {2:.2f}]".format(*s["ratio"])
        print(f"  {peer:22} {median:10.3f} {spread:>18}   {ratio}", flush=True)


def plot(cases: dict[str, dict], path: pathlib.Path) -> None:
    """Bars of how many times the native lookup's time each peer takes, a panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(cases), figsize=(3.6 * len(cases), 2.8), layout="constrained"
    )
    for axis, (name, summary) in zip(np.atleast_1d(axes), cases.items(), strict=True):
        low, median, high = np.transpose([s["ratio"] for s in summary.values()])
        colours = ["C0" if peer.startswith("native") else "C7" for peer in summary]
        axis.barh(
            list(summary), median, color=colours, xerr=[median - low, high - median]
        )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("times as long")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- Inputs. -------------------------------------------------------------------------


@dataclasses.dataclass
class Inputs:
    """What one round looks up, in every layer; `torch` holds the same for its peers."""

    codes: jax.Array  # [layers, N, K]
    scores: jax.Array  # [N, K]
    dy: jax.Array  # [N, F]
    x: jax.Array  # [N, D], for dense layers
    torch: object = None


def drawer(N: int, K: int, C: int, F: int, layers: int = 1) -> Callable:
    """A function from the round's number to its inputs."""

    def draw(seed: int) -> Inputs:
        generator = np.random.default_rng(seed)
        shapes = (N, K), (N, F), (N, K * (C.bit_length() - 1))
        scores, dy, x = (generator.standard_normal(s, np.float32) for s in shapes)
        codes = generator.integers(0, C, (layers, N, K), np.int32)
        arrays = [jnp.asarray(a) for a in (codes, scores, dy, x)]
        jax.block_until_ready(arrays)
        return Inputs(*arrays, torch=torch_inputs(codes, C, scores, dy, x))

    return draw


def torch_inputs(codes, num_buckets, scores, dy, x):
    """The same as tensors, with the flat rows and offsets that `embedding_bag` takes."""
    if not HAVE_TORCH:
        return None
    from torch import from_numpy

    _, N, K = codes.shape
    flat = (codes + num_buckets * np.arange(K)).reshape(len(codes), -1)
    offsets = from_numpy(K * np.arange(N))
    return types.SimpleNamespace(
        bags=[(from_numpy(rows), offsets) for rows in flat],
        scores=from_numpy(scores.reshape(-1)),
        dy=from_numpy(dy),
        x=from_numpy(x),
    )


def make_tables(K: int, C: int, F: int, seed: int = 0) -> jax.Array:
    """Random [K, C, F]."""
    return jax.random.normal(jax.random.key(seed), (K, C, F))


def make_kernel(K: int, C: int, F: int, seed: int = 0) -> jax.Array:
    """Random [K tau, F]: the dense layer of the same widths."""
    shape = (K * (C.bit_length() - 1), F)
    return jax.random.normal(jax.random.key(100 + seed), shape) / 32


# --- Cases: each returns (draw inputs of a round, peers, check of their results). ----


def narrow_tables(tables: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Int8 tables and the scale of their rows."""
    scale = 1 / 25
    rows = (tables / scale).round().clip(-127, 127).astype(jnp.int8)
    return narrow_rows.in_huge_pages(rows), jnp.full(
        tables.shape[:2], scale, jnp.float32
    )


def native_int8(tables, codes, scores):
    """The native lookup of `narrow_tables`."""
    return lookup_native.native_int8(*tables, codes, scores)


def agree_narrow(results: dict[str, object]) -> None:
    """`agree`, but that tables of fewer bits differ by their rounding."""
    for name, tolerance in (("native bf16", 0.01), ("native int8", 0.05)):
        if name in results:
            agree({"": results["native"], name: results.pop(name)}, tolerance)
    agree(results)


def forward_case(N: int, K: int, C: int, F: int, dense: bool = True):
    """y of all peers from the same codes and scores; the dense layer has D = K tau."""
    tables = make_tables(K, C, F)
    kernel = make_kernel(K, C, F) if dense else None
    peers = {
        name: compiled(function, lambda i: (tables, i.codes[0], i.scores))
        for name, function in LOOKUPS.items()
    }
    if dense:
        narrow = narrow_tables(tables)
        peers["native int8"] = compiled(
            native_int8, lambda i: (narrow, i.codes[0], i.scores)
        )
        peers["xla dense"] = compiled(jnp.matmul, lambda i: (i.x, kernel))
    return drawer(N, K, C, F), peers | torch_peers([tables], [kernel]), agree_narrow


def train_case(N: int, K: int, C: int, F: int, dense: bool = True):
    """Y, dT and ds; for the dense layer y, dx and dW."""
    tables = make_tables(K, C, F)
    kernel = make_kernel(K, C, F) if dense else None

    def lookup_with_gradients(function):
        def run(tables, codes, scores, dy):
            y, vjp = jax.vjp(lambda t, s: function(t, codes, s), tables, scores)
            return y, *vjp(dy)

        return run

    def dense_with_gradients(x, kernel, dy):
        y, vjp = jax.vjp(jnp.matmul, x, kernel)
        return y, *vjp(dy)

    peers = {
        name: compiled(
            lookup_with_gradients(function),
            lambda i: (tables, i.codes[0], i.scores, i.dy),
        )
        for name, function in LOOKUPS.items()
    }
    if dense:
        peers["xla dense"] = compiled(
            dense_with_gradients, lambda i: (i.x, kernel, i.dy)
        )
    peers |= torch_peers([tables], [kernel], gradients=True)
    return drawer(N, K, C, F), peers, agree


def decode_case(N: int = 1, K: int = 128, C: int = 256, F: int = 1024):
    """N tokens through DECODE_LAYERS layers, each with tables and weights of its own."""
    # Every peer's weights lie in huge pages, as inference.prepare puts them.
    huge = narrow_rows.in_huge_pages
    tables = [huge(make_tables(K, C, F, seed)) for seed in range(DECODE_LAYERS)]
    kernels = [huge(make_kernel(K, C, F, seed)) for seed in range(DECODE_LAYERS)]
    bf16 = [huge(t.astype(jnp.bfloat16)) for t in tables]
    int8 = [narrow_tables(t) for t in tables]

    def every_layer(function, parameters):
        def run(parameters, codes, scores):
            each = zip(parameters, codes, strict=True)
            return jnp.stack([function(p, c, scores) for p, c in each])

        return compiled(run, lambda i: (parameters, i.codes, i.scores))

    def every_dense(kernels, x):
        return jnp.stack([x @ kernel for kernel in kernels])

    peers = {name: every_layer(f, tables) for name, f in LOOKUPS.items()}
    peers["native bf16"] = every_layer(lookup_native.native, bf16)
    peers["native int8"] = every_layer(native_int8, int8)
    peers["xla dense"] = compiled(every_dense, lambda i: (kernels, i.x))
    peers |= torch_peers(tables, kernels)

    def check(results):
        results = {name: np.stack([*y]) for name, y in results.items()}
        agree_narrow(results)

    return drawer(N, K, C, F, DECODE_LAYERS), peers, check


def compiled(function: Callable, arguments: Callable[[Inputs], tuple]) -> Callable:
    """A peer in jax: compiled, and waited for."""
    function = jax.jit(function)
    return lambda inputs: jax.block_until_ready(function(*arguments(inputs)))


def torch_peers(tables, kernels, gradients: bool = False) -> Peers:
    """`embedding_bag` and the dense product of every layer, in PyTorch if it is there."""
    if not HAVE_TORCH:
        return {}
    import torch

    def tensor(array):
        return torch.from_dlpack(array).requires_grad_(gradients)

    def bag(rows, i, layer):
        indices, offsets = i.torch.bags[layer]
        scores = i.torch.scores.detach().requires_grad_(gradients)
        y = torch.nn.functional.embedding_bag(
            indices, rows, offsets, mode="sum", per_sample_weights=scores
        )
        return y, (rows, scores)

    def dense(kernel, i, layer):
        x = i.torch.x.detach().requires_grad_(gradients)
        return x @ kernel, (x, kernel)

    def peer(function, parameters):
        def run(i):
            results = []
            with torch.set_grad_enabled(gradients):
                for layer, parameter in enumerate(parameters):
                    y, variables = function(parameter, i, layer)
                    results.append(y.detach())
                    if gradients:
                        results += torch.autograd.grad(y, variables, i.torch.dy)
            return results

        return run

    rows = [tensor(t.reshape(-1, t.shape[-1])) for t in tables]
    peers = {"torch embedding_bag": peer(bag, rows)}
    if kernels[0] is not None:
        peers["torch dense"] = peer(dense, [tensor(k) for k in kernels])
    return peers


def agree(results: dict[str, object], tolerance: float = TOLERANCE) -> None:
    """Every lookup's results equal the first's; a dense layer has others."""
    first, *others = [r for name, r in results.items() if "dense" not in name]
    for other in others:
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            a, b = np.asarray(a), np.asarray(b).reshape(a.shape)
            error = np.abs(a - b).max() / np.abs(a).max()
            if not error <= tolerance:
                raise AssertionError(f"results differ by {error}")


CASES = {
    "forward": lambda: forward_case(4096, 128, 256, 1024),
    "train": lambda: train_case(4096, 128, 256, 1024),
    "decode": decode_case,
    "forward tau=4": lambda: forward_case(4096, 256, 16, 1024),
    "quickstart qkv": lambda: train_case(1024, 16, 256, 384, dense=False),
    "quickstart up": lambda: train_case(1024, 16, 256, 160, dense=False),
    "quickstart down": lambda: train_case(1024, 16, 1024, 128, dense=False),
    "quickstart qkv forward": lambda: forward_case(1024, 16, 256, 384, dense=False),
    "quickstart up forward": lambda: forward_case(1024, 16, 256, 160, dense=False),
    "quickstart down forward": lambda: forward_case(1024, 16, 1024, 128, dense=False),
}

if __name__ == "__main__":
    arguments.run(main)
