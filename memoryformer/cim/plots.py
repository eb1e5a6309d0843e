"""The picture of an experiment: loss against noise and time, flips, energy. Start at `figure`."""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt

from memoryformer.cim import energy as energy_lib
from memoryformer.cim import tables
from memoryformer.cim.settings import AXES, Setting
from memoryformer.cim.technologies import TECHNOLOGIES, Memory
from memoryformer.model import ModelConfig
from memoryformer.model import parts as parts_lib
from memoryformer.report import drawing

COLUMNS = 3
PANEL = {
    "pcm_uncompensated": "pcm",
    "io_mid_rise": "io",
}  # dashed, in the panel of another
SHOWN = ("edram", "lpddr4", "isaac", "neurram_8_6", "hermes_4phase")


def figure(
    rows: Sequence[tables.Row],
    settings: Sequence[Setting],
    models: dict[str, ModelConfig],
    batch: int,
) -> plt.Figure:
    """Draw a panel for each kind of noise that has a level, then flips and energy.

    In brackets behind a model: its bits per byte without noise.
    """
    kinds = [k for k in dict.fromkeys(s.kind for s in settings) if AXES[k] != "-"]
    panels = list(dict.fromkeys(PANEL.get(kind, kind) for kind in kinds))
    names = {name: _label(config) for name, config in models.items()}
    with_flips = any(parts_lib.has_tables(config) for config in models.values())
    count = len(panels) + with_flips + 1
    height = -(-count // COLUMNS)
    size = (4.4 * COLUMNS, 3.5 * height)
    whole, all_axes = plt.subplots(height, COLUMNS, figsize=size, squeeze=False)
    free = iter(all_axes.flat)
    for kind in panels:
        axes = next(free)
        for one in kinds:
            if PANEL.get(one, one) == kind:
                levels = [s for s in settings if s.kind == one]
                _losses(axes, rows, levels, settings[0], names, dashed=one in PANEL)
        axes.set(title=kind, xlabel=AXES[kind], ylabel="more bits per byte")
        if kind != "io" and all(s.level for s in settings if s.kind == kind):
            axes.set_xscale("log")
        axes.legend(fontsize="small")
    if with_flips:
        _flips(next(free), rows, settings, kinds)
    _energies(next(free), models, names, batch)
    for axes in free:
        axes.axis("off")
    return whole


def _label(config: ModelConfig) -> str:
    score = f", {config.score}" if parts_lib.has_tables(config) else ""
    return config.projection + score


def _losses(axes, rows, levels, ideal, names, *, dashed):
    """Bits per byte above those without noise: mean over seeds, and their range."""
    for colour, (name, label) in zip(drawing.COLOURS, names.items(), strict=False):
        clean = tables.bits_per_byte(rows, name, ideal).mean()
        values = [tables.bits_per_byte(rows, name, s) - clean for s in levels]
        x = [s.level for s in levels]
        style = {"color": colour, "marker": "o", "markersize": 3}
        label = f"{label} ({clean:.3f})"
        if dashed:
            style |= {"linestyle": "--", "markerfacecolor": "white"}
            label = (
                f"{names[name]}, {levels[0].kind.partition('_')[2].replace('_', ' ')}"
            )
        axes.plot(x, [v.mean() for v in values], label=label, **style)
        low, high = [v.min() for v in values], [v.max() for v in values]
        axes.fill_between(x, low, high, color=colour, alpha=0.17, linewidth=0)


def _flips(axes, rows, settings, kinds):
    """The highest level of each kind (the fewest bits), by layer."""
    name = next(row["model"] for row in rows if row["flips"])
    layers = tables.layers_of(rows, name)
    for index, kind in enumerate(kinds):
        levels = [s for s in settings if s.kind == kind]
        pick = min if kind.startswith("io") else max
        setting = pick(levels, key=lambda s: s.level)
        rates = 100 * tables.flip_rates(rows, name, setting, layers)
        label = f"{kind} {setting.level:g}"
        axes.plot(
            rates, label=label, marker="o", markersize=3, **drawing.series_style(index)
        )
    short = [layer.removeprefix("blocks.") for layer in layers]
    axes.set_xticks(
        range(len(layers)), short, rotation=60, ha="right", fontsize="x-small"
    )
    axes.set(title="code bits flipped", ylabel="%")
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the names
    axes.legend(fontsize="x-small", ncols=2, loc="upper center")


def _energies(axes, models, names, batch):
    """A bar for each model and place of its tables, on a few technologies."""
    bars = []
    for colour, (name, config) in zip(drawing.COLOURS, models.items(), strict=False):
        bars.append((names[name], config, "rows", {"color": colour}))
        if parts_lib.has_tables(config):
            hatched = {"facecolor": "none", "edgecolor": colour, "hatch": "///"}
            label = f"{names[name]}, tables in crossbars"
            bars.append((label, config, "crossbar", hatched))
    place = np.arange(len(SHOWN))
    width = 0.8 / len(bars)
    for index, (label, config, where, style) in enumerate(bars):
        totals = [
            energy_lib.total(energy_lib.per_token(config, technology, batch, where))
            if where == "rows" or not isinstance(TECHNOLOGIES[technology], Memory)
            else np.nan
            for technology in SHOWN
        ]
        heights = np.divide(totals, 1e3)  # nJ
        axes.bar(place + index * width, heights, width, label=label, **style)
    axes.set_xticks(
        place + 0.4 - width / 2, SHOWN, rotation=30, ha="right", fontsize="small"
    )
    axes.set(title=f"energy of a token, batch {batch}", ylabel="nJ", yscale="log")
    axes.legend(fontsize="x-small")
