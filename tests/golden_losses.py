"""Fifty steps of the quickstart model, to the last bit, for each jax and processor.

    python -m tests.golden_losses            # print them
    python -m tests.golden_losses --update   # store them in tests/golden/losses-jax-*.json

Update after a change that is meant to change the numbers, and say in its commit why they
may change; the file then has this processor's alone. `--add` keeps the others beside it. The
text is made by `toy.corpus`: it depends on neither Python nor its library. Rounding depends
on the processor, and a sum rounded otherwise flips signs, and so codes, within ten steps.
"""

import json
import os
import pathlib
import sys
import tempfile

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
import toy

from memoryformer import config as config_lib
from memoryformer.runs import metrics
from memoryformer.training import compilation_cache, loop

ROOT = pathlib.Path(__file__).parents[1]
FILE = ROOT / f"tests/golden/losses-jax-{jax.__version__}.json"


def processor() -> str:
    """What rounding depends on: instructions, caches (they block products), threads."""
    caches = pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = "+".join(path.read_text().strip() for path in sorted(caches))
    return f"{compilation_cache.cpu_kind()} {sizes} x{os.cpu_count()}"


def compute() -> dict:
    """Train and return 50 each of 'loss', 'grad_norm', 'learning_rate', and 'validation'."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        config = config_lib.load(
            str(ROOT / "configs/quickstart.py"),
            **{
                "data.source": "text",
                "data.path": str(toy.corpus(folder / "corpus", documents=400)),
                "data.data_dir": str(folder / "cache"),
                "data.tokenizer": "bytes",
                "model.lookup": "xla",  # the native one depends on the compiler
                "train.num_steps": 50,
                "train.log_every": 1,
                "optimizer.warmup_steps": 10,
                "eval.every_steps": 0,
                "eval.num_batches": 2,
                "checkpoint.every_steps": 0,
                "metrics.trackers": "",
                "mesh": "single",
            },
        )
        loop.train(config, folder / "run")
        rows = metrics.read(folder / "run")
    steps = [row for row in rows if "train/loss" in row]
    return {
        "loss": [row["train/loss"] for row in steps],
        "grad_norm": [row["train/grad_norm"] for row in steps],
        "learning_rate": [row["train/learning_rate"] for row in steps],
        "validation": rows[-1]["val/loss"],
    }


def main() -> None:
    """Print the losses, or store them."""
    sys.stdout, stdout = sys.stderr, sys.stdout
    kept = "--add" in sys.argv and FILE.exists()
    stored = json.loads(FILE.read_text()) if kept else {}
    text = json.dumps(stored | {processor(): compute()}, indent=1)
    if {"--update", "--add"} & set(sys.argv):
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(text + "\n")
        text = f"wrote {FILE.relative_to(ROOT)}"
    print(text, file=stdout)


if __name__ == "__main__":
    main()
