"""Every mixer, with memory layers and dense, on the quickstart's corpus and budget.

    python -m benchmarks.mixers                                  # all; hours on two cores
    python -m benchmarks.mixers --mixers=softmax,performer --seeds=3
    python -m benchmarks.mixers --steps=100 --folder=runs/mixers-short

One command, and it can be stopped: run NAME-PROJECTION-SEED is a workdir of its own in
--folder, which goes on from its last checkpoint, and a finished one is only read. Then the
train steps of all take turns in this process, --rounds times. Writes mixers.json and prints
the table of docs/results.md: bits per byte on the validation text (mean over seeds, and their
range), training tokens per second (padding is not counted) against softmax with the same
projection, medians over rounds and [quartiles], and bytes of decode state at the training
length.
"""

import itertools
import json
import pathlib
import statistics
from collections.abc import Callable, Collection

from benchmarks import arguments, timing

PROJECTIONS = ("memory", "dense")

FLAGS = arguments.Parser(__doc__)
FLAGS.names("mixers")
FLAGS.names("projections", PROJECTIONS)
FLAGS.number("seeds", 0, low=0, help="0: 3 of the paper's, 1")
FLAGS.number("steps", 0, low=0, help="0: the config's")
FLAGS.number("rounds", 9, low=0, help="of timed steps; 0: none")
FLAGS.clock()
FLAGS.add_argument("--config", default="configs/quickstart.py")
FLAGS.add_argument("--folder", default="runs/mixers")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

import jax

from memoryformer import accounting, data, presets
from memoryformer import config as config_lib
from memoryformer import sharding as sharding_lib
from memoryformer.runs import metrics
from memoryformer.training import experiment, loop, programs
from memoryformer.training import step as step_lib

NAMES = tuple(name for name in presets.mixer_settings() if "matched" not in name)
PAPER = ("softmax", "linformer", "cosformer", "performer")  # three seeds by default


def main(argv: list[str] | None = None) -> list[dict]:
    """Train what is missing; print and write the table; return its rows."""
    args = FLAGS.parse_args(argv)
    names = FLAGS.chosen("mixers", args.mixers, NAMES)
    projections = FLAGS.chosen("projections", args.projections, PROJECTIONS)
    cases = list(itertools.product(names, projections))
    folder = pathlib.Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_measure(args, folder, *case) for case in cases]
    if args.rounds:
        steps = {case: _train_step(_config(args, *case)) for case in cases}
        rates = tokens_per_second(steps, args.rounds, timing.CLOCKS[args.clock])
        for row, case in zip(rows, cases, strict=True):
            row["tokens_per_second"] = rates[case]
    (folder / "mixers.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    return rows


def _config(args, name, projection):
    config = presets.with_mixer(config_lib.load(f"{args.config}:{projection}"), name)
    # All of the text: a few batches would not be the same for documents that begin
    # where chunks do (rmt, memformer).
    config.eval.num_batches = 0
    config.train.num_steps = args.steps or config.train.num_steps
    return config


def _measure(args, folder, name, projection):
    config, bits = _config(args, name, projection), []
    cache = programs.Cache()
    for seed in range(args.seeds or (3 if name in PAPER else 1)):
        config.train.seed = seed
        workdir = folder / f"{name}-{projection}-{seed}"
        if not _finished(workdir, config.train.num_steps):
            print(f"--- {workdir}", flush=True)
            loop.train(config, workdir, programs=cache)
        bits.append(_last(workdir, "val/bits_per_byte"))
    counted = accounting.count(experiment.resolve(config).model, value_bytes=4)
    return {
        "mixer": name,
        "projection": projection,
        "steps": config.train.num_steps,
        "bits_per_byte": bits,
        "decode_state_bytes": counted.decode_state_bytes,
        "parameters": counted.parameters.total,
    }


def _train_step(config):
    """Return a function of a step's index: one update, the number of its tokens."""
    run = experiment.resolve(config)
    sharding = sharding_lib.make(run.mesh)
    made = programs.make(run, sharding)
    dataset = data.load(run.data, run.model.vocab_size)
    batches = dataset.train.batches(
        run.model.seq_len, run.train.batch_size, run.train.seed
    )
    hyper = step_lib.hyperparams(run)
    state = made.draw(run.train.seed)

    def step(index):
        nonlocal state
        batch = batches.batch(index)
        state, values = made.train_step(state, sharding.put_batch(batch), hyper)
        jax.block_until_ready(state)
        return float(values["weight"])

    return step


def tokens_per_second(
    steps: dict[tuple[str, str], Callable[[int], float]],
    rounds: int,
    clock: Callable[[], float],
) -> dict[tuple[str, str], list[float]]:
    """Return each case's rate in each round of `timing.turns`."""
    tokens: dict[tuple[str, str], list[float]] = {case: [] for case in steps}

    def counted(case):
        return lambda index: tokens[case].append(steps[case](index))

    seconds = timing.in_turns({case: counted(case) for case in steps}, rounds, clock)
    return {
        case: [n / s for n, s in zip(tokens[case][1:], seconds[case], strict=True)]
        for case in steps
    }


def _finished(workdir, num_steps):
    rows = metrics.read(workdir) if (workdir / "metrics.jsonl").exists() else []
    return any(row["step"] >= num_steps and "val/bits_per_byte" in row for row in rows)


def _last(workdir, name):
    return [row[name] for row in metrics.read(workdir) if name in row][-1]


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    base = {
        row["projection"]: row.get("tokens_per_second")
        for row in rows
        if row["mixer"] == "softmax"
    }
    lines = [
        "| mixer | projection | bits per byte | train tokens/s, softmax = 1 | "
        "decode state, KiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        bits = row["bits_per_byte"]
        spread = f" ({min(bits):.3f}-{max(bits):.3f})" if len(bits) > 1 else ""
        speed = _speed(row.get("tokens_per_second"), base.get(row["projection"]))
        kib = row["decode_state_bytes"] / 1024
        lines.append(
            f"| {row['mixer']} | {row['projection']} | "
            f"{statistics.mean(bits):.3f}{spread} | {speed} | {kib:.0f} |"
        )
    return "\n".join(lines)


def _speed(rates: Collection[float] | None, base: Collection[float] | None) -> str:
    if not rates or not base:
        return "-"
    ratios = [rate / other for rate, other in zip(rates, base, strict=True)]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, median, high = timing.quartiles(ratios)
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    arguments.run(main)
