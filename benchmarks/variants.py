"""A training step of each variant of `configs/studies.py`, in turns: what a variant costs.

    python -m benchmarks.variants
    python -m benchmarks.variants --cores=1 --clock=cpu --steps=20    # on a busy machine
    python -m benchmarks.variants --sweep=isoflop                     # sizes, memory and dense

Every variant takes a step before any takes the next, in another order each time. Ratios are to
the first variant (of `variants`, the published layer) of the medians of the steps; the first step,
which compiles, is left out. Bytes and FLOPs are `accounting.count`'s. Losses are finite, or it ends.
"""

import json
import math
import os
import pathlib
import statistics

from benchmarks import arguments, timing

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("--size", default="mini", help="argument of configs/studies.py")
FLAGS.add_argument(
    "--sweep",
    choices=("variants", "variants_tokens", "score_tokens", "table3_tokens", "isoflop"),
    default="variants",
    help="of that file",
)
FLAGS.number("steps", 40, low=2)
FLAGS.cores()
FLAGS.clock()
FLAGS.output("output", "variants.json")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

from benchmarks import train_step
from memoryformer import accounting
from memoryformer.sweep import points

CONFIG = "configs/studies.py"


def main(argv: list[str] | None = None) -> dict:
    """Time the steps in turns; print and write a row for each variant."""
    args = FLAGS.parse_args(argv)
    cores = timing.use_cores(args.cores)
    runs = variants(args.size, args.sweep)
    steps = {name: train_step.make_step(run) for name, run in runs.items()}

    def batches(index):
        return {
            name: train_step.make_batch(run.model, run.train.batch_size, index)
            for name, run in runs.items()
        }

    seconds = timing.in_turns(
        {name: finite(name, step) for name, step in steps.items()},
        args.steps,
        timing.CLOCKS[args.clock],
        batches,
    )
    first = statistics.median(next(iter(seconds.values())))
    rows = {name: _row(runs[name], seconds[name], first) for name in runs}
    facts = {"cores": cores, "clock": args.clock, "load": os.getloadavg()[0]}
    result = {"variants": rows, **facts}
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def variants(size: str, sweep: str) -> dict:
    """{variant: run} of a sweep, each at its first learning rate or number of steps."""
    path = pathlib.Path(__file__).parent.parent / CONFIG
    runs: dict = {}
    for point in points.expand(f"{path}:{size}".rstrip(":"), [sweep], "runs").points:
        runs.setdefault(point.variant.rpartition(", ")[0], point.run)
    return runs


def finite(name: str, step):
    """A step of its batch among all, whose loss must be finite."""

    def run(batches):
        loss = float(step(batches[name]))
        if not math.isfinite(loss):
            raise AssertionError(f"{name}: the loss of a step is {loss}")

    return run


def _row(run, seconds, first):
    counted = accounting.count(run.model)
    return {
        "milliseconds": [1e3 * q for q in timing.quartiles(seconds)],
        "times_the_first": round(statistics.median(seconds) / first, 3),
        "table_bytes_read_per_token": counted.table_bytes_read_per_token,
        "decode_bytes_per_token": counted.decode_bytes_per_token,
        "training_flops_per_token": counted.training_flops_per_token,
        "parameters": counted.parameters.total,
    }


if __name__ == "__main__":
    arguments.run(main)
