"""What the compilers say of the lookup on an accelerator, without one: nothing is timed.

Compiles the lookup's forward and backward on a machine with only a CPU, and prints temporary
memory, and for GPU kernels registers and spills, for TPU programs the largest fusions:

    python -m benchmarks.compiled gpu              # pip install "jax[cuda12]" (or cuda13)
    python -m benchmarks.compiled tpu --topology=v5p:2x2x1      # pip install "jax[tpu]"

A TPU program can take minutes to compile. `--tokens`, `--tables`, `--buckets`, `--features`
set the sizes (N=16384, K=128, C=256, F=1024), `--dtype` the tables' type.
"""

import json
import os
import pathlib
import re
import shutil
import tempfile

from benchmarks import arguments

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("target", choices=("gpu", "tpu"))
FLAGS.add_argument("--topology", default="v6e:2x2", help="of the TPU")
FLAGS.number("tokens", 16384)
FLAGS.number("tables", 128)
FLAGS.number("buckets", 256)
FLAGS.number("features", 1024)
FLAGS.add_argument(
    "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16"
)
FLAGS.names("implementations")
FLAGS.output("output")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

# Before jax starts: compile for what is not here, and let the GPU kernels be dumped.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
os.environ["MOSAIC_GPU_DUMP_TO"] = tempfile.mkdtemp()

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memoryformer.accounting import targets as targets_lib
from memoryformer.ops.lookup import gpu as lookup_gpu
from memoryformer.ops.lookup import xla as lookup_xla

IMPLEMENTATIONS = {
    "gpu": {"gpu": lookup_gpu.gpu, "xla": lookup_xla.scan_tables},
    "tpu": {"onehot": lookup_xla.onehot_products},
}


def main(argv: list[str] | None = None) -> list[dict]:
    """Compile what is asked for, print it and return it."""
    flags = FLAGS.parse_args(argv)
    functions = IMPLEMENTATIONS[flags.target]
    chosen = FLAGS.chosen("implementations", flags.implementations, functions)
    if flags.target == "gpu":
        topology = topologies.get_topology_desc(
            "",
            platform="cuda",
            topology="1x1x1",
            target_config=targets_lib.gpu_description("h200"),
        )
    else:
        topology = topologies.get_topology_desc(flags.topology, platform="tpu")
    rows = []
    for name in chosen:
        for direction in ("forward", "backward"):
            function = (
                functions[name]
                if direction == "forward"
                else gradients(functions[name])
            )
            row = {"implementation": name, "direction": direction}
            row |= inspect(function, operands(flags, topology.devices[0], direction))
            rows.append(row)
            show(row)
    kernels = registers()
    for kernel in kernels:
        print(
            "{kernel:18} {registers:4d} registers, {spilled:3d} bytes spilled".format_map(
                kernel
            )
        )
    if flags.output:
        flags.output.write_text(json.dumps(rows + kernels, indent=2) + "\n")
    return rows + kernels


def gradients(function):
    """(dT, ds) of a lookup."""

    def run(tables, codes, scores, dy):
        _, pullback = jax.vjp(lambda t, s: function(t, codes, s), tables, scores)
        return pullback(dy)

    return run


def operands(flags, device, direction: str) -> list[jax.ShapeDtypeStruct]:
    """Shapes on the device compiled for."""
    N, K, C, F = flags.tokens, flags.tables, flags.buckets, flags.features
    where = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    sizes = [((K, C, F), flags.dtype), ((N, K), "int32"), ((N, K), "float32")]
    sizes += [((N, F), "float32")] if direction == "backward" else []
    return [
        jax.ShapeDtypeStruct(size, jnp.dtype(kind), sharding=where)
        for size, kind in sizes
    ]


def inspect(function, arguments) -> dict:
    """Temporary bytes, the compiler's cycles (TPU), and arrays as large as a one-hot."""
    compiled = jax.jit(function).lower(*arguments).compile()
    text = compiled.as_text()
    return {
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "cycles": fusion_cycles(text),
        "onehots": stored_onehots(text, arguments[1].shape[0], arguments[0].shape),
    }


def fusion_cycles(text: str) -> dict[str, int]:
    """The compiler's estimate for one execution of each instruction, the largest first."""
    found = {}
    for line in text.splitlines():
        cycles = re.search(r'"estimated_cycles":"?(\d+)', line)
        name = re.match(r"\s*(?:ROOT )?%?([\w.-]+) =", line)
        if cycles and name:
            found[name[1]] = int(cycles[1])
    return dict(sorted(found.items(), key=lambda item: -item[1])[:8])


def stored_onehots(
    text: str, num_tokens: int, tables_shape: tuple[int, int, int]
) -> list[str]:
    """Results in memory with an axis of tokens and one of buckets, of one or more tables.

    Instructions inside a fusion have no memory of their own; all others do.
    """
    num_tables, num_buckets, features = tables_shape
    columns = {num_buckets * group for group in range(1, num_tables + 1)} - {features}
    found, fused = [], False
    for line in text.splitlines():
        if line and not line[0].isspace():  # a computation begins or ends
            fused = "fused_computation" in line.split("(")[0]
        result = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]+)\]", line)
        if fused or not result:
            continue
        sizes = [int(size) for size in result[2].split(",")]
        if num_tokens in sizes:
            sizes.remove(num_tokens)
            if columns.intersection(sizes):
                found.append(f"{result[1]} [{result[2]}]")
    return found


def registers() -> list[dict]:
    """Of each GPU kernel compiled so far, as ptxas reports them."""
    rows = []
    folder = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    for path in sorted(folder.glob("*.ptxas")):
        report = path.read_text()
        used = re.search(r"Used (\d+) registers", report)
        stores, loads = re.search(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads", report
        ).groups()
        rows.append(
            {
                "kernel": path.stem,
                "registers": int(used[1]),
                "spilled": int(stores) + int(loads),
            }
        )
    shutil.rmtree(folder)
    return rows


def show(row: dict) -> None:
    """One line, and the costliest instructions where the compiler says what they cost."""
    mebibytes = row["temp_bytes"] / 2**20
    print(
        f"{row['implementation']:8} {row['direction']:9} {mebibytes:8.1f} MiB temporary"
    )
    for name, cycles in row["cycles"].items():
        print(f"    {cycles:12,} cycles  {name}")
    print(f"    one-hot arrays in memory: {row['onehots'] or 'none'}", flush=True)


if __name__ == "__main__":
    arguments.run(main)
