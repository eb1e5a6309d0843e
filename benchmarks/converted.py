"""Speed against loss of a dense run and of what was converted from it, in turns.

    python -m benchmarks.converted runs/dense runs/qkv runs/ffn runs/all --clock=cpu
    python -m benchmarks.converted --plot=docs/images/converted.png converted.json   # from a file

Each run decodes --tokens greedy tokens after one, tables, head and dense layers in int8, in another
order each round. Losses are of all validation text, with the same weights; bytes a token are
`accounting.count`'s: rows, dense layers and the head. The first run is what others are compared to.
Beside them, in the same rounds, other engines decode the first run, as `benchmarks.decode` has
them, if it is dense; of a package that is not installed a line says so.
"""

import dataclasses
import json
import os
import pathlib
import tempfile

from benchmarks import arguments, timing
from benchmarks.decode import peers as peers_lib

ENGINES = ("llama.cpp-q4_0", "llama.cpp-q8_0", "ctranslate2-int8", "dense-int4")

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("runs", nargs="+", type=pathlib.Path)
FLAGS.names("peers", ENGINES)
FLAGS.number("tokens", 64)
FLAGS.number("rounds", 7, low=2)
FLAGS.cores()
FLAGS.clock()
FLAGS.output("output", "converted.json")
FLAGS.output("plot")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

import numpy as np

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
    from benchmarks.decode import ours
    from memoryformer.generation import text as text_lib
    from memoryformer.training import evaluate_run

    names = peers_lib.installed(FLAGS.chosen("peers", args.peers, ENGINES))
    cores = timing.use_cores(args.cores)
    decoders, counted = {}, {}
    for path in args.runs:
        generator, _, run = text_lib.open_run(path, None, KINDS)
        decoders[path.name] = ours.decoder(generator)
        counted[path.name] = accounting.count(run.model, value_bytes=VALUE_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        engines = _engines(args.runs[0], names, pathlib.Path(folder))
    decoders |= {name: peer.decode for name, peer in engines.items()}
    works = {
        name: lambda _, decode=decode: decode(1, args.tokens)
        for name, decode in decoders.items()
    }
    seconds = timing.in_turns(works, args.rounds, timing.CLOCKS[args.clock])
    rows = []
    for path in args.runs:
        values = evaluate_run.evaluate_checkpoint(path, kinds=KINDS)
        cost = counted[path.name]
        rows.append({
            "run": path.name,
            "parameters": cost.parameters.total,
            "bytes_a_token": cost.table_bytes_read_per_token + cost.dense_bytes,
            **_speed(seconds, path.name, args.tokens),
            "loss": values["val/loss"],
            "bits_per_byte": values["val/bits_per_byte"],
        })  # fmt: skip
    return {
        "processor": timing.processor(),
        "load": os.getloadavg()[0],
        "cores": cores,
        "clock": args.clock,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "runs": rows,
        "engines": {
            name: _speed(seconds, name, args.tokens)
            | {"weight_bytes": peer.weight_bytes}
            for name, peer in engines.items()
        },
    }


def _engines(path, names, folder):
    """Peers that hold the weights of a dense run.

    They read GPT-NeoX, whose norms are layer norms. A run with others has the same matrices there
    with these norms: as fast, and not the same function.
    """
    from memoryformer.training import experiment

    run, params, _ = experiment.load(path)
    if run.model.projection != "dense":
        print(f"without other engines: {path} is no dense run", flush=True)
        return {}
    twin = dataclasses.replace(run.model, norm="layernorm"), _layer_normed(params)
    return {name: peers_lib.of_twin(name, lambda: twin, folder) for name in names}


def _layer_normed(params):
    """Parameters whose norms have a bias, of zeros where there was none."""
    if not isinstance(params, dict):
        return params
    if "scale" in params:
        return {"bias": np.zeros_like(params["scale"])} | params
    return {name: _layer_normed(value) for name, value in params.items()}


def _speed(seconds, name, tokens):
    spent, first = seconds[name], next(iter(seconds.values()))
    return {
        "tokens_per_second": timing.quartiles(tokens / s for s in spent),
        "faster": timing.ratio(first, spent),
    }


def print_table(result: dict) -> None:
    """A line a run."""
    print(
        f"\n{result['processor']}, load {result['load']:.1f}, {result['clock']} clock"
    )
    print(
        f"{'run':<18}{'parameters':>12}{'bytes a token':>15}{'tokens/s':>10}"
        f"{'times faster':>22}{'loss':>9}{'over':>9}"
    )
    base = result["runs"][0]["loss"]
    for row in result["runs"]:
        print(
            f"{row['run']:<18}{row['parameters']:>12,}{row['bytes_a_token']:>15,}"
            f"{_told(row)}{row['loss']:>9.4f}{row['loss'] - base:>+9.4f}"
        )
    for name, row in result["engines"].items():
        print(f"{name:<45}{_told(row)}")


def _told(row):
    low, middle, high = row["faster"]
    spread = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    return f"{row['tokens_per_second'][1]:>10.0f}{spread:>22}"


def plot(result: dict, path: pathlib.Path) -> None:
    """Loss over tokens a second, a point a run; a line an engine, whose loss is not known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    base = result["runs"][0]
    for row in result["runs"]:
        place = row["tokens_per_second"][1], row["loss"] - base["loss"]
        axis.plot(*place, "o", color="C0")
        label = f"{row['run']}, {row['bytes_a_token'] / 1e3:.0f} kB"
        axis.annotate(label, place, xytext=(4, 4), textcoords="offset points")
    speeds = {
        name: row["tokens_per_second"][1] for name, row in result["engines"].items()
    }
    for i, name in enumerate(sorted(speeds, key=speeds.get)):
        axis.axvline(speeds[name], color="C1", linestyle="--", linewidth=1)
        # Neighbours are named at the top and at the bottom, in turn.
        height, side = ((0.98, "top"), (0.02, "bottom"))[i % 2]
        where = {"xycoords": ("data", "axes fraction"), "rotation": 90}
        place, label = (speeds[name], height), f"{base['run']}, {name}"
        axis.annotate(label, place, va=side, ha="right", fontsize=8, **where)
    axis.margins(x=0.2, y=0.4)  # room for the names
    axis.set_xlabel("tokens a second, one stream")
    axis.set_ylabel("loss over the dense run's, nats")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    arguments.run(main)
