"""Every mixer, with memory layers and dense, on the quickstart's corpus and budget.

    python -m benchmarks.mixers                                  # all; hours on two cores
    python -m benchmarks.mixers --mixers=softmax,performer --seeds=3
    python -m benchmarks.mixers --steps=100 --folder=runs/mixers-short

One command, and it can be stopped: run NAME-PROJECTION-SEED is a workdir of its own in
--folder, which goes on from its last checkpoint, and a finished one is only read. Writes
mixers.json and prints the table of docs/results.md: bits per byte on the validation text
(mean over seeds, and their range), training tokens per second against softmax with the same
projection, and bytes of decode state at the training length.

Tokens per second are comparable only between runs that had the machine to themselves.
"""

import argparse
import json
import pathlib
import statistics

from memoryformer import accounting, metrics, presets, trainer
from memoryformer import config as config_lib

PROJECTIONS = ("memory", "dense")
NAMES = tuple(name for name in presets.MIXER_SETTINGS if "matched" not in name)
PAPER = ("softmax", "linformer", "cosformer", "performer")  # three seeds by default


def main(argv: list[str] | None = None) -> list[dict]:
    """Train what is missing; print and write the table; return its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mixers", default=",".join(NAMES), help="comma-separated")
    parser.add_argument("--projections", default=",".join(PROJECTIONS))
    parser.add_argument("--seeds", type=int, default=0, help="0: 3 of the paper's, 1")
    parser.add_argument("--steps", type=int, default=0, help="0: the config's")
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--folder", default="runs/mixers")
    args = parser.parse_args(argv)
    folder = pathlib.Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.mixers.split(","):
        for projection in args.projections.split(","):
            seeds = args.seeds or (3 if name in PAPER else 1)
            rows.append(_measure(args, folder, name, projection, seeds))
            (folder / "mixers.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    return rows


def _measure(args, folder, name, projection, seeds):
    bits, rates, compiled = [], [], {}
    for seed in range(seeds):
        config = presets.with_mixer(
            config_lib.load(f"{args.config}:{projection}"), name
        )
        config.train.seed = seed
        # All of the text: a few batches would not be the same for documents that begin
        # where chunks do (rmt, memformer).
        config.eval.num_batches = 0
        if args.steps:
            config.train.num_steps = args.steps
        workdir = folder / f"{name}-{projection}-{seed}"
        if not _finished(workdir, config.train.num_steps):
            print(f"--- {workdir}", flush=True)
            trainer.train(config, workdir, compiled=compiled)
        bits.append(_last(workdir, "val/bits_per_byte"))
        trained = [r for r in metrics.read(workdir) if "train/tokens_per_second" in r]
        rates.append(statistics.median(r["train/tokens_per_second"] for r in trained))
    counted = accounting.count(config.model, value_bytes=4)
    return {
        "mixer": name,
        "projection": projection,
        "steps": config.train.num_steps,
        "bits_per_byte": bits,
        "tokens_per_second": statistics.median(rates),
        "decode_state_bytes": counted.decode_state_bytes,
        "parameters": counted.parameters.total,
    }


def _finished(workdir, num_steps):
    rows = metrics.read(workdir) if (workdir / "metrics.jsonl").exists() else []
    return any(row["step"] >= num_steps and "val/bits_per_byte" in row for row in rows)


def _last(workdir, name):
    return [row[name] for row in metrics.read(workdir) if name in row][-1]


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    base = {
        row["projection"]: row["tokens_per_second"]
        for row in rows
        if row["mixer"] == "softmax"
    }
    lines = [
        "| mixer | projection | bits per byte | train tokens/s, softmax = 1 | "
        "decode state, KiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        bits, rate = row["bits_per_byte"], base.get(row["projection"])
        spread = f" ({min(bits):.3f}-{max(bits):.3f})" if len(bits) > 1 else ""
        speed = f"{row['tokens_per_second'] / rate:.2f}" if rate else "-"
        kib = row["decode_state_bytes"] / 1024
        lines.append(
            f"| {row['mixer']} | {row['projection']} | "
            f"{statistics.mean(bits):.3f}{spread} | {speed} | {kib:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
