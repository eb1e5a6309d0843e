"""Results of the harness, laid out: one flat dictionary a task, and a table to read.

    what the harness returns: {'results': {task: {'acc,none': ..}}, 'n-samples': .., ..}
    `flat`:                   {task: {'acc': .., 'acc_stderr': .., 'documents': ..}}

Start at `flat` and `table`. Does not need lm-eval.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from memoryformer.harness import task_files

# What the harness returns and is kept; the rest describes its own settings.
KEPT = ("results", "group_subtasks", "versions", "n-shot", "n-samples")


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: numpy's numbers as Python's, other things as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.floating):  # item() of a wide one is no Python number
        return float(value)
    if isinstance(value, np.integer | np.bool_ | np.str_):
        return value.item()
    return value if isinstance(value, str | int | float | None) else str(value)


def kept(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the harness's results that `flat` reads, as JSON can hold it."""
    return plain({key: results[key] for key in KEPT if key in results})


def flat(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {task or group: {metric: value, 'metric_stderr': .., 'documents': ..}}.

    A metric of a filter other than 'none' is named 'metric,filter'. A group also has
    'subtasks'. Errors that the harness does not know are left out.
    """
    return {
        name: _metrics(values) | _facts(results, name)
        for name, values in results["results"].items()
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {}
    for key, value in values.items():
        metric, comma, variant = key.partition(",")
        if not comma or value == "N/A":
            continue
        value = float(value) if isinstance(value, int | float) else value
        metrics[metric if variant == "none" else key] = value
    return metrics


def _facts(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    counted = results.get("n-samples", {}).get(name, {})
    facts = {
        "documents": counted.get(
            "effective", results["results"][name].get("sample_len")
        ),
        "num_fewshot": results.get("n-shot", {}).get(name),
        "version": results.get("versions", {}).get(name),
    }
    subtasks = results.get("group_subtasks", {}).get(name)
    return facts | ({"subtasks": list(subtasks)} if subtasks else {})


def average(tasks: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the mean accuracy of the paper's six tasks, None unless all are there."""
    accuracies = [tasks.get(name, {}).get("acc") for name in task_files.TASKS]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    return float(np.mean(known)) if len(known) == len(accuracies) else None


def table(result: Mapping[str, Any]) -> str:
    """Lay every metric of every task out beside the paper's and EleutherAI's figures."""
    rows = [row for name in result["tasks"] for row in _rows(name, result["tasks"])]
    if result["average"] is not None:
        means = [float(np.mean(figures)) for figures in task_files.FIGURES.values()]
        rows.append(("average", "acc", _number(result["average"]), "", means))
    published = list(task_files.FIGURES) if any(row[-1] for row in rows) else []
    rows.insert(0, ("", "metric", "value", "docs", published))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, metric, value, documents, figures in rows:
        line = f"{name:<{widths[0]}}  {metric:<{widths[1]}}  {value:<{widths[2]}}  "
        line += f"{documents:>{widths[3]}}  "
        line += " ".join(f"{_figure(figure):>14}" for figure in figures)
        lines.append(line.rstrip())
    if published:
        lines.append("published figures: zero-shot acc")
    lines.append("+- is one standard error")
    for name, counts in result["notes"].items():
        listed = ", ".join(f"{count} {what}" for what, count in counts.items())
        seq_len = result["settings"]["seq_len"]
        lines.append(f"note: {name}: {listed} (the model reads {seq_len} tokens)")
    return "\n".join(lines)


def _rows(name: str, tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple]:
    """(task, metric, value, documents, published figures) of every metric of one task."""
    values = tasks[name]
    facts = ("documents", "num_fewshot", "version", "subtasks")
    metrics = [
        key for key in values if key not in facts and _error_of(key, values) is None
    ]
    documents = "" if values["documents"] is None else str(values["documents"])
    for index, metric in enumerate(metrics or [""]):
        shown = _with_error(values, metric) if metric else ""
        figures = []
        if metric == "acc" and name in task_files.TASKS:
            at = list(task_files.TASKS).index(name)
            figures = [figure[at] for figure in task_files.FIGURES.values()]
        first = index == 0
        yield name if first else "", metric, shown, documents if first else "", figures


def _error_of(key: str, values: Mapping[str, Any]) -> str | None:
    """The metric whose standard error `key` is; None if it is a metric itself."""
    metric = key.replace("_stderr", "", 1)
    return metric if metric != key and metric in values else None


def _with_error(values: Mapping[str, Any], metric: str) -> str:
    name, comma, variant = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{variant}")
    shown = _number(values[metric])
    return shown if error is None else f"{shown}+-{_number(error)}"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 1000 or math.isnan(value) else f"{value:.4g}"


def _figure(figure: float | str) -> str:
    return figure if isinstance(figure, str) else f"{figure:.3f}"
