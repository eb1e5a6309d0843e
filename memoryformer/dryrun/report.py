"""What a run would need, without running it: state, memory, messages, before any device.

    python -m memoryformer.dryrun --config=configs/memoryformer_base.py \\
        --target=v6e:8x8 --config.mesh=fsdp_tensor:model=4 [--json] [--output=FILE] [--compile=full]

It traces and lowers the very train step that `training.loop` runs, from abstract arrays, and
compiles it for the target (`targets`): all of it, or by default, where there are many blocks,
the same step with one block and with two, of which the rest follows. Where the target's
compiler is not installed it compiles for as many devices of this CPU, which tells the messages
but not the target's memory. Start at `examine`.
"""

import contextlib
import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from memoryformer import accounting
from memoryformer import config as config_lib
from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.accounting import targets as targets_lib
from memoryformer.accounting.targets import GIB
from memoryformer.dryrun import advice, hlo_messages, jaxpr_messages, lowering
from memoryformer.model import implementations
from memoryformer.ops import lookup
from memoryformer.training import experiment

HEADROOM = 0.95  # of a device's memory; the rest is the runtime's
COMPILE = ("auto", "full", "blocks", "none")
FEW_BLOCKS = 2  # `auto` compiles up to so many in full


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
        outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
        parts = (stats.argument_size_in_bytes, outputs, stats.temp_size_in_bytes)
        return cls(*parts, sum(parts))

    def plus(self, other: "Memory", times: int) -> "Memory":
        """Each field, and `times` what it is beyond `other`'s."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Memory(*(a + times * (a - b) for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything `examine` finds out; bytes are those of one device unless said."""

    config: dict[str, Any]
    target: str
    mesh: dict[str, int]
    num_devices: int
    parameters: dict[str, int]
    training_flops_per_token: int
    tokens_per_step: int
    total_tokens: int
    checkpoint_bytes: int  # the whole state
    params_bytes: int
    optimizer_bytes: int
    gathered_bytes: (
        int  # parameters joined from `data` (FSDP), for the length of a step
    )
    gradient_bytes: int  # before they are summed over `data`
    activation_bytes: int  # an estimate: what the forward pass of a microbatch keeps
    messages: list[hlo_messages.Collective]  # of the traced step
    compiled: str = ""  # for what, and how much of the step
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: Memory | None = None
    plan_bytes: int = 0  # `memory.total`: all of one device, by its compiler
    device_bytes: int = 0  # 0: not known
    verdict: str = "not compiled"  # the compiler's, one line
    collectives: list[hlo_messages.Collective] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def as_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def examine(
    run: experiment.Experiment, target: str = "cpu", how: str = "auto"
) -> Report:
    """Lower and compile a run's train step for a target, and say what it needs.

    `how` is one of `COMPILE`. Raises `ConfigError` where config and target do not fit.
    """
    config_lib.choose(how, COMPILE, "--compile")
    wanted = targets_lib.parse(target)
    missing = wanted.missing()
    chosen = targets_lib.parse(f"cpu:{wanted.num_devices}") if missing else wanted
    implementations.check(run.model, wanted.chip.platform, wanted.chip.capability)
    compiled_run = _without_device_kernels(run, chosen)
    sharding = lowering.device_sharding(run, chosen.devices())
    seconds: dict[str, float] = {}
    with _timed(seconds, "tracing"):
        state, step = lowering.trace(compiled_run, sharding)
        report = _count(run, compiled_run, wanted, sharding, state, step)
    with _timed(seconds, "lowering"):
        lowered = lowering.lower(step, sharding)
    if how == "auto":
        how = "blocks" if run.model.num_layers > FEW_BLOCKS else "full"
    found: dict[str, Any] = {}
    with _timed(seconds, "compiling"):
        if how == "full":
            found = _compile(lowered, sharding)
        elif how == "blocks":
            found = _compile_blocks(compiled_run, sharding)
    memory, capacity = found.get("memory"), wanted.chip.memory_bytes
    if memory:
        found["plan_bytes"] = memory.total
    if memory and capacity and not missing:
        found["verdict"] = _verdict(memory, capacity)
    report = dataclasses.replace(
        report,
        **found,
        compiled={
            "none": "",
            "full": f"{chosen.name}, all of it",
            "blocks": f"{chosen.name}, one block and two, the rest in proportion",
        }[how],
        seconds=seconds,
        device_bytes=capacity,
    )
    warnings = [missing] if missing else []
    warnings += advice.find(report, run, wanted, sharding)
    return dataclasses.replace(report, warnings=warnings)


def _without_device_kernels(run, chosen):
    """The run with what is only chosen, or only built, on its own device left out."""
    model, chip = run.model, chosen.chip
    # cuDNN's attention is compiled without a GPU, other fused kernels are not (`advice`).
    fused = implementations.attention_of(model) == "cudnn" and chip.platform == "gpu"
    attention = "cudnn" if fused else "xla"
    model = implementations.readable(model, chip.platform)
    model = implementations.with_attention(model, attention)
    unable = lookup.why_not(
        "gpu", jnp.dtype(model.dtype), chip.platform, chip.capability
    )
    if model.lookup == "auto" and chip.platform == "gpu" and unable:
        model = dataclasses.replace(model, lookup="xla")
    return dataclasses.replace(run, model=model)


def _count(run, compiled_run, target, sharding, state, step) -> Report:
    """What is known before anything is compiled."""
    model, train = run.model, run.train
    counted = accounting.count(model)
    tokens = train.batch_size * model.seq_len
    params = lowering.device_bytes(state.params)
    # Tables are joined, and their gradients kept, in the type that layers read.
    read = jax.eval_shape(
        lambda p: model_lib.with_tables_as_read(model, p), state.params
    )
    joined = sharding_lib.num_bytes(read) // sharding.axis_size("model")
    values = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    summed = 4 * values // sharding.axis_size("model")  # over microbatches, in float32
    fsdp = "fsdp" in run.mesh and sharding.axis_size("data") > 1
    mesh = lowering.mesh_shape(sharding)
    return Report(
        config=experiment.as_dict(run),
        target=target.name,
        mesh=mesh,
        num_devices=target.num_devices,
        parameters=dataclasses.asdict(counted.parameters),
        training_flops_per_token=counted.training_flops_per_token,
        tokens_per_step=tokens,
        total_tokens=tokens * train.num_steps,
        checkpoint_bytes=sharding_lib.num_bytes(state),
        params_bytes=params,
        optimizer_bytes=lowering.device_bytes((state.opt_state, state.spikes)),
        gathered_bytes=joined if fsdp else 0,
        gradient_bytes=joined if train.num_microbatches == 1 else summed,
        activation_bytes=lowering.activation_bytes(compiled_run, sharding),
        messages=jaxpr_messages.collectives(step.jaxpr, mesh),
    )


def _compile(lowered, sharding) -> dict[str, Any]:
    """Compile, quickly for a CPU: there only the plan is wanted, not the code."""
    options = None
    if sharding.platform == "cpu":
        options = {"xla_llvm_disable_expensive_passes": True}
        options["xla_backend_optimization_level"] = 0
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        used = re.search(r"Used [\d.]+\w? of [\d.]+\w? \w+", message)
        return {"verdict": f"does not fit: {used[0] if used else message[:200]}"}
    return {
        "memory": Memory.of(compiled),
        "collectives": hlo_messages.collectives(
            compiled.as_text(), lowering.mesh_shape(sharding)
        ),
        "verdict": "compiles",
    }


def _compile_blocks(run, sharding) -> dict[str, Any]:
    found = []
    for layers in (1, 2):
        model = dataclasses.replace(run.model, num_layers=layers)
        small = dataclasses.replace(run, model=model)
        step = lowering.trace(small, sharding)[1]
        found.append(_compile(lowering.lower(step, sharding), sharding))
        if "memory" not in found[-1]:
            return {"verdict": f"{found[-1]['verdict']}, with {layers} block(s) alone"}
    one, two = found
    layers = run.model.num_layers
    return {
        "memory": two["memory"].plus(one["memory"], layers - 2),
        "collectives": hlo_messages.extrapolated(
            one["collectives"], two["collectives"], layers
        ),
        "verdict": "compiles",
    }


def _verdict(memory: Memory, capacity: int) -> str:
    fits = memory.total <= HEADROOM * capacity
    size = f"{memory.total / GIB:.2f} of {capacity / GIB:.0f} GiB"
    return f"{'fits' if fits else 'does not fit'}: {size}"


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
    rows.append(("checkpoint", _bytes(report.checkpoint_bytes)))
    for name in ("params", "optimizer", "gathered", "gradient", "activation"):
        size = getattr(report, f"{name}_bytes")
        rows.append((f"{name} bytes of a device", _bytes(size)))
    rows.append(("compiled for", report.compiled or "nothing"))
    if report.memory:
        for name, value in dataclasses.asdict(report.memory).items():
            rows.append((f"compiler: {name}", _bytes(value)))
    seconds = ", ".join(f"{k} {v:.1f} s" for k, v in report.seconds.items())
    rows += [("verdict", report.verdict), ("took", seconds)]
    lines += [""] + [f"{name:<34}{value}" for name, value in rows]
    lines += ["", "Collectives of one step, per device, as traced:"]
    lines.append(hlo_messages.table(report.messages))
    if report.collectives:
        lines += ["", f"as compiled for {report.compiled}:"]
        lines.append(hlo_messages.table(report.collectives))
    return "\n".join([*lines, "", *(f"warning: {w}" for w in report.warnings)])


def _bytes(count: float) -> str:
    return f"{count / GIB:,.3f} GiB" if count >= GIB / 100 else f"{count:,.0f} B"


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 3)
