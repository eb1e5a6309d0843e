"""What was measured and counted, as text to read and as Markdown. Start at `summary`."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from memoryformer.cim import energy as energy_lib
from memoryformer.cim.constants import CONSTANTS
from memoryformer.cim.settings import AXES, Setting
from memoryformer.cim.technologies import TECHNOLOGIES, Memory
from memoryformer.model import ModelConfig
from memoryformer.model import parts as parts_lib

Row = dict[str, Any]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def constants() -> str:
    """Every constant with its value, unit, node and source."""
    rows = [
        [f"`{name}`", f"{c.value:.4g}", c.unit, c.node, c.source]
        for name, c in CONSTANTS.items()
    ]
    return markdown(["constant", "value", "unit", "node", "source"], rows)


def energy(rows: Sequence[energy_lib.Row]) -> str:
    """The rows of one technology and batch, their sum, and where the figures are from."""
    parts = ("read", "arithmetic", "hash", "conversion", "total")
    head = ["technology", "node", "batch", "layer", "kind", "mapping", "layers"]
    head += [f"{part} nJ" for part in parts] + ["ns", "stored Mbit"]
    lines = [
        [
            *(row.technology, row.nodes, str(row.batch), row.layer, row.kind),
            *(row.mapping, str(row.layers)),
            *(_nano(getattr(row, f"{part}_pj")) for part in parts),
            "-" if row.ns is None else f"{row.ns:.4g}",
            f"{row.stored_bits / 1e6:.4g}",
        ]
        for row in rows
    ]
    times = [row.ns for row in rows]
    known = [ns for ns in times if ns is not None]
    first = rows[0]
    sums = [sum(getattr(row, f"{part}_pj") for row in rows) for part in parts]
    lines.append(
        [
            *(first.technology, first.nodes, str(first.batch), "**all**", "", "", ""),
            *map(_nano, sums),
            f"{sum(known):.4g}" if len(known) == len(times) else "-",
            f"{sum(row.stored_bits for row in rows) / 1e6:.4g}",
        ]
    )
    return f"{markdown(head, lines)}\nSources: {'; '.join(first.sources)}.\n"


def summary(
    rows: Sequence[Row],
    settings: Sequence[Setting],
    models: dict[str, ModelConfig],
    batch: int,
) -> str:
    """Bits per byte of each setting, mean and deviation over seeds, and energy beside it.

    models: of 'run' and 'beside'. Energy is that of `Setting.energy`: of a memory model with
    its tables in rows / in crossbars.
    """
    head = ["noise", "level", "batch", "seeds"]
    for name in models:
        head += [f"bits/byte, {name}", "more", f"nJ a token, {name}"]
    lines = []
    for setting in settings:
        line = [setting.kind, level(setting), str(batch), ""]
        for name, model_config in models.items():
            values = bits_per_byte(rows, name, setting)
            ideal = bits_per_byte(rows, name, settings[0]).mean()
            line[3] = str(len(values))
            spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
            line += [f"{values.mean():.4f}{spread}", f"{values.mean() - ideal:+.4f}"]
            line += [energies(model_config, setting.energy, batch)]
        lines.append(line)
    return markdown(head, lines)


def flips(rows: Sequence[Row], settings: Sequence[Setting], name: str) -> str:
    """Per cent of a layer's code bits that are not those of the model without noise."""
    layers = layers_of(rows, name)
    if not layers:
        return ""
    lines = []
    for setting in settings:
        means = flip_rates(rows, name, setting, layers)
        lines.append([setting.kind, level(setting), *(f"{100 * m:.2f}" for m in means)])
    short = [layer.removeprefix("blocks.") for layer in layers]
    return markdown(["% of code bits flipped", "level", *short], lines)


def layers_of(rows: Sequence[Row], name: str) -> list[str]:
    """The memory layers of a model by block: mixer, up, down."""
    found = {layer for row in rows if row["model"] == name for layer in row["flips"]}

    def block(layer):
        return int(re.sub(r"\D", "", layer.partition(".")[2].partition(".")[0]) or 0)

    return sorted(sorted(found, reverse=True), key=block)


def bits_per_byte(rows: Sequence[Row], name: str, setting: Setting) -> np.ndarray:
    """Of each seed."""
    return np.array([row["bits_per_byte"] for row in _of(rows, name, setting)])


def flip_rates(
    rows: Sequence[Row], name: str, setting: Setting, layers: Sequence[str]
) -> np.ndarray:
    """Mean over seeds, by layer."""
    found = [
        [row["flips"][layer] for layer in layers] for row in _of(rows, name, setting)
    ]
    return np.mean(found, axis=0)


def energies(model_config: ModelConfig, technology: str, batch: int) -> str:
    """nJ of a token: 'tables in rows / in crossbars' where both are possible."""
    both = ["rows"]
    if parts_lib.has_tables(model_config):
        if not isinstance(TECHNOLOGIES[technology], Memory):
            both.append("crossbar")
    totals = [
        energy_lib.total(energy_lib.per_token(model_config, technology, batch, tables))
        for tables in both
    ]
    return f"{' / '.join(_nano(t) for t in totals)} ({technology})"


def level(setting: Setting) -> str:
    """The level with its unit."""
    return (
        "-" if AXES[setting.kind] == "-" else f"{setting.level:g} {AXES[setting.kind]}"
    )


def _of(rows, name, setting):
    return [
        row
        for row in rows
        if (row["model"], row["kind"], row["level"])
        == (name, setting.kind, setting.level)
    ]


def _nano(picojoules: float) -> str:
    return f"{picojoules / 1e3:.4g}"
