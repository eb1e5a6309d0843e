"""What is told of a conversion: a line for each part, a table at the end. Start at `summary`."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from memoryformer import accounting
from memoryformer.model import ModelConfig


def line(title: str, told: Mapping[str, Any]) -> str:
    """One part, as it is done."""
    iterations = told["iterations"] and f", {told['iterations']} iterations"
    return (
        f"{title}: unexplained {told['unexplained']:.4f}, ridge {told['ridge']:g}"
        f"{iterations or ''}, loss {told['loss']:.4f} ({told['seconds']:.0f} s)"
    )


def summary(
    before: ModelConfig,
    after: ModelConfig,
    loss_before: float,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What `memorise.json` holds; bytes are of float32 weights."""
    return {
        "loss_before": loss_before,
        "loss_after": rows[-1]["loss"],
        "before": _costs(before),
        "after": _costs(after),
        "model_parts": after.projection_options.parts,
        "go_on_with": _flags(after),
        "parts": [dict(row) for row in rows],
    }


def _flags(config):
    """What makes the config of the dense model that of the new one."""
    flags = ["--config.model.projection=mixed", f"--config.model.score={config.score}"]
    for item in dataclasses.fields(config.projection_options):
        value = getattr(config.projection_options, item.name)
        if value != item.default:
            name = f"--config.model.projection_options.{item.name}"
            flags.append(f"{name}={shlex.quote(str(value))}")
    return " ".join(flags)


def _costs(config):
    counted = accounting.count(config, value_bytes=4)
    read = counted.table_bytes_read_per_token + counted.dense_bytes
    return {"parameters": counted.parameters.total, "bytes_a_token": read}


def table(told: Mapping[str, Any]) -> str:
    """The table at the end."""
    widest = max(11, *(len(row["part"]["mix"]) + 1 for row in told["parts"]))
    lines = [
        f"{'layer':>5}  {'part':<7}{'mix':<{widest}}{'bits':>5}{'ridge':>8}{'unexplained':>13}"
        f"{'loss':>9}{'seconds':>9}"
    ]
    for row in told["parts"]:
        part = row["part"]
        lines.append(
            f"{row['layer']:>5}  {row['name']:<7}{part['mix']:<{widest}}{part['code_bits']:>5}"
            f"{row['ridge']:>8g}{row['unexplained']:>13.4f}{row['loss']:>9.4f}"
            f"{row['seconds']:>9.0f}"
        )
    gap = told["loss_after"] - told["loss_before"]
    lines.append(
        f"loss, nats a token: {told['loss_before']:.4f} before, "
        f"{told['loss_after']:.4f} after ({gap:+.4f})"
    )
    for name, text in (
        ("parameters", "parameters"),
        ("bytes_a_token", "bytes of float32 weights read for a token"),
    ):
        first, last = told["before"][name], told["after"][name]
        lines.append(f"{text}: {first:,} before, {last:,} after")
    return "\n".join([*lines, f"train on with {told['go_on_with']}"])
