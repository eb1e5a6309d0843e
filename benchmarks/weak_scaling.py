"""Weak scaling of MemoryFormer-base in simulation: 1 to 2,048 devices; nothing is run.

    python -m benchmarks.weak_scaling [--json=FILE] [--png=docs/images/weak_scaling.png]

Eight sequences of 2048 tokens a device, eight microbatches, lean tables (6 bytes an entry with their
moments). The train step is traced on
abstract meshes: state and messages per device are exact, activations an estimate. Seconds are
those divided by the rates of `targets.CHIPS`, or by those measured, one term after the other:

    lookups        K F sums of every memory layer, both ways, at the estimated rate of one
    products       head and attention, forward and twice backward, and attention once more
                   (model.remat='projections'), at the matrix rate
    optimizer      16 bytes of every parameter held
    accumulation   10 bytes of every parameter for every microbatch but one
    model, data    wire bytes over the rate of the axis' slowest links, 10 us a message;
                   `data` and `shard` together

so nothing overlaps: an upper bound as far as the rates are right.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence

from benchmarks import arguments

FLAGS = arguments.Parser(__doc__)
FLAGS.output("json")
FLAGS.output("png", "docs/images/weak_scaling.png", help="'': none")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from memoryformer import accounting, presets
from memoryformer.accounting import targets as targets_lib
from memoryformer.dryrun import hlo_messages, jaxpr_messages, lowering
from memoryformer.ops import collectives
from memoryformer.training import experiment

LAYOUTS = {
    1: ("single",),
    8: ("fsdp", "fsdp_tensor:model=8"),
    64: ("fsdp", "fsdp_tensor:model=8"),
    512: ("fsdp", "fsdp_tensor:model=8"),
    2048: ("fsdp", "fsdp_tensor:model=8"),
}
# Seconds of forward and both gradients, per token, table and output value of a lookup:
# for 16384 tokens, K = 128, tau = 8, F = 1024 over their 2.147e9 sums. Measured on an H200, to
# whose H100 it is lent; an estimate on v6e.
LOOKUP_SUMS = 16384 * 128 * 1024
LOOKUP_SECONDS = {
    "h100": 2.05e-3 / LOOKUP_SUMS,
    "h200": 2.05e-3 / LOOKUP_SUMS,
    "v6e": 7.7e-3 / LOOKUP_SUMS,
}
# Rates that were measured take the place of the vendor's.
MEASURED = {"h200": {"matrix_flops": 780e12, "memory_bandwidth": 4.3e12}}
CHIPS = tuple(LOOKUP_SECONDS)
ROWS, MICROBATCHES = 8, 8  # a device's sequences; parts of a data replica's batch
MESSAGE_SECONDS = 10e-6
# Of a parameter: read and write it and its bfloat16 moment, read the gradient; those of a row
# are few. A sum of gradients is read and written, what is added is in bfloat16.
ADAM_BYTES, SUM_BYTES = 16, 10
TERMS = ("lookups", "products", "optimizer", "accumulation", "model", "data")


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device has to do in a step, whatever chip it is."""

    devices: int
    mesh: str
    tokens: int
    flops: float  # head and attention, both ways
    lookup_sums: float
    params: int  # that it holds between steps
    joined: int  # parameters that it computes with
    state_bytes: int
    held_bytes: int  # these in bfloat16, the sum of gradients, those of a microbatch
    activation_bytes: int
    model_bytes: float
    data_bytes: float
    model_messages: int
    data_messages: int

    @property
    def memory_bytes(self) -> int:
        """All of it."""
        return self.state_bytes + self.held_bytes + self.activation_bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Trace every layout, predict, print a table, draw."""
    options = FLAGS.parse_args(argv)
    shares = [share_of(n, mesh) for n, meshes in LAYOUTS.items() for mesh in meshes]
    rows = []
    for share in shares:
        for chip in CHIPS:
            seconds = predict(share, chip)
            rows.append(
                {
                    "chip": chip,
                    **dataclasses.asdict(share),
                    "memory_bytes": share.memory_bytes,
                    "fits": share.memory_bytes <= targets_lib.CHIPS[chip].memory_bytes,
                    "seconds": seconds,
                    "step_seconds": sum(seconds.values()),
                    "bound": max(seconds, key=seconds.get),
                }
            )
    print(table(rows))
    if options.json:
        path = pathlib.Path(options.json)
        path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if options.png:
        draw(rows, options.png)


def share_of(devices: int, mesh: str) -> Share:
    """Count one device's share, from a trace on an abstract mesh."""
    run = _run(devices, mesh)
    sharding = lowering.device_sharding(run, range(devices))
    state, messages = _traced(run, sharding)
    counted = accounting.count(run.model)
    tokens = run.train.batch_size * run.model.seq_len // devices
    sums = run.model.num_layers * counted.block.projections_exact / run.model.seq_len
    others = counted.multiply_adds_per_token - sums
    mixing = run.model.num_layers * counted.block.mixing / run.model.seq_len
    params = jax.tree.leaves(state.params)
    joined = sum(math.prod(x.shape) for x in params) // sharding.axis_size("model")
    return Share(
        devices=devices,
        mesh=mesh,
        tokens=tokens,
        flops=(6 * others + 2 * mixing) * tokens,
        lookup_sums=sums * tokens,
        params=lowering.device_bytes(state.params) // 4,
        joined=joined,
        state_bytes=lowering.device_bytes(state),
        held_bytes=joined * (2 + 4 + 2),
        activation_bytes=lowering.activation_bytes(run, sharding),
        model_bytes=hlo_messages.wire_bytes(messages, "model"),
        data_bytes=hlo_messages.wire_bytes(messages, *collectives.ROW_AXES),
        model_messages=sum(c.count for c in messages if "model" in c.axes),
        data_messages=sum(
            c.count for c in messages if set(collectives.ROW_AXES) & set(c.axes)
        ),
    )


def _run(devices, mesh) -> experiment.Experiment:
    config = presets.memoryformer("base")
    config.mesh = mesh
    config.train.batch_size = config.eval.batch_size = ROWS * devices
    config.train.num_microbatches = MICROBATCHES
    config.model.remat = "projections"
    config.optimizer.table_state = "lean"
    return experiment.resolve(config)


def _traced(run, sharding):
    """State of the whole model; messages of one block and of two, the rest in proportion."""
    state, found = None, []
    for layers in (1, 2):
        model = dataclasses.replace(run.model, num_layers=layers)
        small = dataclasses.replace(run, model=model)
        _, step = lowering.trace(small, sharding)
        mesh = lowering.mesh_shape(sharding)
        found.append(jaxpr_messages.collectives(step.jaxpr, mesh))
    state = lowering.state(run, sharding)
    return state, hlo_messages.extrapolated(*found, run.model.num_layers)


def predict(share: Share, name: str) -> dict[str, float]:
    """Seconds of each term of a step on one of `CHIPS`."""
    chip = dataclasses.replace(targets_lib.CHIPS[name], **MEASURED.get(name, {}))
    tensor = int(share.mesh.partition("model=")[2] or 1)
    # Members of one data group inside a domain use its links to the outside together.
    members = max(min(chip.domain, share.devices) // tensor, 1)
    across = chip.link_bandwidth
    if share.devices > chip.domain:
        across = min(across, members * chip.network_bandwidth)
    passes = SUM_BYTES * (MICROBATCHES - 1) * share.joined
    return {
        "lookups": share.lookup_sums * LOOKUP_SECONDS[name],
        "products": share.flops / chip.matrix_flops,
        "optimizer": ADAM_BYTES * share.params / chip.memory_bandwidth,
        "accumulation": passes / chip.memory_bandwidth,
        "model": share.model_bytes / chip.link_bandwidth
        + share.model_messages * MESSAGE_SECONDS,
        "data": share.data_bytes / across + share.data_messages * MESSAGE_SECONDS,
    }


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    gb = 1e9
    lines = [
        "| chip | devices | mesh | GFLOP, dense | sums, 10^9 | memory, GB | model, GB | "
        "data, GB | step, s | tokens/s a device | of 1 device | most |",
        "|" + "---|" * 12,
    ]
    alone = {r["chip"]: r["step_seconds"] for r in rows if r["devices"] == 1}
    for r in rows:
        fits = "" if r["fits"] else " (too much)"
        lines.append(
            f"| {r['chip']} | {r['devices']} | `{r['mesh']}` | {r['flops'] / 1e9:,.0f} | "
            f"{r['lookup_sums'] / 1e9:,.0f} | {r['memory_bytes'] / gb:.1f}{fits} | "
            f"{r['model_bytes'] / gb:.2f} | {r['data_bytes'] / gb:.2f} | "
            f"{r['step_seconds']:.2f} | {r['tokens'] / r['step_seconds']:,.0f} | "
            f"{alone[r['chip']] / r['step_seconds']:.0%} | {r['bound']} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: str) -> None:
    """Stack the terms of each step; dots are the memory of a device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2,
        len(CHIPS),
        figsize=(15, 7),
        sharex="col",
        height_ratios=(2, 1),
        layout="constrained",
    )
    for column, chip in enumerate(CHIPS):
        ours = [r for r in rows if r["chip"] == chip]
        names = [f"{r['devices']}\n{_short(r['mesh'])}" for r in ours]
        bottom = [0.0] * len(ours)
        for term in TERMS:
            heights = [r["seconds"][term] for r in ours]
            axes[0, column].bar(names, heights, bottom=bottom, label=term)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        sizes = [r["memory_bytes"] / 1e9 for r in ours]
        colours = ["tab:blue" if r["fits"] else "tab:red" for r in ours]
        axes[1, column].bar(names, sizes, color=colours)
        capacity = targets_lib.CHIPS[chip].memory_bytes / 1e9
        axes[1, column].axhline(capacity, color="black", linestyle="--")
        axes[1, column].text(
            len(ours) - 0.5, capacity, f"{capacity:.0f} GB", ha="right", va="bottom"
        )
        axes[0, column].set_title(f"{chip}: predicted seconds of a step")
        axes[1, column].set_ylabel("memory of a device, GB")
        axes[1, column].tick_params(axis="x", labelsize=8)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(TERMS),
    )
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def _short(mesh):
    """'fsdp_tensor:model=8' -> two short lines."""
    preset, _, size = mesh.partition(":")
    return f"{preset.replace('_tensor', '')}\n{size}"


if __name__ == "__main__":
    arguments.run(main)
