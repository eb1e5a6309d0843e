"""What a run would need, without running it: state, memory, messages, before any device.

    python -m memoryformer.dryrun --config=configs/memoryformer_base.py \\
        --target=v6e:8x8 --config.mesh=fsdp_tensor:model=4 [--json] [--output=FILE] [--compile=full]

It traces and lowers the very train step that `training.loop` runs, from abstract arrays, and
compiles it for the target (`accounting.targets`): all of it, or by default, where there are many
blocks, the same step with one block and with two, of which the rest follows. Where the target's
compiler is not installed it compiles for as many devices of this CPU, which tells the messages
but not the target's memory. Start at `examine`.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Collection, Iterator
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
from memoryformer.dryrun.report import Fit, Memory, Report, Verdict
from memoryformer.errors import ConfigError
from memoryformer.model import implementations
from memoryformer.model import parts as parts_lib
from memoryformer.ops import collectives, lookup
from memoryformer.training import experiment, trainable
from memoryformer.training import teacher as teacher_lib

HEADROOM = 0.95  # of a device's memory; the rest is the runtime's
COMPILE = ("auto", "full", "blocks", "none")
FEW_BLOCKS = 2  # `auto` compiles up to so many in full


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says of a step."""

    verdict: Verdict
    memory: Memory | None = None  # None where it refused, or was not asked
    collectives: list[hlo_messages.Collective] = dataclasses.field(default_factory=list)
    unknown: frozenset[str] = frozenset()  # kinds of messages that are not counted

    def against(self, capacity: int) -> "Compiled":
        """The same, judged by the bytes of a device's memory; 0: they are not known."""
        if self.memory is None or not capacity:
            return self
        total = self.memory.total
        fit = Fit.FITS if total <= HEADROOM * capacity else Fit.DOES_NOT_FIT
        detail = f"{total / GIB:.2f} of {capacity / GIB:.0f} GiB"
        return dataclasses.replace(self, verdict=Verdict(fit, detail))


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
        alike = run.model.projection != "mixed"
        how = "blocks" if alike and run.model.num_layers > FEW_BLOCKS else "full"
    elif how == "blocks" and run.model.projection == "mixed":
        raise ConfigError(
            "--compile=blocks: the blocks of model.projection='mixed' differ; use full."
        )
    compiled = Compiled(Verdict(Fit.NOT_COMPILED))
    with _timed(seconds, "compiling"):
        if how == "full":
            compiled = _compile(lowered, sharding)
        elif how == "blocks":
            compiled = _compile_blocks(compiled_run, sharding)
    capacity = wanted.chip.memory_bytes
    if not missing:
        compiled = compiled.against(capacity)
    report = dataclasses.replace(
        report,
        memory=compiled.memory,
        plan_bytes=compiled.memory.total if compiled.memory else 0,
        collectives=compiled.collectives,
        verdict=compiled.verdict,
        compiled={
            "none": "",
            "full": f"{chosen.name}, all of it",
            "blocks": f"{chosen.name}, one block and two, the rest in proportion",
        }[how],
        seconds=seconds,
        device_bytes=capacity,
    )
    warnings = [missing] if missing else []
    warnings += report.warnings + _not_counted(compiled.unknown)
    warnings += advice.find(report, run, wanted, sharding)
    return dataclasses.replace(report, warnings=warnings)


def _not_counted(unknown: Collection[str]) -> list[str]:
    return [f"an unknown message kind {k!r} is not counted." for k in sorted(unknown)]


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
    each = teacher_lib.training_flops_per_token(run)
    taught = teacher_lib.abstract(teacher_lib.config_of(compiled_run), sharding)
    tokens = train.batch_size * model.seq_len
    flops = each * tokens * train.num_steps
    peak = target.chip.matrix_flops
    params = lowering.device_bytes(state.params)
    # Tables are joined, and their gradients kept, in the type that layers read.
    read = jax.eval_shape(
        lambda p: model_lib.with_tables_as_read(model, p), state.params
    )
    parts = sharding.axis_size(collectives.MODEL_AXIS)
    joined = sharding_lib.num_bytes(read) // parts
    trained, _ = trainable.split(run, read)
    values = sum(math.prod(x.shape) for x in jax.tree.leaves(trained))
    gradients = 4 * values  # summed over microbatches in float32
    if train.num_microbatches == 1:
        gradients = sharding_lib.num_bytes(trained)
    fsdp = "fsdp" in run.mesh and sharding.row_parts > 1
    mesh = lowering.mesh_shape(sharding)
    unknown: set[str] = set()
    messages = jaxpr_messages.collectives(step.jaxpr, mesh, unknown)
    return Report(
        config=experiment.as_dict(run),
        target=target.name,
        mesh=mesh,
        num_devices=target.num_devices,
        parameters=dataclasses.asdict(counted.parameters),
        training_flops_per_token=each,
        tokens_per_step=tokens,
        total_tokens=tokens * train.num_steps,
        device_hours_at_peak=flops / peak / 3600 if peak else 0.0,
        split=_split(sharding),
        checkpoint_bytes=sharding_lib.num_bytes(state),
        params_bytes=params,
        teacher_bytes=lowering.device_bytes(taught),
        optimizer_bytes=lowering.device_bytes((state.opt_state, state.spikes)),
        gathered_bytes=joined if fsdp else 0,
        gradient_bytes=gradients // parts,
        activation_bytes=lowering.activation_bytes(compiled_run, sharding),
        messages=messages,
        warnings=_not_counted(unknown),
    )


def _split(sharding: sharding_lib.Sharding) -> str:
    """Say over which axes tables are split: 'K / 16 (shard), C / 128 (data); nothing padded'."""
    parts = []
    for letter, entry in zip("KCF", sharding.specs.tables, strict=True):
        axes = sharding_lib.axes_of(entry)
        count = math.prod(map(sharding.axis_size, axes))
        parts += [f"{letter} / {count} ({', '.join(axes)})"] * (count > 1)
    # What does not divide is refused before (`sharding.validate`).
    return f"{', '.join(parts) or 'whole'}; nothing padded"


def _compile(lowered: jax.stages.Lowered, sharding: sharding_lib.Sharding) -> Compiled:
    """Compile, quickly for a CPU: there only the plan is wanted, not the code."""
    options: dict[str, Any] | None = None
    if sharding.platform == "cpu":
        options = {
            "xla_llvm_disable_expensive_passes": True,
            "xla_backend_optimization_level": 0,
        }
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        used = re.search(r"Used [\d.]+\w? of [\d.]+\w? \w+", message)
        detail = used[0] if used else message[:200]
        return Compiled(Verdict(Fit.DOES_NOT_FIT, detail))
    mesh = lowering.mesh_shape(sharding)
    text = compiled.as_text()
    assert text is not None  # XLA's own backends have one
    unknown: set[str] = set()
    messages = hlo_messages.collectives(text, mesh, unknown)
    memory = Memory.of(compiled)
    return Compiled(Verdict(Fit.COMPILES), memory, messages, frozenset(unknown))


def _compile_blocks(
    run: experiment.Experiment, sharding: sharding_lib.Sharding
) -> Compiled:
    """Compile the step with one block and with two; extrapolate to all of them."""
    parts, unknown = [], set[str]()
    for layers in (1, 2):
        model = parts_lib.first_layers(run.model, layers)
        small = dataclasses.replace(run, model=model)
        _, step = lowering.trace(small, sharding)
        part = _compile(lowering.lower(step, sharding), sharding)
        if part.memory is None:
            detail = f"{part.verdict.detail}, with {layers} block(s) alone"
            return Compiled(Verdict(part.verdict.fit, detail))
        parts.append((part.memory, part.collectives))
        unknown |= part.unknown
    (one, one_messages), (two, two_messages) = parts
    layers = run.model.num_layers
    return Compiled(
        Verdict(Fit.COMPILES),
        two.plus(one, layers - 2),
        hlo_messages.extrapolated(one_messages, two_messages, layers),
        frozenset(unknown),
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 3)
