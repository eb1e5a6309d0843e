"""The last lines of `make quickstart`: what the run reached, beside what else there is.

Reads `eval.json` of the run and of its dense twin (if that was trained), and computes the
yardsticks on the same validation text. Start at `summary`.
"""

import pathlib

from memoryformer.data import run_tokenizer, yardsticks
from memoryformer.errors import DataError
from memoryformer.runs import console, directory, metrics
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment

DENSE_SUFFIX = "-dense"


def summary(workdir: pathlib.Path) -> str:
    """Return a table of bits per byte, and where everything is."""
    facts = run_steps.facts(workdir)
    run = experiment.resolve(facts["config"])
    dataset = run_tokenizer.dataset(workdir, run.data, facts)
    memory = workdir.with_name(workdir.name.removesuffix(DENSE_SUFFIX))
    dense = memory.with_name(memory.name + DENSE_SUFFIX)
    rows = []
    for kind, folder in (("MemoryFormer", memory), ("dense twin", dense)):
        path = folder / "eval.json"
        if path.exists():
            rows.append((_bits(path), f"{kind} ({_training(path.parent)})"))
    others = yardsticks.measure(dataset)
    rows += [(v, name) for name, v in others.items() if not name.endswith("_bytes")]
    lines = ["", "bits per byte on the validation text, less is better:"]
    lines += [f"  {bits:6.3f}  {label}" for bits, label in sorted(rows)]
    if not (dense / "eval.json").exists():
        lines.append("  (`make quickstart-dense` adds the dense twin)")
    lines += [
        "",
        f"the run        {workdir}",
        f"its metrics    {workdir}/metrics.jsonl",
    ]
    lines += [f"its plots      {path}" for path in sorted(workdir.glob("plots/*.png"))]
    lines += [f"its data       {dataset.directory}", ""]
    lines.append(
        f"go on with     python -m memoryformer.generation --workdir={workdir}"
    )
    return "\n".join(lines)


def _bits(path: pathlib.Path) -> float:
    bits = directory.read_json(path).get("val/bits_per_byte")
    if not isinstance(bits, float):
        raise DataError(f"{path}: holds no val/bits_per_byte; run eval.py again.")
    return bits


def _training(workdir: pathlib.Path) -> str:
    wanted = {"train/tokens", "train/tokens_per_second"}
    rows = [row for row in metrics.read(workdir) if wanted <= row.keys()]
    if not rows:
        raise DataError(f"{workdir}/metrics.jsonl: no training rows; was it trained?")
    tokens = console.short_number(rows[-1]["train/tokens"])
    rates = sorted(row["train/tokens_per_second"] for row in rows)
    rate = console.short_number(rates[len(rates) // 2])
    return f"{tokens} tokens at {rate} tokens/s"
