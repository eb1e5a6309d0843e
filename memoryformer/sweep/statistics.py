"""From the files of a sweep to tables: means and spreads over seeds. Start at `collect`."""

import csv
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError, StorageError
from memoryformer.sweep import files, kinds
from memoryformer.sweep.points import Sweep

CSV_FILE = "points.csv"
NOISE = 2.0  # standard errors below which a difference is called noise


@dataclasses.dataclass(frozen=True)
class Summary:
    """One variant's metric over its seeds."""

    variant: str
    count: int
    mean: float
    deviation: float  # s.d. over seeds, n - 1; nan for one seed


@dataclasses.dataclass(frozen=True)
class Difference:
    """Summary minus baseline, and the standard error of that from the pooled s.d."""

    value: float
    error: float  # nan where no variant has two seeds

    @property
    def verdict(self) -> str:
        """'lower', 'higher', 'within noise', or 'one seed'."""
        if math.isnan(self.error):
            return "one seed"
        if abs(self.value) <= NOISE * self.error:
            return "within noise"
        return "lower" if self.value < 0 else "higher"


def summarise(variant: str, values: Sequence[float]) -> Summary:
    """Return mean and s.d. (n - 1) of at least one value."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return Summary(variant, len(values), statistics.fmean(values), spread)


def pooled_deviation(summaries: Sequence[Summary]) -> float:
    """The noise floor: s.d. over seeds pooled over the variants that have several."""
    several = [s for s in summaries if s.count > 1]
    degrees = sum(s.count - 1 for s in several)
    if not degrees:
        return math.nan
    return math.sqrt(sum((s.count - 1) * s.deviation**2 for s in several) / degrees)


def difference(one: Summary, base: Summary, pooled: float) -> Difference:
    """Compare two variants: d = mean - mean, se = pooled sqrt(1/n + 1/m)."""
    error = pooled * math.sqrt(1 / one.count + 1 / base.count)
    return Difference(one.mean - base.mean, error)


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Return a row per point: what it is, what it costs, how far it is, its metrics."""
    fields = sorted({key for point in sweep.points for key in point.overrides})
    table = []
    for point in sweep.points:
        state = files.state(point)
        row = {
            "index": point.index,
            "variant": point.variant,
            "seed": point.run.train.seed,
            "state": state.name,
            "step": state.step,
            **kinds.cost(point.run, state.step),
        }
        flat = config_lib.flatten(kinds.as_dict(point.run))
        row |= {field: flat[field] for field in fields if field in flat}
        row |= files.values(point.workdir, sweep.metrics)
        table.append(row | {"workdir": str(point.workdir)})
    return table


def collect(sweep: Sweep, baseline: str = "") -> str:
    """Write points.csv into the sweep's directory and return a table by variant.

    Only points that are done count. `baseline` names a variant; '' is the first one.
    """
    points = rows(sweep)
    path = sweep.directory / CSV_FILE
    try:
        sweep.directory.mkdir(parents=True, exist_ok=True)
        write_csv(points, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}.") from error
    done = [row for row in points if row["state"] == "done"]
    lines = [f"{len(done)} of {len(points)} points are done; {path}"]
    for metric in sweep.metrics:
        lines += ["", *variant_table(done, metric, baseline)]
    return "\n".join(lines)


def variant_table(
    done: Sequence[Mapping[str, Any]], metric: str, baseline: str = ""
) -> list[str]:
    """Return Markdown lines: variant, seeds, mean ± s.d., difference to the baseline."""
    by_variant: dict[str, list[float]] = {}
    for row in done:
        if metric in row:
            by_variant.setdefault(row["variant"], []).append(row[metric])
    if not by_variant:
        return [f"{metric}: no point has it yet."]
    summaries = [summarise(v, values) for v, values in by_variant.items()]
    variants = dict.fromkeys(row["variant"] for row in done)
    if baseline and baseline not in variants:
        known = ", ".join(variants)
        raise ConfigError(f"--baseline={baseline!r}: no such variant; known: {known}.")
    # Not every variant has every metric: softmax has no slots.
    base = next((s for s in summaries if s.variant == baseline), summaries[0])
    pooled = pooled_deviation(summaries)
    lines = [
        f"| {metric} | seeds | mean ± s.d. | difference ± s.e. | |",
        "|---|---|---|---|---|",
    ]
    for summary in summaries:
        lines.append(f"| {summary.variant} | {cells(summary, base, pooled)}")
    lines.append(f"\n{noise_floor(pooled)}")
    return lines


def cells(summary: Summary, base: Summary, pooled: float) -> str:
    """Return 'seeds | mean ± s.d. | difference ± s.e. | verdict |'."""
    apart = difference(summary, base, pooled)
    against = "baseline | |"
    if summary is not base:
        value = with_spread(f"{apart.value:+.4g}", apart.error)
        against = f"{value} | {apart.verdict} |"
    mean = with_spread(number(summary.mean), summary.deviation)
    return f"{summary.count} | {mean} | {against}"


def with_spread(shown: str, spread: float) -> str:
    """'1.2345 ± 0.02'; without a spread, as one seed has none, the value alone."""
    return shown if math.isnan(spread) else f"{shown} ± {spread:.2g}"


def noise_floor(pooled: float, over: str = "") -> str:
    """Say what `pooled_deviation` gave."""
    if math.isnan(pooled):
        return "noise floor: not known, no variant has several seeds"
    return f"noise floor (s.d. over seeds, pooled{over}): {pooled:.2g}"


def write_csv(table: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Write rows, the union of their keys as columns."""
    columns = list(dict.fromkeys(key for row in table for key in row if key))
    columns.sort(key=lambda name: name == "workdir")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(table)


def number(value: float) -> str:
    """Five digits, in full up to a million."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"


def text_table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as they need to be; the last one is not padded."""
    cells = [list(map(str, line)) for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
