"""What stands out in a dry run, and what to change about it. Start at `find`."""

from collections.abc import Iterator
from typing import Any

from memoryformer import sharding as sharding_lib
from memoryformer.accounting.targets import GIB, Target
from memoryformer.dryrun import hlo_messages
from memoryformer.model import implementations
from memoryformer.training import experiment

SLOW = 1.0  # messages take longer than this share of the products' time


def find(
    report: Any,  # a `report.Report`
    run: experiment.Experiment,
    target: Target,
    sharding: sharding_lib.Sharding,
) -> Iterator[str]:
    """Yield one line for each thing to change, what saves most first."""
    if "does not fit" in report.verdict:
        yield from _to_fit(report, run, sharding)
    attention = implementations.attention_of(run.model)
    fused = attention == "cudnn" and not target.missing()  # compiled as it is
    elsewhere = target.chip.platform != "cpu"
    if attention != "xla" and elsewhere and not fused:
        yield (
            f"model.mixer_options.attention={attention!r} is counted as 'xla', which takes "
            "more memory: the fused kernel is chosen on its own device only."
        )
    if run.model.dtype == "float32" and target.chip.platform != "cpu":
        yield (
            "model.dtype=float32: bfloat16 halves activations and messages on this target."
        )
    yield from _slow_messages(report, target)


def _slow_messages(report, target):
    chip = target.chip
    across = hlo_messages.wire_bytes(report.messages, "data")
    if not across or not chip.link_bandwidth:
        return
    inside = report.num_devices <= chip.domain
    rate = chip.link_bandwidth if inside else chip.network_bandwidth
    tokens = report.tokens_per_step / report.num_devices
    products = report.training_flops_per_token * tokens / chip.matrix_flops
    if across / rate > SLOW * products:
        yield (
            f"{across / GIB:.1f} GiB over 'data' take at least {across / rate:.2f} s a "
            f"step, the products {products:.2f} s at full speed: raise train.batch_size "
            "(with train.num_microbatches), or split tables over 'model'."
        )


def _to_fit(report, run, sharding):
    model, train = run.model, run.train
    split = sharding.axis_size("model")
    rows = train.batch_size // sharding.axis_size("data") // train.num_microbatches
    advice = []
    state = report.params_bytes + report.optimizer_bytes
    if "fsdp" not in run.mesh and report.num_devices > split:
        advice.append((state, "mesh=fsdp or fsdp_tensor splits the state over 'data'"))
    held = report.gathered_bytes + report.gradient_bytes
    size = next(
        (n for n in (2 * split, 4 * split) if model.num_heads % n == 0 and held), 0
    )
    if size and size <= report.num_devices:
        text = f"mesh=fsdp_tensor:model={size} splits parameters and gradients further"
        advice.append((held, text))
    if rows > 1:
        text = (
            f"train.num_microbatches={train.batch_size // sharding.axis_size('data')}"
        )
        advice.append((report.activation_bytes, f"{text} (now {rows} rows at a time)"))
    if not model.sequence_chunk and model.seq_len >= 1024:
        text = "model.sequence_chunk=256 recomputes attention and feed-forward layers"
        advice.append((report.activation_bytes, text))
    elif model.remat == "none":
        advice.append(
            (report.activation_bytes, "model.remat=full recomputes every block")
        )
    more = state + held > report.device_bytes
    if more:
        advice.append(
            (0, f"more devices: the state is too much for {report.num_devices}")
        )
    for size, text in sorted(advice, key=lambda item: -item[0]):
        yield f"to fit: {text}" + (f": {size / GIB:.1f} GiB now." if size else ".")
