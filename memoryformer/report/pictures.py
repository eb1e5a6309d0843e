"""Pictures: FLOPs, use of buckets, curves, slots of memories, what losses cost.

Start at `SUBCOMMANDS`.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker

from memoryformer import accounting, config, errors
from memoryformer.data import run_tokenizer
from memoryformer.evaluation import buckets
from memoryformer.files import paths
from memoryformer.model import ModelConfig, implementations
from memoryformer.report import drawing, pareto, studies
from memoryformer.report.curves import curves_figure
from memoryformer.report.slots import slots_figure
from memoryformer.runs import remote
from memoryformer.training import experiment

LAYERS = ("mixer.qkv", "ffn.up", "ffn.down")


def flops_figure() -> plt.Figure:
    """Draw FLOPs per block against hidden size, the paper's Fig. 1, with K = D / 8."""
    widths = range(512, 3072 + 1, 128)
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    kinds = (("dense", "Transformer"), ("memory", "MemoryFormer"))
    for colour, (projection, label) in zip(drawing.COLOURS, kinds, strict=False):
        for length, line in ((2048, "-"), (1024, "--")):
            cost = [_block_flops(width, length, projection) / 1e9 for width in widths]
            axes.plot(widths, cost, line, color=colour, label=f"{label}, L = {length}")
    memory, dense = (_block_flops(2048, 2048, kind) for kind in ("memory", "dense"))
    ends: dict[str, Any] = {"xy": (2048, memory / 1e9), "xytext": (2048, dense / 1e9)}
    axes.annotate("", **ends, arrowprops={"arrowstyle": "->", "color": "0.3"})
    axes.text(2080, 0.7 * dense / 1e9, f"to {100 * memory / dense:.1f} %\n(L = 2048)")
    axes.set(
        xlabel="model width D",
        ylabel="GFLOPs (one multiply-add = one FLOP)",
        title="Forward pass of one block over one sequence of L tokens",
        xticks=range(512, 3073, 512),
        xlim=(512, 3072),
        ylim=(0, None),
    )
    axes.legend(loc="upper left")
    return figure


def buckets_figure(counts: Mapping[str, np.ndarray]) -> plt.Figure:
    """Draw how often each bucket is read in the first block, the paper's Fig. 4.

    `counts` is `evaluation.buckets.collect`'s. Columns: Q, K, V (one hash), FFN up, FFN down;
    rows: the first and the last table.
    """
    figure, all_axes = plt.subplots(2, 3, figsize=(11.5, 6.0), sharey="col")
    titles = ("Q, K, V (one hash)", "FFN up", "FFN down")
    for column, (layer, title) in enumerate(zip(LAYERS, titles, strict=True)):
        table_counts = counts[f"blocks.0.{layer}"]  # [K, C]
        num_tables, num_buckets = table_counts.shape
        use = buckets.utilisation(table_counts)
        for row, table in enumerate((0, num_tables - 1)):
            axes = all_axes[row, column]
            share = table_counts[table] / table_counts[table].mean()
            edges = np.arange(num_buckets + 1) - 0.5
            colour = drawing.COLOURS[column]
            axes.stairs(share, edges, fill=True, color=colour, edgecolor=colour, lw=0.6)
            axes.axhline(1, color="black", linestyle="--", linewidth=1)
            used = f"{100 * use.used_fraction[table]:.0f} % used"
            entropy = f"entropy {use.entropy[table]:.2f}"
            axes.set(
                title=f"{title}, table {table + 1} of {num_tables}\n{used}, {entropy}, "
                f"max {use.max_over_mean[table]:.1f}x",
                xlim=(-0.5, num_buckets - 0.5),
                xticks=np.linspace(0, num_buckets, 5),
            )
            axes.grid(axis="x", visible=False)
    for axes in all_axes[:, 0]:
        axes.set_ylabel("reads / mean reads")
    for axes in all_axes[-1]:
        axes.set_xlabel("bucket")
    tokens = int(counts[f"blocks.0.{LAYERS[0]}"][0].sum())
    figure.suptitle(
        f"Reads of each bucket, first block, {tokens:,} validation tokens; "
        "dashed: uniform"
    )
    return figure


def layers_figure(counts: Mapping[str, np.ndarray]) -> plt.Figure:
    """Draw how evenly every memory layer of every block is used: mean, and range."""
    figure, all_axes = plt.subplots(2, 2, figsize=(9.5, 6.4), sharex=True)
    panels = (
        ("used_fraction", "rows used (fraction)"),
        ("entropy", "entropy / log C"),
        ("max_over_mean", "most read row / mean row"),
        ("flip_rate", "flip rate of a bit, 2p(1 - p)"),
    )
    num_blocks = 1 + max(int(name.split(".")[1]) for name in counts)
    for layer, marker, colour in zip(LAYERS, "osD", drawing.COLOURS, strict=False):
        names = [f"blocks.{block}.{layer}" for block in range(num_blocks)]
        blocks = [b for b, name in enumerate(names) if name in counts]
        values = [_layer_values(counts[names[block]]) for block in blocks]
        for axes, (key, _) in zip(all_axes.flat, panels, strict=True):
            each = [value[key].ravel() for value in values]
            mean = [np.mean(value) for value in each]
            low, high = [np.min(v) for v in each], [np.max(v) for v in each]
            offset = 0.12 * (LAYERS.index(layer) - 1)  # beside each other, not on top
            axes.errorbar(
                np.asarray(blocks) + offset,
                mean,
                yerr=[np.subtract(mean, low), np.subtract(high, mean)],
                color=colour,
                marker=marker,
                markersize=5,
                linestyle="none",
                elinewidth=1,
                capsize=2,
                label=layer,
            )
    for axes, (key, label) in zip(all_axes.flat, panels, strict=True):
        uniform = 0.5 if key == "flip_rate" else 1.0
        axes.axhline(uniform, color="black", linestyle="--", linewidth=1)
        top = None if key == "max_over_mean" else 1.05 * uniform
        axes.set(ylabel=label, ylim=(0, top))
    for axes in all_axes[-1]:
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(
        "Mean over tables (bits), bars from least to most; dashed: uniform use"
    )
    return figure


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags of the command line say."""

    output: str = ""  # folder for the pictures; '' = DIR/plots
    workdir: str = ""
    max_tokens: int = 0  # 0 = all


def run_flops(argv: Sequence[str], options: Options) -> None:
    """Draw Fig. 1 into `output`, by default the working directory."""
    _no_more(argv, "flops")
    drawing.save(flops_figure(), drawing.folder(options.output or ".") / "flops.png")


def run_curves(argv: Sequence[str], options: Options) -> None:
    """Draw the losses of the runs named on the command line."""
    if not argv:
        raise errors.ConfigError("report curves: name at least one run directory.")
    output = remote.output(options.output, argv[0], "plots")
    figure = curves_figure([_existing(name) for name in argv])
    output = drawing.folder(output)
    drawing.save(figure, output / "curves.png")


def run_slots(argv: Sequence[str], options: Options) -> None:
    """Draw how alike the slots of memories are over training, of the sweeps named."""
    if not argv:
        raise errors.ConfigError("report slots: name at least one sweep directory.")
    sweeps = [_existing(str(paths.local(name, "report"))) for name in argv]
    output = drawing.folder(options.output or sweeps[0] / "plots")
    drawing.save(slots_figure(sweeps), output / "slots.png")


def run_costs(argv: Sequence[str], options: Options) -> None:
    """Draw the loss of a sweep's variants over each cost that differs among them."""
    if len(argv) != 1:
        raise errors.ConfigError("report costs: name one sweep directory.")
    study, *others = studies.load([_existing(argv[0])])
    if others:
        raise errors.ConfigError(f"report costs {argv[0]}: holds several; name one.")
    placed = {cost: pareto.spots(study, study.headline, cost) for cost in pareto.COSTS}
    drawn = {cost: spots for cost, spots in placed.items() if pareto.differ(spots)}
    if not drawn:
        raise errors.DataError(f"{argv[0]}: no two variants of this differ in cost.")
    output = drawing.folder(remote.output(options.output, argv[0], "plots"))
    for cost, spots in drawn.items():
        chart = pareto.scatter(
            spots, pareto.COSTS[cost][0], studies.NAMES[study.headline]
        )
        drawing.save(chart, output / f"costs_{cost}.png")


def run_utilisation(argv: Sequence[str], options: Options) -> None:
    """Draw how the run in `workdir` uses its buckets, on its validation text.

    Counts the newest checkpoint's codes on the first `max_tokens` tokens and prints a
    line per layer.
    """
    _no_more(argv, "utilisation")
    if not options.workdir:
        raise errors.ConfigError("report utilisation: --workdir=DIR is missing.")
    output = remote.output(options.output, options.workdir, "plots")
    workdir = _existing(options.workdir, params=True)
    counts = _collect(workdir, options.max_tokens)
    output = drawing.folder(output)
    drawing.save(buckets_figure(counts), output / "utilisation_buckets.png")
    drawing.save(layers_figure(counts), output / "utilisation_layers.png")
    print(f"{'layer':22s} {'used':>6s} {'entropy':>8s} {'max/mean':>9s} {'flip':>6s}")
    for name, layer_counts in counts.items():
        means = {k: np.mean(v) for k, v in _layer_values(layer_counts).items()}
        print("{:22s} {:6.1%} {:8.3f} {:9.1f} {:6.3f}".format(name, *means.values()))


SUBCOMMANDS = {
    "flops": run_flops,
    "utilisation": run_utilisation,
    "curves": run_curves,
    "slots": run_slots,
    "costs": run_costs,
}


def main(argv: Sequence[str], options: Options) -> None:
    """Run the subcommand that `argv` names."""
    if len(argv) < 2:
        raise errors.ConfigError(f"report: name one of {', '.join(SUBCOMMANDS)}.")
    name = config.choose(argv[1], SUBCOMMANDS, "report subcommand")
    with plt.rc_context(drawing.STYLE):
        SUBCOMMANDS[name](argv[2:], options)


def _block_flops(width: int, length: int, projection: str) -> int:
    model = ModelConfig(
        vocab_size=1,
        embed_dim=width,
        num_layers=1,
        num_heads=1,
        seq_len=length,
        projection=projection,
        output_projection=projection == "dense",
    )
    return accounting.count(model).block.total_paper


def _collect(workdir: pathlib.Path, max_tokens: int) -> dict[str, np.ndarray]:
    """Count the codes of the newest checkpoint on the start of its validation text."""
    run, params, facts = experiment.load(workdir)
    model_config = implementations.readable(run.model)
    dataset = run_tokenizer.dataset(workdir, run.data, facts, model_config.vocab_size)
    batch_size = max(1, 8192 // model_config.seq_len)
    split = dataset.validation.eval_batches(model_config.seq_len, batch_size)
    number = -(-max_tokens // (batch_size * model_config.seq_len)) or None
    batches = itertools.islice(iter(split), number)
    return buckets.collect(model_config, params, batches)


def _layer_values(counts: np.ndarray) -> dict[str, np.ndarray]:
    use = buckets.utilisation(counts)
    return {
        "used_fraction": use.used_fraction,
        "entropy": use.entropy,
        "max_over_mean": use.max_over_mean,
        "flip_rate": buckets.bit_rates(counts).flip_rate,
    }


def _no_more(argv: Sequence[str], subcommand: str) -> None:
    if argv:
        raise errors.ConfigError(
            f"report {subcommand}: {argv[0]!r}: unexpected argument."
        )


def _existing(name: str, *, params: bool = False) -> pathlib.Path:
    path = remote.copied(name, name="report", params=params)
    if not path.is_dir():
        raise errors.DataError(f"{name}: there is no such run directory.")
    return path
