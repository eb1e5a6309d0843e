"""Speed against loss of a dense run and of what was converted from it, in turns.

    python -m benchmarks.converted runs/dense runs/qkv runs/ffn runs/all --clock=cpu
    python -m benchmarks.converted --plot=docs/images/converted.png converted.json   # from a file

Each run decodes --tokens greedy tokens after one, tables, head and dense layers in int8, in another
order each round. Losses are of all validation text, with the same weights; bytes a token are
`accounting.count`'s: rows, dense layers and the head. The first run is what others are compared to.
"""

import json
import os
import pathlib
import random

from benchmarks import arguments, timing

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("runs", nargs="+", type=pathlib.Path)
FLAGS.number("tokens", 64)
FLAGS.number("rounds", 7, low=2)
FLAGS.clock()
FLAGS.output("output", "converted.json")
FLAGS.output("plot")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

from memoryformer import accounting
from memoryformer.model import narrow

KINDS = narrow.WeightKinds(tables="int8", head="int8", dense="int8")
VALUE_BYTES = 1


def main(argv: list[str] | None = None) -> dict:
    """Measure the runs, or plot a file of an earlier measurement."""
    args = FLAGS.parse_args(argv)
    if len({path.name for path in args.runs}) < len(args.runs):
        FLAGS.error("two runs have the same name, by which they are told apart")
    if args.runs[0].is_file():
        result = arguments.read_json(args.runs[0])
    else:
        result = measured(args)
        args.output.write_text(json.dumps(result, indent=2) + "\n")
        print_table(result)
    if args.plot:
        plot(result, args.plot)
    return result


def measured(args) -> dict:
    """Decode by turns; then the loss of each run."""
    from memoryformer.generation import sampler
    from memoryformer.generation import text as text_lib
    from memoryformer.training import evaluate_run

    generators, counted = {}, {}
    for path in args.runs:
        generator, _, run = text_lib.open_run(path, None, KINDS)
        generators[path.name] = generator
        counted[path.name] = accounting.count(run.model, value_bytes=VALUE_BYTES)
    sampling = sampler.SamplingConfig(max_tokens=args.tokens, temperature=0.0)
    clock, shuffled = timing.CLOCKS[args.clock], random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    for i in range(args.rounds + 1):
        for name in shuffled.sample(list(generators), len(generators)):
            start = clock()
            list(generators[name].stream_batch([[1]], sampling))
            if i:  # the first round compiles
                seconds[name].append(clock() - start)
    first = next(iter(seconds.values()))
    rows = []
    for path in args.runs:
        values = evaluate_run.evaluate_checkpoint(path, kinds=KINDS)
        cost, spent = counted[path.name], seconds[path.name]
        rows.append({
            "run": path.name,
            "parameters": cost.parameters.total,
            "bytes_a_token": cost.table_bytes_read_per_token + cost.dense_bytes,
            "tokens_per_second": timing.quartiles(args.tokens / s for s in spent),
            "faster": timing.quartiles(f / s for f, s in zip(first, spent, strict=True)),
            "loss": values["val/loss"],
            "bits_per_byte": values["val/bits_per_byte"],
        })  # fmt: skip
    return {
        "processor": timing.processor(),
        "load": os.getloadavg()[0],
        "clock": args.clock,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "runs": rows,
    }


def print_table(result: dict) -> None:
    """A line a run."""
    print(
        f"\n{result['processor']}, load {result['load']:.1f}, {result['clock']} clock"
    )
    print(
        f"{'run':<14}{'parameters':>12}{'bytes a token':>15}{'tokens/s':>10}"
        f"{'times faster':>22}{'loss':>9}{'over':>9}"
    )
    base = result["runs"][0]["loss"]
    for row in result["runs"]:
        low, middle, high = row["faster"]
        spread = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        print(
            f"{row['run']:<14}{row['parameters']:>12,}{row['bytes_a_token']:>15,}"
            f"{row['tokens_per_second'][1]:>10.0f}{spread:>22}{row['loss']:>9.4f}"
            f"{row['loss'] - base:>+9.4f}"
        )


def plot(result: dict, path: pathlib.Path) -> None:
    """Loss over bytes a token, a point a run, named."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    base = result["runs"][0]["loss"]
    for row in result["runs"]:
        place = row["bytes_a_token"] / 1e3, row["loss"] - base
        axis.plot(*place, "o", color="C0")
        label = f"{row['run']}, {row['tokens_per_second'][1]:.0f}/s"
        axis.annotate(label, place, xytext=(4, 4), textcoords="offset points")
    axis.margins(0.2)  # room for the names
    axis.set_xlabel("weights read for a token, int8, kB")
    axis.set_ylabel("loss over the dense run's, nats")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    arguments.run(main)
