"""Pieces of a report page as HTML: tables, figures, legends, paragraphs. Start at `table`."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import pyplot as plt

from memoryformer.report import drawing
from memoryformer.sweep import statistics as statistics_lib

VERDICTS = ("lower", "higher", "within noise", "one seed", "baseline")


def text(value: Any) -> str:
    """A value as text that is no markup."""
    return html.escape(str(value))


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls by itself where it is wider than the page."""
    head = "".join(f"<th>{_breakable(text(cell))}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(caption: str, chart: plt.Figure) -> str:
    """A chart under its caption."""
    drawn = drawing.svg(chart, caption)
    return f"<figure><figcaption>{text(caption)}</figcaption>{drawn}</figure>"


def legend(names: Iterable[str]) -> str:
    """List the series, each with a piece of its line."""
    items = ""
    for index, name in enumerate(names):
        style = drawing.series_style(index)
        line = "solid" if style["linestyle"] == "-" else "dashed"
        colour = drawing.VARIABLES[style["color"]]
        items += (
            f'<li><i style="border-top: 3px {line} var({colour})"></i>{text(name)}</li>'
        )
    return f'<ul class="legend">{items}</ul>'


def folded(summary: str, body: str, *, is_open: bool = True) -> str:
    """A part that can be folded away."""
    state = " open" if is_open else ""
    return f"<details{state}><summary>{text(summary)}</summary>{body}</details>"


def plus_minus(value: float, spread: float, sign: str = "") -> str:
    """'1.2345 ± 0.02'; without a spread the value alone."""
    shown = f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.0f}"
    return statistics_lib.with_spread(shown, spread)


def _cell(value):
    shown = text(value)
    kind = ' class="number"' if shown[:1].isdigit() or shown[:1] in "+-" else ""
    if shown in VERDICTS:
        kind, shown = "", f'<span class="verdict">{shown}</span>'
    return f"<td{kind}>{shown}</td>"


def _breakable(escaped):
    return escaped.replace(".", ".<wbr>").replace("_", "_<wbr>")
