"""What a dry run found: figures, a verdict, and both as text or JSON. Start at `Report`."""

import dataclasses
import enum
import json
from typing import Any

import jax

from memoryformer import config as config_lib
from memoryformer.accounting.targets import GIB
from memoryformer.dryrun import hlo_messages


class Fit(enum.Enum):
    """Whether a step fits into the memory of a device."""

    NOT_COMPILED = "not compiled"
    COMPILES = "compiles"  # the memory of the device is not known
    FITS = "fits"
    DOES_NOT_FIT = "does not fit"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether it fits, and by how much or what the compiler said."""

    fit: Fit
    detail: str = ""

    def __str__(self):
        return f"{self.fit.value}: {self.detail}" if self.detail else self.fit.value


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, as the compiler plans them."""

    arguments: int  # state and batch
    outputs: int  # the new state, where it does not take the old one's place
    temporary: int  # activations, gradients, what is gathered
    total: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Memory":
        """Read the compiler's plan."""
        stats = compiled.memory_analysis()
        if stats is None:
            raise ValueError("this platform's compiler shows no memory plan")
        outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
        parts = (stats.argument_size_in_bytes, outputs, stats.temp_size_in_bytes)
        return cls(*parts, sum(parts))

    def plus(self, other: "Memory", times: int) -> "Memory":
        """Each field, and `times` what it is beyond `other`'s."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Memory(*(a + times * (a - b) for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything `examine.examine` finds; bytes are those of one device unless said."""

    config: dict[str, Any]
    target: str
    mesh: dict[str, int]
    num_devices: int
    parameters: dict[str, int]
    training_flops_per_token: int
    tokens_per_step: int
    total_tokens: int
    device_hours_at_peak: float  # if products alone took time, at the chip's bf16 peak
    split: str  # how tables lie on the mesh, and whether anything is padded
    checkpoint_bytes: int  # the whole state
    params_bytes: int
    teacher_bytes: int  # parameters of `train.teacher`; 0 without one
    optimizer_bytes: int
    gathered_bytes: int  # parameters joined from `data` (FSDP), for a step
    gradient_bytes: int  # before they are summed over `data`
    activation_bytes: int  # an estimate: what the forward pass of a microbatch keeps
    messages: list[hlo_messages.Collective]  # of the traced step
    compiled: str = ""  # for what, and how much of the step
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: Memory | None = None
    plan_bytes: int = 0  # `memory.total`: all of one device, by its compiler
    device_bytes: int = 0  # 0: not known
    verdict: Verdict = Verdict(Fit.NOT_COMPILED)
    collectives: list[hlo_messages.Collective] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def as_json(self) -> str:
        """Return the report as JSON, its verdict as text."""
        fields = dataclasses.asdict(self) | {"verdict": str(self.verdict)}
        return json.dumps(fields, indent=2)


def describe(report: Report) -> str:
    """Return the report as text to read."""
    config = config_lib.flatten(report.config).items()
    lines = [f"{key} = {value}" for key, value in config]
    mesh = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    rows = [("target", report.target), ("mesh", mesh or "none, one device")]
    for name, value in report.parameters.items():
        rows.append((f"parameters: {name.replace('_', ' ')}", f"{value:,}"))
    for name in ("training_flops_per_token", "tokens_per_step", "total_tokens"):
        rows.append((name.replace("_", " "), f"{getattr(report, name):,}"))
    if report.device_hours_at_peak:
        hours = (
            f"{report.device_hours_at_peak:,.3g}; a real run takes several times that"
        )
        rows.append(("device hours at peak", hours))
    rows.append(("tables", report.split))
    rows.append(("checkpoint", _bytes(report.checkpoint_bytes)))
    for name in (
        "params",
        "teacher",
        "optimizer",
        "gathered",
        "gradient",
        "activation",
    ):
        size = getattr(report, f"{name}_bytes")
        rows.append((f"{name} bytes of a device", _bytes(size)))
    rows.append(("compiled for", report.compiled or "nothing"))
    if report.memory:
        for name, value in dataclasses.asdict(report.memory).items():
            rows.append((f"compiler: {name}", _bytes(value)))
    seconds = ", ".join(f"{k} {v:.1f} s" for k, v in report.seconds.items())
    rows += [("verdict", str(report.verdict)), ("took", seconds)]
    lines += [""] + [f"{name:<34}{value}" for name, value in rows]
    lines += ["", "Collectives of one step, per device, as traced:"]
    lines.append(hlo_messages.table(report.messages))
    if report.collectives:
        lines += ["", f"as compiled for {report.compiled}:"]
        lines.append(hlo_messages.table(report.collectives))
    return "\n".join([*lines, "", *(f"warning: {w}" for w in report.warnings)])


def _bytes(count: float) -> str:
    return f"{count / GIB:,.3f} GiB" if count >= GIB / 100 else f"{count:,.0f} B"
