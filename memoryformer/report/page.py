"""One HTML page that needs nothing else: curves, tables, utilisation, differences.

Light or dark as the reader's device is, one column on a phone, white on paper. Start at
`render`.
"""

import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memoryformer.report import about as about_lib
from memoryformer.report import charts, costs, markup
from memoryformer.report import studies as studies_lib
from memoryformer.report.studies import LOSS, NAMES, SPEED, Run, Study
from memoryformer.runs import console
from memoryformer.sweep import points
from memoryformer.sweep import statistics as statistics_lib

STYLE = pathlib.Path(__file__).with_name("page.css")
MEASURES = (
    ("used_fraction", "rows used"),
    ("entropy", "entropy / log C"),
    ("flip_rate", "flip rate"),
    ("max_over_mean", "most read / mean"),
)


def render(studies: Sequence[Study], about: about_lib.About = about_lib.NOTHING) -> str:
    """Return the page of these studies; `about` is what a person wrote of all of them."""
    title = about.title or " and ".join(study.title for study in studies[:2])
    if not about.title and len(studies) > 2:
        title = f"{len(studies)} studies"
    links = "".join(
        f'<li><a href="#s{i}">{markup.text(study.title)}</a></li>'
        for i, study in enumerate(studies)
    )
    contents = f"<nav><ul>{links}</ul></nav>" if len(studies) > 1 else ""
    body = "".join(_section(i, study) for i, study in enumerate(studies))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{markup.text(title)}</title><style>{STYLE.read_text('utf-8')}</style></head>"
        f"<body><header><h1>{markup.text(title)}</h1>"
        f"<p>{sum(len(study.runs) for study in studies)} runs in {len(studies)} "
        f"{'studies' if len(studies) > 1 else 'study'}. {_how_to_read(studies)}</p>"
        f"{_paragraphs(about)}{contents}</header><main>{body}</main></body></html>\n"
    )


def _paragraphs(about):
    written = "".join(f"<p>{markup.text(p)}</p>" for p in about.paragraphs)
    return f'<div class="about">{written}</div>' if written else ""


def _how_to_read(studies: Sequence[Study]) -> str:
    seeds = max(len(runs) for study in studies for runs in study.variants.values())
    if seeds < 2:
        return "One seed each: no spread is known."
    return (
        "Lines are means over seeds, bands reach from the lowest to the highest seed; "
        f"± is the standard deviation over seeds. A difference is called noise below "
        f"{statistics_lib.NOISE:g} standard errors (from the pooled standard deviation)."
    )


def _section(index: int, study: Study) -> str:
    metric = study.headline
    figures = _curves(study, metric, "tokens") + _curves(study, metric, "flops")
    figures += _curves(study, LOSS, "tokens") + _throughput(study)
    return (
        f'<section id="s{index}"><h2>{markup.text(study.title)}</h2>'
        f"{_paragraphs(study.about)}"
        f"{_results(study, metric)}{markup.legend(study.variants)}"
        f'<div class="charts">{figures}</div>{costs.section(study, metric)}'
        f"{_utilisation(study)}{_differences(study)}{_runs(study)}</section>"
    )


def _results(study: Study, metric: str) -> str:
    summaries = study.summaries(metric)
    pooled = statistics_lib.pooled_deviation(summaries)
    rows = []
    for summary in summaries:
        runs = study.counted(study.variants[summary.variant])
        run = next(run for run in runs if run.last(metric) is not None)
        apart = statistics_lib.difference(summary, summaries[0], pooled)
        against, verdict = "", "baseline"
        if summary is not summaries[0]:
            against, verdict = (
                markup.plus_minus(apart.value, apart.error, "+"),
                apart.verdict,
            )
        tokens = float(run.series(metric)[0][-1])
        rows.append(
            (
                summary.variant,
                summary.count,
                markup.plus_minus(summary.mean, summary.deviation),
                against,
                verdict,
                console.short_number(tokens),
                console.short_number(run.cost.parameters.total),
                f"{tokens * run.cost.training_flops_per_token:.2e}",
            )
        )
    header = (
        "variant",
        "seeds",
        NAMES[metric],
        "difference ± s.e.",
        "",
        "tokens",
        "parameters",
        "FLOPs",
    )
    floor = ""
    if not math.isnan(pooled):
        degrees = sum(s.count - 1 for s in summaries)
        floor = (
            f'<p class="note">Noise floor: {pooled:.2g}, the standard deviation over seeds '
            f"pooled over variants ({degrees} degrees of freedom).</p>"
        )
    return (markup.table(header, rows) if rows else "") + floor + _not_done(study)


def _not_done(study: Study) -> str:
    """Which runs are in no mean; or that none has ended."""
    if study.provisional:
        return '<p class="note">No run has ended: all values are provisional.</p>'
    names = [
        f"{label}, seed {run.seed} ({run.state}, step {_step(run)})"
        for label, runs in study.variants.items()
        for run in runs
        if run.state != "done"
    ]
    if not names:
        return ""
    listed = markup.text("; ".join(names))
    return f'<p class="note">Not done, and in no mean: {listed}.</p>'


def _step(run: Run) -> str:
    return f"{run.rows[-1]['step']} of {run.config.get('train.num_steps', '?')}"


def _curves(study: Study, metric: str, against: str) -> str:
    marks = metric != LOSS
    bands = [
        charts.band(label, runs, metric, against, marks=marks)
        for label, runs in study.drawn.items()
    ]
    ends = [band.x[-1] for band in bands if len(band.x)]
    if not ends:
        return ""
    wide = against == "flops" and max(ends) > 4 * min(ends)
    label = {"flops": "training FLOPs", "tokens": "training tokens"}[against]
    chart = charts.lines(bands, label, NAMES[metric], log_x=wide)
    note = " (logarithmic)" if wide else ""
    return markup.figure(f"{NAMES[metric]} against {label}{note}", chart)


def _throughput(study: Study) -> str:
    names, values = [], []
    for label, runs in study.drawn.items():
        speeds = [speed for speed in (run.last(SPEED) for run in runs) if speed]
        if speeds:
            names.append(label)
            values.append((min(speeds), statistics.fmean(speeds), max(speeds)))
    if not names:
        return ""
    title = "tokens per second while training (median of a run; bars: mean over seeds)"
    return markup.figure(title, charts.bars(names, values))


def _utilisation(study: Study) -> str:
    rows = []
    for label, runs in study.drawn.items():
        layers = sorted(
            {
                name.split("/")[1]
                for run in runs
                for row in run.rows
                for name in row
                if name.startswith("utilisation/")
            }
        )
        for kind in sorted({layer.split(".", 2)[2] for layer in layers}):
            blocks = [layer for layer in layers if layer.endswith(f".{kind}")]
            values = [_over(runs, blocks, measure) for measure, _ in MEASURES]
            rows.append((label, kind, *values))
    if not rows:
        return ""
    header = ("variant", "layer", *(name for _, name in MEASURES))
    note = (
        '<p class="note">At the last evaluation, over validation text: mean over blocks '
        "and seeds (lowest to highest). Uniform use is 1, 1, 0.5 and 1.</p>"
    )
    body = markup.table(header, rows) + note
    return markup.folded("Use of the buckets", body)


def _over(runs: Iterable[Run], layers: Iterable[str], measure: str) -> str:
    names = [f"utilisation/{layer}/{measure}" for layer in layers]
    values = [v for run in runs for v in map(run.last, names) if v is not None]
    if not values:
        return ""
    mean, low, high = statistics.fmean(values), min(values), max(values)
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _differences(study: Study) -> str:
    if not study.varying:
        return ""
    header = ("variant", *study.varying)
    rows = [
        (label, *(_value(runs[0].config.get(field)) for field in study.varying))
        for label, runs in study.variants.items()
    ]
    body = markup.table(header, rows)
    return markup.folded("Where configs differ", body)


def _runs(study: Study) -> str:
    rows = []
    for label, runs in study.variants.items():
        for run in runs:
            values = (run.last(study.headline), run.last(LOSS), run.last(SPEED))
            shown = ["" if v is None else statistics_lib.number(v) for v in values]
            facts = (label, run.seed, run.state, _step(run))
            rows.append((*facts, *shown, str(run.workdir)))
    names = (NAMES[study.headline], NAMES[LOSS], NAMES[SPEED])
    header = ("variant", "seed", "state", "step", *names, "directory")
    body = markup.table(header, rows)
    return markup.folded(f"All {len(rows)} runs", body, is_open=False)


def _value(value: Any) -> str:
    return points.describe({"": value}).removeprefix("=") if value != "" else "''"


def write(
    directories: Sequence[pathlib.Path], output: pathlib.Path
) -> Mapping[str, int]:
    """Write the page of all runs below `directories`; return the size of each study."""
    studies = studies_lib.load(directories)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = about_lib.NOTHING
    if len(studies) > 1:  # of one, its own text is the page's
        about = about_lib.read(directories[0])
    output.write_text(render(studies, about), encoding="utf-8")
    return {study.name: len(study.runs) for study in studies}
