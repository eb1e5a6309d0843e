"""The lookup on an NVIDIA GPU: everything checked and timed in one go.

    python -m benchmarks.gpu --output=gpu.json      # on an H100 or H200
    python -m benchmarks.gpu --check                # any machine, toy sizes, interpreted

Every result is compared with float64 sums, and the kernels' with themselves, before anything
is timed. In a round every peer runs on the same fresh inputs, in random order and several
times in a row; a row of the table is the median and the quartiles of the rounds. Peers in
PyTorch (`embedding_bag`, cuBLAS) take part where it sees the GPU. A peer that fails is named
with its error and left out.

PREDICTIONS were written before any run on a GPU; the table shows them beside the medians.
"""

import functools
import importlib.util
import json
import os
import time
from collections.abc import Callable

from benchmarks import arguments, timing

KINDS = ("forward", "backward", "train")

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("--check", action="store_true", help="toy sizes, interpreted")
FLAGS.number("rounds", 15)
FLAGS.names("cases")
FLAGS.names("kinds", KINDS)
FLAGS.output("output", "gpu.json")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib import xla_client

from benchmarks import lookup_cpu
from memoryformer.ops.lookup import gpu as lookup_gpu
from memoryformer.ops.lookup import gpu_order
from memoryformer.ops.lookup import xla as lookup_xla

# Milliseconds on an H200 at N=16384, K=128, tau=8, F=1024, bfloat16 tables; (best, worst).
PREDICTIONS = {
    "forward gpu 16 tokens": (0.9, 1.1),
    "forward xla group 8": (1.2, 1.5),
    "forward dense": (0.045, 0.06),
    "backward gpu": (1.1, 1.5),
    "backward gpu float32 dy": (1.8, 2.2),
    "backward sort": (0.1, 0.3),
    "backward xla product": (2.2, 2.6),
    "train dense": (0.14, 0.18),
}
CHECKED = 32  # tokens and rows compared with float64 sums
Peers = dict[str, Callable]


def main(argv: list[str] | None = None) -> dict:
    """Ceilings, then every case: check, time, print, write."""
    flags = FLAGS.parse_args(argv)
    cases = TOY_CASES if flags.check else CASES
    chosen = FLAGS.chosen("cases", flags.cases, cases)
    kinds = FLAGS.chosen("kinds", flags.kinds, KINDS)
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not flags.check:
        raise SystemExit(f"the platform is {jax.default_backend()}, not gpu: --check")
    results = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "interpreted": not on_gpu,
        "ceilings": ceilings(64 if flags.check else 8192),
        "cases": {},
    }
    if on_gpu:
        flags.output.with_suffix(".target.txt").write_text(target_config())
    print(json.dumps(results["ceilings"], indent=2))
    for name in chosen:
        case = Case(**cases[name], interpret=not on_gpu)
        for kind in kinds:
            failures = {}
            peers = checked(case, kind, getattr(case, kind)(), failures)
            times = measure(case, peers, flags.rounds if on_gpu else 1, on_gpu)
            results["cases"][f"{name}, {kind}"] = times | failures
            show(f"{name}, {kind}", times, failures, name == "reference")
        flags.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


def target_config() -> str:
    """What XLA needs to compile for this GPU on a machine without it."""
    topology = xla_client.get_topology_for_devices(jax.devices())
    return str(getattr(topology, "target_config", None) or topology)


# --- Ceilings. ------------------------------------------------------------------------


def ceilings(size: int) -> dict[str, float]:
    """GB/s of a copy and of row gathers, TFLOP/s of a bfloat16 product [size, size]."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    block = jax.random.normal(jax.random.key(1), (size * 16, size))  # 4 GiB of float32
    rows = jax.random.normal(jax.random.key(2), (size, 1024), jnp.bfloat16)  # 16 MiB
    index = jax.random.randint(jax.random.key(3), (size * 16,), 0, size)

    @jax.jit
    def gather(rows, index):  # sums, so that little is written
        taken = jnp.take(rows, index.reshape(64, -1), axis=0, mode="clip")
        return jnp.sum(taken.astype(jnp.float32), axis=0)

    copy = seconds(jax.jit(lambda a: a + 1), block)
    product = seconds(jax.jit(lambda a: a @ a), x)
    return {
        "copy GB/s": 2 * block.nbytes / copy / 1e9,
        "product TFLOP/s": 2 * size**3 / product / 1e12,
        "L2 gather GB/s": index.size * 2048 / seconds(gather, rows, index) / 1e9,
    }


def seconds(function: Callable, *arguments, repeats: int = 10) -> float:
    """Of one call, in a row of `repeats`, after two that are not counted."""
    for _ in range(2):  # results are dropped as they come: their memory is used again
        result = function(*arguments)
    jax.block_until_ready(result)
    start = time.perf_counter()
    for _ in range(repeats):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


# --- Cases: the same sizes for every peer. --------------------------------------------


class Case:
    """Sizes, a draw of inputs, the peers of each direction and their check."""

    def __init__(self, N, K=128, C=256, F=1024, skewed=False, interpret=False):
        """N tokens, K tables of C rows of width F; `skewed` codes favour a few rows."""
        self.sizes = N, K, C, F
        self.skewed, self.interpret = skewed, interpret
        key = jax.random.key(0)
        self.tables = jax.random.normal(key, (K, C, F), jnp.bfloat16)
        width = K * (C.bit_length() - 1)
        self.kernel = jax.random.normal(key, (width, F), jnp.bfloat16) / 32

    @functools.cache  # noqa: B019  a case lives as long as the process
    def draw(self, seed: int) -> dict[str, jax.Array]:
        """Codes [N, K], scores, dy (as a bfloat16 model has it) and a dense layer's x."""
        N, K, C, F = self.sizes
        keys = jax.random.split(jax.random.key(seed), 4)
        uniform = jax.random.uniform(keys[0], (N, K))
        codes = jnp.int32(C * uniform**4) if self.skewed else jnp.int32(C * uniform)
        if self.skewed:  # and as many equal tokens as padding makes
            codes = codes.at[: N // 10].set(0)
        dy = jax.random.normal(keys[2], (N, F), jnp.bfloat16).astype(jnp.float32)
        x = jax.random.normal(keys[3], (N, self.kernel.shape[0]), jnp.bfloat16)
        scores = jax.random.normal(keys[1], (N, K))
        inputs = {"codes": codes, "scores": scores, "dy": dy, "x": x, "seed": seed}
        return jax.block_until_ready(inputs)

    def lookup(self, **sizes) -> Callable:
        """The kernels with other block sizes: (tables, codes, scores) -> y."""
        return functools.partial(lookup_gpu.forward, interpret=self.interpret, **sizes)

    def forward(self) -> Peers:
        """Y of every implementation."""
        names = ("codes", "scores")
        peers = {
            f"gpu {tokens} tokens": self.peer(self.lookup(tokens=tokens), *names)
            for tokens in ((16,) if self.interpret else (16, 8, 32))
        }
        if not self.interpret:
            for tokens in (16, 32):
                narrow = self.lookup(tokens=tokens, max_tile=512)
                peers[f"gpu {tokens} tokens, 512 columns"] = self.peer(narrow, *names)
        for group in (4, 8, 16):
            peers[f"xla group {group}"] = self.peer(scan_in_groups(group), *names)
        peers["xla onehot"] = self.peer(lookup_xla.onehot_products, *names)
        peers["dense"] = jax.jit(lambda i: i["x"] @ self.kernel)
        return peers | torch_peers(self, gradients=False)

    def backward(self) -> Peers:
        """(dT, ds) of every implementation, and of ours the sort alone."""
        names = ("codes", "scores", "dy")
        backward = functools.partial(lookup_gpu.backward, interpret=self.interpret)
        peers = {"gpu": self.peer(backward, *names)}
        variants = ({"run": 512}, {"unroll": 1}, {"unroll": 4}, {"max_tile": 512})
        for sizes in () if self.interpret else variants:
            label = " ".join(f"{key}={value}" for key, value in sizes.items())
            peers[f"gpu {label}"] = self.peer(
                functools.partial(backward, **sizes), *names
            )

        def noisy(tables, codes, scores, dy):  # no bfloat16 values: twice the bytes
            return backward(tables, codes, scores, dy * jnp.float32(1.0009765))

        if not self.interpret:
            peers["gpu float32 dy"] = self.peer(noisy, *names)
        peers["xla product"] = self.peer(gradients(lookup_xla.scan_tables), *names)
        peers["xla onehot"] = self.peer(gradients(lookup_xla.onehot_products), *names)
        peers["xla scatter"] = self.peer(scatter_gradients, *names)
        num_buckets = self.sizes[2]
        peers["sort"] = jax.jit(
            lambda i: gpu_order.sort_by_code(i["codes"], num_buckets)
        )
        return peers

    def train(self) -> Peers:
        """(y, dT, ds) of every implementation; of the dense layer (y, dx, dW)."""
        names = ("codes", "scores", "dy")
        both = with_gradients(lambda t, c, s: lookup_gpu.gpu(t, c, s, self.interpret))
        peers = {
            "gpu": self.peer(both, *names),
            "xla": self.peer(with_gradients(lookup_xla.scan_tables), *names),
        }

        @jax.jit
        def dense(inputs):
            y, vjp = jax.vjp(jnp.matmul, inputs["x"], self.kernel)
            return y, *vjp(inputs["dy"].astype(y.dtype))

        return peers | {"dense": dense} | torch_peers(self, gradients=True)

    def peer(self, function: Callable, *names: str) -> Callable:
        """A lookup of these tables, compiled, as a function of the inputs."""
        compiled = jax.jit(lambda t, i: function(t, *(i[name] for name in names)))
        return lambda inputs: compiled(self.tables, inputs)


def scan_in_groups(group: int) -> Callable:
    """`scan_tables` with another number of tables in a step."""

    def run(tables, codes, scores):
        before, lookup_xla.SCAN_GROUP = lookup_xla.SCAN_GROUP, group
        try:  # a constant that is read while it is traced
            return lookup_xla.scan_tables(tables, codes, scores)
        finally:
            lookup_xla.SCAN_GROUP = before

    return run


def with_gradients(function: Callable) -> Callable:
    """(y, dT, ds)."""

    def run(tables, codes, scores, dy):
        y, vjp = jax.vjp(lambda t, s: function(t, codes, s), tables, scores)
        return y, *vjp(dy)

    return run


def gradients(function: Callable) -> Callable:
    """(dT, ds)."""
    return lambda *arguments: with_gradients(function)(*arguments)[1:]


def scatter_gradients(tables, codes, scores, dy):
    """(dT, ds) by float32 atomics, in no fixed order: the peer the sort must beat."""

    def one_table(_, operands):
        rows, codes, scores = operands
        dscores = jnp.sum(jnp.take(rows, codes, axis=0, mode="clip") * dy, axis=-1)
        zeros = jnp.zeros(rows.shape, jnp.float32)
        drows = zeros.at[codes].add(scores[:, None] * dy, mode="drop")
        return None, (drows.astype(rows.dtype), dscores)

    _, (dtables, dscores) = jax.lax.scan(one_table, None, (tables, codes.T, scores.T))
    return dtables, dscores.T


def torch_peers(case: Case, gradients: bool) -> Peers:
    """`embedding_bag` and the dense product in PyTorch, if it sees this GPU."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    if not torch.cuda.is_available() or jax.default_backend() != "gpu":
        return {}
    _, K, C, F = case.sizes
    rows = torch.from_dlpack(case.tables).reshape(-1, F).requires_grad_(gradients)
    kernel = torch.from_dlpack(case.kernel).clone().requires_grad_(gradients)

    @functools.cache
    def converted(seed):
        inputs = case.draw(seed)
        inputs = {k: torch.from_dlpack(v) for k, v in inputs.items() if k != "seed"}
        first = C * torch.arange(K, device=rows.device, dtype=torch.int32)
        return inputs | {"flat": (inputs["codes"] + first).contiguous()}

    def bag(inputs):
        i = converted(inputs["seed"])
        scores = i["scores"].to(rows.dtype).requires_grad_(gradients)
        y = torch.nn.functional.embedding_bag(
            i["flat"], rows, mode="sum", per_sample_weights=scores
        )
        if not gradients:
            return y
        return y, *torch.autograd.grad(y, (rows, scores), i["dy"].to(y.dtype))

    def dense(inputs):
        i = converted(inputs["seed"])
        x = i["x"].detach().requires_grad_(gradients)
        y = x @ kernel
        if not gradients:
            return y
        return y, *torch.autograd.grad(y, (x, kernel), i["dy"].to(y.dtype))

    return {"torch embedding_bag": bag, "torch dense": dense}


# --- Checks and times. ----------------------------------------------------------------


def checked(case: Case, kind: str, peers: Peers, failures: dict) -> Peers:
    """The peers that agree with float64 sums; ours must, and twice with the same bits."""
    inputs, passed = case.draw(0), {}
    wanted = definition(case, inputs, kind)
    for name, run in peers.items():
        if "dense" in name or name == "sort":  # other functions
            passed[name] = run
            continue
        try:
            got = jax.tree.map(as_numpy, run(inputs))
        except Exception as error:
            if name.startswith("gpu"):
                raise
            failures[name] = {"error": str(error).split("\n")[0][:200]}
            continue
        # PyTorch rounds scores to bfloat16; the peer with other dy has 0.1 % more.
        tolerance = 0.02 if "torch" in name else 4e-3
        for what, sample in samples(case, kind, got).items():
            error = np.abs(sample - wanted[what]).max() / np.abs(wanted[what]).max()
            if not error < (
                tolerance if what == "dT" or "dy" in name else tolerance / 4
            ):
                raise AssertionError(f"{kind}, {name}: {what} is off by {error:.1e}")
        if name.startswith("gpu"):
            again = jax.tree.map(as_numpy, run(inputs))
            jax.tree.map(np.testing.assert_array_equal, got, again)
        passed[name] = run
    return passed


def chosen(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, and rows (k, c), that are compared."""
    N, K, C, _ = case.sizes
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, N, CHECKED)
    return tokens, rng.integers(0, K, CHECKED), rng.integers(0, C, CHECKED)


def samples(case: Case, kind: str, results) -> dict[str, np.ndarray]:
    """Y and ds of some tokens, dT of some rows, in float64."""
    names = {"forward": ("y",), "backward": ("dT", "ds"), "train": ("y", "dT", "ds")}
    results = results if isinstance(results, tuple) else (results,)
    tokens, tables, rows = chosen(case)
    found = {}
    for name, array in zip(names[kind], results, strict=True):
        if name == "dT":
            array = array.reshape(case.tables.shape)[tables, rows]
        else:
            array = array[tokens]
        found[name] = array.astype(np.float64)
    return found


def definition(case: Case, inputs, kind: str) -> dict[str, np.ndarray]:
    """What `samples` must give, from the equations."""
    tokens, tables, rows = chosen(case)
    codes = as_numpy(inputs["codes"])
    scores, dy = (as_numpy(inputs[n]).astype(np.float64) for n in ("scores", "dy"))
    table = as_numpy(case.tables).astype(np.float64)
    read = table[np.arange(codes.shape[1]), codes[tokens]]  # [CHECKED, K, F]
    hits = (codes[:, tables] == rows) * scores[:, tables]  # [N, CHECKED]
    return {
        "y": np.einsum("nk,nkf->nf", scores[tokens], read),
        "ds": np.einsum("nf,nkf->nk", dy[tokens], read),
        "dT": hits.T @ dy,
    }


def as_numpy(array) -> np.ndarray:
    """A jax array or a tensor, whatever its type."""
    if hasattr(array, "detach"):
        return array.detach().float().cpu().numpy()
    return np.asarray(array)


def measure(case: Case, peers: Peers, rounds: int, on_gpu: bool) -> dict:
    """Quartiles of milliseconds, and of the ratio to the first peer."""
    repeats = 10 if on_gpu else 1

    def several(run):
        def call(inputs):
            for _ in range(repeats):
                result = run(inputs)
            finish(result)

        return call

    peers = {name: several(run) for name, run in peers.items()}
    times = timing.in_turns(peers, max(2, rounds), time.perf_counter, case.draw)
    times = {name: [t / repeats for t in series] for name, series in times.items()}
    return lookup_cpu.summarise(times)


def finish(result) -> None:
    """Wait: calls of one stream end in order, so for the last of them."""
    leaves = jax.tree.leaves(result)
    if hasattr(leaves[0], "detach"):
        import torch

        torch.cuda.synchronize()
    jax.block_until_ready([x for x in leaves if isinstance(x, jax.Array)])


def show(name: str, times: dict, failures: dict, predicted: bool) -> None:
    """One table: milliseconds, how many times ours, and what was predicted."""
    direction = name.split(", ")[1]
    print(f"\n{name:32} {'median ms':>10} {'quartiles':>18} {'x first':>8}")
    for peer, row in times.items():
        low, median, high = row["ms"]
        spread = f"{low:.3f}..{high:.3f}"
        guess = PREDICTIONS.get(f"{direction} {peer}") if predicted else None
        guess = "predicted {}..{}".format(*guess) if guess else ""
        ratio = row["ratio"][1]
        print(f"  {peer:30} {median:10.3f} {spread:>18} {ratio:8.2f}  {guess}")
    for peer, row in failures.items():
        print(f"  {peer:30} {row['error']}", flush=True)


CASES = {
    "reference": {"N": 16384},
    "skewed": {"N": 16384, "skewed": True},
    "long": {"N": 65536},
    "down": {"N": 16384, "K": 128, "C": 1024},
    "narrow": {"N": 16384, "K": 256, "C": 16},
    "decode 1": {"N": 1},
    "decode 8": {"N": 8},
}
TOY_CASES = {"toy": {"N": 3, "K": 2, "C": 2, "F": 128, "skewed": True}}

if __name__ == "__main__":
    arguments.run(main)
