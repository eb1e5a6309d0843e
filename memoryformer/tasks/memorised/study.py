"""How well a table of a network's steps does without the network: accuracy against its share.

For every share of the training images: the nearest row with equal weights, with tuned ones, and
the row found by hash codes, on the held-out images. Start at `measure`.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from memoryformer.errors import ConfigError
from memoryformer.runs import steps as run_steps
from memoryformer.tasks import experiment
from memoryformer.tasks.memorised import digits, network, table


@dataclasses.dataclass(frozen=True)
class Row:
    """Shares of right answers on the held-out images, for a share of the training images.

    nearest, hashed: by how rows are found, with equal weights and with tuned ones.
    nearest_hits: lookups that met a row at distance 0; hashed_hits: reads of a bucket that is
    not empty, both with tuned weights.
    """

    percent: float
    rows: int
    network: float
    nearest: float
    nearest_tuned: float
    hashed: float
    hashed_tuned: float
    nearest_hits: float
    hashed_hits: float
    weights: table.Weights


@dataclasses.dataclass(frozen=True)
class Options:
    """Shares of the training images in percent, draws of weights, and the size of codes."""

    percents: Sequence[float] = (15, 50, 100)
    draws: int = 20
    code_bits: int = 14
    num_tables: int = 32


def measure(
    workdir: str | os.PathLike, step: int | None = None, options: Options = Options()
) -> list[Row]:
    """Return a row for each share of the training images; raises as `runs.load`."""
    config, params = run_steps.load(workdir, step)
    if config.get("task", {}).get("name") != "memorised":
        raise ConfigError(f"--workdir={workdir}: is no run of the task 'memorised'.")
    run = experiment.resolve(config)
    net, seed = run.task.model, run.task.options.seed
    check(net, options.code_bits)
    train, held_out = digits.load("train"), digits.load("validation")
    first = table.first_corners(len(train.labels), seed)
    whole, _ = table.steps(net, params, train.pixels, first)
    ahead = table.first_corners(len(held_out.labels), seed + 1)
    _, answers = table.steps(net, params, held_out.pixels, ahead)

    def accuracy(reader):
        classes, hits = table.follow(net, reader, held_out.pixels, ahead)
        return float(np.mean(classes == held_out.labels)), hits

    def hashed(part, weights):
        size = options.code_bits, options.num_tables
        return accuracy(table.Hashed(part, *size, weights, seed))

    rows = []
    for percent in options.percents:
        number = max(1, round(percent / 100 * len(train.labels)))
        part = whole.of_images(number)
        known = train.pixels[:number], train.labels[:number], first[:number]
        weights = table.tune(part, *known, options.draws, seed)
        nearest, nearest_hits = accuracy(table.Nearest(part, weights))
        coded, hashed_hits = hashed(part, weights)
        row = Row(
            percent=percent,
            rows=len(part.keys),
            network=float(np.mean(answers == held_out.labels)),
            nearest=accuracy(table.Nearest(part))[0],
            nearest_tuned=nearest,
            hashed=hashed(part, table.EQUAL)[0],
            hashed_tuned=coded,
            nearest_hits=nearest_hits,
            hashed_hits=hashed_hits,
            weights=weights,
        )
        rows.append(row)
    return rows


def check(config: network.NetworkConfig, code_bits: int) -> None:
    """Raise `ConfigError` if keys have fewer bits than a code."""
    width = sum(table.widths(config))
    if code_bits > width:
        raise ConfigError(f"--code_bits={code_bits}: a key has {width} bits; lower it.")


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table, in percent."""
    heads = ["images", "rows", "network", "nearest", "tuned", "hashed", "tuned"]
    heads += ["exact rows", "filled buckets"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        shares = [row.network, row.nearest, row.nearest_tuned]
        shares += [row.hashed, row.hashed_tuned, row.nearest_hits, row.hashed_hits]
        cells = " | ".join(f"{100 * share:.1f}" for share in shares)
        lines.append(f"| {row.percent:g} % | {row.rows} | {cells} |")
    return "\n".join(lines)
