"""What stands out in a dry run, and what to change about it. Start at `find`."""

from collections.abc import Iterator

from memoryformer import sharding as sharding_lib
from memoryformer.accounting.targets import GIB, Target
from memoryformer.dryrun import hlo_messages
from memoryformer.dryrun.report import Fit, Report
from memoryformer.model import implementations
from memoryformer.ops import collectives
from memoryformer.training import experiment

SLOW = 1.0  # messages take longer than this share of the products' time
LONG = 1024  # tokens; shorter sequences gain little from `sequence_chunk`


def find(
    report: Report,
    run: experiment.Experiment,
    target: Target,
    sharding: sharding_lib.Sharding,
) -> Iterator[str]:
    """Yield one line for each thing to change, what saves most first."""
    if report.verdict.fit is Fit.DOES_NOT_FIT:
        yield from _to_fit(report, run, sharding)
    attention = implementations.attention_of(run.model)
    on_accelerator = target.chip.platform != "cpu"
    compiled_fused = attention == "cudnn" and not target.missing()
    if attention != "xla" and on_accelerator and not compiled_fused:
        yield (
            f"model.mixer_options.attention={attention!r} is counted as 'xla', which takes "
            "more memory: the fused kernel is chosen on its own device only."
        )
    if run.model.dtype == "float32" and on_accelerator:
        yield (
            "model.dtype=float32: bfloat16 halves activations and messages on this target."
        )
    yield from _slow_messages(report, target)


def _slow_messages(report: Report, target: Target) -> Iterator[str]:
    chip = target.chip
    sent = hlo_messages.wire_bytes(report.messages, *collectives.ROW_AXES)
    if not sent or not chip.link_bandwidth:
        return
    one_domain = report.num_devices <= chip.domain
    rate = chip.link_bandwidth if one_domain else chip.network_bandwidth
    tokens = report.tokens_per_step / report.num_devices
    products = report.training_flops_per_token * tokens / chip.matrix_flops  # seconds
    if sent / rate > SLOW * products:
        yield (
            f"{sent / GIB:.1f} GiB over 'data' take at least {sent / rate:.2f} s a "
            f"step, the products {products:.2f} s at full speed: raise train.batch_size "
            "(with train.num_microbatches), or split tables over 'model'."
        )


def _to_fit(
    report: Report, run: experiment.Experiment, sharding: sharding_lib.Sharding
) -> Iterator[str]:
    """Yield what makes the step smaller, with the bytes that it is about."""
    model, train = run.model, run.train
    devices, split = report.num_devices, sharding.axis_size(collectives.MODEL_AXIS)
    rows_of_device = train.batch_size // sharding.row_parts
    rows = rows_of_device // train.num_microbatches
    state = report.params_bytes + report.optimizer_bytes
    copies = report.gathered_bytes + report.gradient_bytes
    activations = report.activation_bytes
    chunks_help = not model.sequence_chunk and model.seq_len >= LONG
    wider = 2 * split <= devices and model.num_heads % (2 * split) == 0
    table = (  # whether it applies, bytes that it is about, what to do
        (
            "fsdp" not in run.mesh and devices > split,
            state,
            "mesh=fsdp or fsdp_tensor splits the state over 'data'",
        ),
        (
            wider and copies > 0,
            copies,
            f"mesh=fsdp_tensor:model={2 * split} splits parameters and gradients further",
        ),
        (
            rows > 1,
            activations,
            f"train.num_microbatches={rows_of_device} (now {rows} rows at a time)",
        ),
        (
            chunks_help,
            activations,
            "model.sequence_chunk=256 recomputes attention and feed-forward layers",
        ),
        (
            model.remat == "none" and not chunks_help,
            activations,
            "model.remat=full recomputes every block",
        ),
        (
            state + copies > report.device_bytes,
            0,
            f"more devices: {devices} cannot hold the state",
        ),
    )
    applicable = [(size, text) for applies, size, text in table if applies]
    for size, text in sorted(applicable, key=lambda row: -row[0]):
        yield f"to fit: {text}" + (f": {size / GIB:.1f} GiB now." if size else ".")
