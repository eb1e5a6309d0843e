"""Linear attention fitted exactly and by Adam, where data determine it and where they do not.

    teachers      random layers of 3 heads, width 2, 4 and 8
    associative   recall of a value by its key; a share of the examples has normal keys and
                  values, the others orthogonal ones, which do not determine the layer

Every row is one data set and one way to learn it: the smallest eigenvalue of its features, the
error |y - f|^2 / |y|^2 on fresh examples of the same kind and (`associative`) on normal ones, and
the distance |p - p'| / |p| from the teacher. Start at `run`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from memoryformer.files import atomic, paths
from memoryformer.identifiability import linear_attention
from memoryformer.runs import outcome
from memoryformer.runs import steps as run_steps
from memoryformer.tasks import experiment, linear_maps, trainer

HEADS = (1, 2, 4, 8, 16)
FRESH = 4096  # examples that errors are measured on
DATA: dict[str, list[dict[str, Any]]] = {
    "teachers": [{"width": width} for width in (2, 4, 8)],
    "associative": [
        {"width": 8, "num_examples": 4096, "normal": share}
        for share in (1.0, 0.5, 0.05, 0.0)
    ],
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One data set, one seed and one way to learn it."""

    data: str
    method: str
    seed: int
    certificate: float
    error: float
    error_normal: float
    distance: float


def run(study: str, output: str | os.PathLike, seeds: int) -> str:
    """Run a study in a folder, write study.json there and return the table."""
    folder = paths.workdir(output, "--output")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        row
        for data in DATA[study]
        for row in _rows(study, data, range(seeds), folder / "runs")
    ]
    atomic.write_json(
        folder / "study.json", [dataclasses.asdict(row) for row in rows], indent=1
    )
    return table(rows)


def config(study: str, data: Mapping[str, Any], seed: int, num_heads: int) -> Any:
    """Return the config of one run of Adam."""
    values = experiment.default_config("linear_maps")
    values.task.update(kind=study, seed=seed, num_steps=3000, batch_size=64, **data)
    values.task.update(learning_rate=0.01, weight_decay=0.0, eval_every=1000)
    values.model.num_heads = num_heads
    values.checkpoint.every_steps = values.task.num_steps
    values.metrics.trackers = ""
    return values


def _rows(
    study: str, data: Mapping[str, Any], seeds: Sequence[int], folder: pathlib.Path
) -> Iterator[Row]:
    """The rows of one data set; runs of one size are neighbours and share what is compiled."""
    name = ", ".join(f"{key} {value}" for key, value in data.items())
    for num_heads in (0, *HEADS):
        for seed in seeds:
            values = config(study, data, seed, max(num_heads, 1))
            options = experiment.resolve(values).task.options
            examples = linear_maps.dataset(options)
            if num_heads:
                kind = "-".join(f"{value:g}" for value in data.values())
                workdir = folder / f"{study}-{kind}-{num_heads}-{seed}"
                method, heads = f"Adam, {num_heads}", _trained(values, workdir)
            else:
                method, heads = "exact", linear_attention.fit_heads(*examples)
            certificate = linear_attention.certificate(examples[0])
            yield Row(name, method, seed, certificate, *figures(options, heads))


def _trained(values: ml_collections.ConfigDict, workdir: pathlib.Path):
    """The heads of a run of Adam, trained unless it is done already."""
    if (outcome.read(workdir) or {}).get("state") != "done":
        trainer.train(values, workdir)
    params = run_steps.load(workdir)[1]
    return tuple(np.asarray(params[name], np.float64) for name in ("V", "Q"))


def figures(
    options: linear_maps.LinearMapsConfig, heads: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float, float]:
    """Return (error, error on normal examples, distance) of heads from the teacher's."""
    normal = dataclasses.replace(options, normal=1.0)
    teacher = linear_maps.teacher(options)
    errors = []
    for kind in (options, normal):
        rng = np.random.default_rng([options.seed, 5])
        Z = linear_maps.inputs(kind, rng, FRESH)
        Y = linear_attention.predict(*teacher, Z)
        left = Y - linear_attention.predict(*heads, Z)
        errors.append(float(np.sum(left**2) / np.sum(Y**2)))
    size = np.linalg.norm(linear_attention.invariants(*teacher))
    return errors[0], errors[1], linear_attention.distance(teacher, heads) / float(size)


def table(rows: Sequence[Row]) -> str:
    """Return a table in Markdown: medians over the seeds, and the worst in brackets."""
    heads = ["data", "learned by", "certificate", "error", "distance"]
    fields = ["error", "distance"]
    if any(row.error_normal != row.error for row in rows):
        heads.insert(4, "error on normal data")
        fields.insert(1, "error_normal")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for data, method in dict.fromkeys((row.data, row.method) for row in rows):
        seeds = [row for row in rows if (row.data, row.method) == (data, method)]
        cells = [f"{np.median([row.certificate for row in seeds]):.1e}"]
        for field in fields:
            values = [getattr(row, field) for row in seeds]
            cells.append(f"{np.median(values):.1e} ({max(values):.1e})")
        lines.append(f"| {data} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
