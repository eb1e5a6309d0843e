"""What bounds the native kernels: instructions and cache misses, counted by callgrind.

    python -m benchmarks.profile_native

Counts do not depend on what else the machine does. Each is the difference between three
runs of a kernel and one, so that setting up drops out. A line is 64 bytes of tables, weights
or gradients that the kernel has to read. Where the processor runs an instruction mix of this
kind at 2 to 3 instructions a cycle, a kernel is bound by memory if its lines arrive more
slowly than its instructions per line run. Needs valgrind and a C++ compiler.
"""

import json
import pathlib
import re
import subprocess
import tempfile

from benchmarks import arguments

FLAGS = arguments.Parser(__doc__)
FLAGS.output("output", "profile_native.json")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

from memoryformer.ops.lookup import native as lookup_native

FOLDER = pathlib.Path(__file__).parent
MACS = 128 * 1024  # of one token in one layer, K F
# kernel -> (multiply-adds, bytes it must read)
KERNELS = {
    "lookup float32": (MACS, 4 * MACS),
    "lookup int8": (MACS, MACS),
    "layer int8": (MACS, MACS),
    "product float32": (1 << 20, 4 << 20),
    "product int8": (1 << 20, 1 << 20),
    "product int4": (1 << 20, (1 << 19) + (1 << 16)),
    "forward N=1024": (1 << 24, 1 << 26),
    "backward N=1024": (1 << 25, 1 << 26),
}


def main(argv: list[str] | None = None) -> None:
    """Build, count, print and write."""
    args = FLAGS.parse_args(argv)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "profile"
        source = FOLDER / "profile_native.cc"
        include = FOLDER.parent / "memoryformer" / "ops"
        flags = [f for f in lookup_native.FLAGS if f not in ("-shared", "-fPIC")]
        command = [*lookup_native.find_compiler(), *flags, f"-I{include}", str(source)]
        subprocess.run([*command, "-o", str(program)], check=True)
        print(f"{'kernel':18}{'instructions':>14}{'per MAC':>9}{'per line':>10}"
              f"{'L1 misses a line':>18}{'LL':>8}")  # fmt: skip
        for name, (macs, num_bytes) in KERNELS.items():
            once, thrice = (count(program, name, n, folder) for n in (1, 3))
            events = {key: (thrice[key] - once[key]) / 2 for key in once}
            lines = num_bytes / 64
            rows[name] = {
                "instructions": events["Ir"],
                "per_multiply_add": events["Ir"] / macs,
                "per_line": events["Ir"] / lines,
                "first_level_misses_per_line": events["D1mr"] / lines,
                "last_level_misses_per_line": events["DLmr"] / lines,
            }
            row = list(rows[name].values())
            print(f"{name:18}{row[0]:14.0f}{row[1]:9.3f}{row[2]:10.1f}"
                  f"{row[3]:18.2f}{row[4]:8.2f}", flush=True)  # fmt: skip
    args.output.write_text(json.dumps(rows, indent=2) + "\n")


def count(program: pathlib.Path, name: str, times: int, folder: str) -> dict[str, int]:
    """Event counts of one run: Ir, D1mr, DLmr and others."""
    result = subprocess.run(
        ["valgrind", "--tool=callgrind", "--cache-sim=yes", "--LL=33554432,16,64",
         f"--callgrind-out-file={folder}/out", str(program), name, str(times)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = re.search(r"Events\s*:\s*(.*)", result.stderr).group(1).split()
    values = re.search(r"Collected\s*:\s*(.*)", result.stderr).group(1).split()
    return dict(zip(names, map(int, values), strict=True))


if __name__ == "__main__":
    arguments.run(main)
