"""What losses cost, as parts of a report page. Start at `section`."""

from memoryformer.report import markup, pareto, scaling
from memoryformer.report.studies import NAMES, Study


def section(study: Study, metric: str) -> str:
    """Plots of loss over each cost, kinds at equal cost, and laws over sizes and tokens."""
    return _fronts(study, metric) + _equal(study, metric) + _laws(study, metric)


def _fronts(study, metric):
    figures = ""
    for cost, (label, _) in pareto.COSTS.items():
        placed = pareto.spots(study, metric, cost)
        if pareto.differ(placed):
            chart = pareto.scatter(placed, label, NAMES[metric])
            figures += markup.figure(f"{NAMES[metric]} against {label}", chart)
    if not figures:
        return ""
    note = (
        '<p class="note">A dot is the mean of a variant over its seeds, a whisker their '
        "range. Below the line of steps lies what no variant reaches.</p>"
    )
    body = f'{note}<div class="charts">{figures}</div>'
    return markup.folded("What the loss costs", body)


def _equal(study, metric):
    rows = []
    for cost, (label, _) in pareto.COSTS.items():
        for price, losses in scaling.equal(study, metric, cost):
            shown = (f"{loss:.3f}" for loss in losses.values())
            rows.append((label, f"{price:.3g}", *shown))
    if not rows:
        return ""
    header = ("cost", "", *scaling.kinds(study))
    note = (
        f'<p class="note">{NAMES[metric]}, on the line between the neighbours on the front '
        "of each kind.</p>"
    )
    return markup.folded("Kinds at equal cost", note + markup.table(header, rows))


def _laws(study, metric):
    fitted = scaling.laws(study, metric)
    if not fitted:
        return ""
    rows, figures = [], ""
    for kind, law in fitted.items():
        pairs = zip(law.values, law.intervals, strict=True)
        shown = (f"{v:.3g} ({low:.3g} to {high:.3g})" for v, (low, high) in pairs)
        rows.append((kind, len(law.observations), *shown, f"{law.residual:.2%}"))
        caption = f"{kind}: {NAMES[metric]} against tokens, and the law"
        figures += markup.figure(caption, scaling.picture(law, NAMES[metric]))
    header = ("kind", "runs", *scaling.NAMES, "off by (r.m.s.)")
    note = (
        f'<p class="note">L = E + A / N^a + B / D^b: {NAMES[metric]} of N parameters after D '
        "tokens. In brackets: 95 % of fits to runs drawn again. Not for other sizes.</p>"
    )
    body = note + markup.table(header, rows) + f'<div class="charts">{figures}</div>'
    return markup.folded("Sizes and tokens", body)
