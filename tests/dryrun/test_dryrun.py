"""The dry run: the trainer's own step, its memory, its messages, and what to do about them."""

import dataclasses
import functools
import json
import re
import types

import jax
import numpy as np
import pytest
import toy

from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.accounting import targets as targets_lib
from memoryformer.accounting.targets import GIB
from memoryformer.dryrun import __main__ as command
from memoryformer.dryrun import advice as advice_lib
from memoryformer.dryrun import examine as dryrun
from memoryformer.dryrun import jaxpr_messages, lowering
from memoryformer.dryrun import report as report_lib
from memoryformer.errors import ConfigError
from memoryformer.training import experiment
from memoryformer.training import programs as programs_lib
from memoryformer.training import step as step_lib

B, L = 16, 64
MESHES = (
    "single",
    "fsdp_tensor:model=4",
    "sequence",
    *(
        pytest.param(mesh, marks=pytest.mark.slow)
        for mesh in ("data", "fsdp", "tensor:model=4")
    ),
)


@functools.cache
def run_of(mesh="single", projection="memory", **fields):
    config = experiment.default_config()
    sizes = {"vocab_size": 512, "embed_dim": 128, "num_layers": 1, "num_heads": 4}
    sizes |= {"seq_len": L, "code_bits": 8, "lookup": "xla"}
    if projection == "memory":
        sizes["projection_options"] = {"extra_bits": 2}
    config.model.update(dataclasses.asdict(toy.model_config(projection, **sizes)))
    config.train.update(num_steps=10, batch_size=B)
    config.eval.batch_size = B
    config.mesh = mesh
    config.update_from_flattened_dict(fields)
    return experiment.resolve(config)


@functools.cache
def report_of(mesh):
    return dryrun.examine(run_of(mesh), "cpu" if mesh == "single" else "cpu:8")


@pytest.mark.parametrize("mesh", MESHES)
def test_memory_of_a_step_is_bounded(mesh):
    """Temporary memory of a device's step, as compiled, for every preset of meshes: less than
    half of the rows that Q, K and V gather, [N, K, 3 D], and under FSDP the parameters joined,
    their gradients, and these once more as they are summed.

    Mutations: `implementation='reference'`, which builds [N, K, F]; parameters gathered
    over `model` too; gradients of all microbatches kept apart.
    """
    report, model = report_of(mesh), run_of(mesh).model
    assert not any("unknown message" in warning for warning in report.warnings)
    memory = report.memory
    rows = 4 * B * L * model.num_tables * 3 * model.embed_dim // report.num_devices
    assert 0 < memory.temporary <= rows / 2 + 3.5 * report.gathered_bytes
    assert memory.total >= memory.arguments >= abstract_state(mesh)


def readable(traced):
    """A jaxpr as text, without the addresses of functions."""
    return re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr))


def abstract_state(mesh):
    report = report_of(mesh)
    return report.params_bytes + report.optimizer_bytes


@pytest.mark.parametrize("mesh", ["single", "fsdp_tensor:model=4"])
def test_the_trainers_own_step_is_lowered(mesh):
    """The same program, text for text, that the loop's first call traces.

    Mutation: `batch` without weights' float32, or the step without `hyper`.
    """
    run = run_of(mesh)
    devices = jax.devices() if mesh != "single" else jax.devices()[:1]
    place = lowering.device_sharding(run, devices)
    _, step = lowering.trace(run, place)
    programs = programs_lib.make(run, place)
    with place.activate():
        state = jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
            programs.abstract,
        )
        batch = place.put_batch(toy.batch(run.model, 0, B, L))
        hyper = step_lib.hyperparams(run)
        theirs = programs.train_step.trace(state, batch, hyper)
        held = {s.device: 0 for s in jax.tree.leaves(state)[0].addressable_shards}
        for array in jax.tree.leaves(state):
            for shard in array.addressable_shards:
                held[shard.device] += shard.data.nbytes
    assert readable(step) == readable(theirs)
    # ... and the bytes are those that its devices hold.
    report = report_of(mesh)
    counted = report.params_bytes + report.optimizer_bytes + 4  # the step's number
    assert set(held.values()) == {counted}
    assert report.checkpoint_bytes == sharding_lib.num_bytes(state)


@pytest.mark.parametrize("how, name", [("none", "psum"), ("full", "all-mix")])
def test_an_unknown_message_is_a_warning(how, name, monkeypatch):
    """... of the report, not the end of a user's dry run. Mutation: `unknown` not handed on."""
    if how == "none":
        for psum in ("psum", "psum_invariant"):
            monkeypatch.delitem(jaxpr_messages.KINDS, psum, raising=False)
    else:
        line = f"%a = f32[16]{{0}} {name}(%p), replica_groups=[2,4]<=[8]"
        text = f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}\n"
        monkeypatch.setattr(jax.stages.Compiled, "as_text", lambda self: text)
    report = dryrun.examine(run_of("data"), "cpu:8", how)
    unknown = [w for w in report.warnings if "unknown message" in w]
    assert unknown and all(name in w and "\n" not in w for w in unknown)


def test_without_the_targets_compiler(monkeypatch):
    """One line on what to install; messages are compiled for this CPU all the same.

    Mutation: `missing` not asked.
    """
    monkeypatch.setattr(targets_lib.importlib.util, "find_spec", lambda name: None)
    report = dryrun.examine(run_of("fsdp_tensor:model=4"), "v5e:2x4")
    assert "pip install 'jax[tpu]==" in report.warnings[0]
    assert report.compiled.startswith("cpu:8") and report.num_devices == 8
    assert {c.axes for c in report.collectives} >= {("data",), ("model",)}
    with pytest.raises(ConfigError, match="pip install"):
        targets_lib.parse("h200:8").devices()


@pytest.mark.slow
def test_few_blocks_tell_of_many():
    """Five blocks extrapolated from one and two, beside five compiled.

    Mutation: `num_layers` blocks added to those of two.
    """
    run = run_of("fsdp_tensor:model=4", **{"model.num_layers": 5})
    whole, few = (dryrun.examine(run, "cpu:8", how) for how in ("full", "blocks"))
    assert few.memory.arguments == whole.memory.arguments
    assert few.memory.temporary == pytest.approx(whole.memory.temporary, rel=0.1)
    for axis in ("data", "model"):
        ours, theirs = (
            dryrun.hlo_messages.wire_bytes(r.collectives, axis) for r in (few, whole)
        )
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_abstract_meshes_of_any_number():
    """512 devices: a device's share of the state, and what it sends, from a trace alone.

    Mutation: `range` taken for devices.
    """
    run = run_of(
        "fsdp_tensor:model=4", **{"train.batch_size": 256, "eval.batch_size": 256}
    )
    place = lowering.device_sharding(run, range(512))
    assert place.num_devices == 512 and place.platform == "abstract"
    state, step = lowering.trace(run, place)
    whole = sharding_lib.num_bytes(state.params)
    assert whole / 512 <= lowering.device_bytes(state.params) < 1.2 * whole / 512
    found = dryrun.jaxpr_messages.collectives(step.jaxpr, lowering.mesh_shape(place))
    tables = [c for c in found if c.kind == "reduce-scatter" and c.axes == ("data",)]
    assert sum(c.payload_bytes * c.count for c in tables) >= 0.9 * whole / 4


def test_what_does_not_fit_has_remedies(monkeypatch):
    """Concrete fields, what saves most first; the compiler's own refusal is a verdict.

    Mutation: a refusal raised again.
    """
    tiny = dataclasses.replace(targets_lib.CHIPS["cpu"], memory_bytes=2**20)
    monkeypatch.setitem(targets_lib.CHIPS, "cpu", tiny)
    report = dryrun.examine(run_of("data"), "cpu:8")
    assert str(report.verdict).startswith("does not fit: ")
    advice = "\n".join(report.warnings)
    assert "mesh=fsdp or fsdp_tensor" in advice and "model=2" in advice

    def refuses(compiler_options):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\n"
            "Used 30.1G of 15.75G hbm."
        )

    lowered = types.SimpleNamespace(compile=refuses)
    place = lowering.device_sharding(run_of(), jax.devices()[:1])
    compiled = dryrun._compile(lowered, place)
    assert str(compiled.verdict) == "does not fit: Used 30.1G of 15.75G hbm"
    assert compiled.memory is None and compiled.against(2**40) == compiled


@pytest.mark.parametrize(
    "used, capacity, verdict",
    [
        (95, 100, "fits: 95.00 of 100 GiB"),
        (96, 100, "does not fit: 96.00 of 100 GiB"),
        (96, 0, "compiles"),
    ],
)
def test_a_twentieth_of_the_memory_is_the_runtimes(used, capacity, verdict):
    """Mutation: `HEADROOM` 1, or `<` for `<=`."""
    memory = report_lib.Memory(0, 0, used * GIB, used * GIB)
    compiled = dryrun.Compiled(report_lib.Verdict(report_lib.Fit.COMPILES), memory)
    assert str(compiled.against(capacity * GIB).verdict) == verdict


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, ["fsdp", "model=2", "num_microbatches=2", "remat=full", "more devices"]),
        ({"mesh": "fsdp"}, ["model=2", "num_microbatches=2", "remat=full", "more devices"]),
        ({"mesh": "data", "model.num_heads": 1},
         ["fsdp", "num_microbatches=2", "remat=full", "more devices"]),
        ({"train.num_microbatches": 2, "model.remat": "full"},
         ["fsdp", "model=2", "more devices"]),
        ({"train.num_microbatches": 2, "model.seq_len": 1024},
         ["fsdp", "model=2", "sequence_chunk", "more devices"]),
    ],
)  # fmt: skip
def test_advice_to_fit_is_what_applies(fields, expected):
    """In the order of the bytes. Mutations: a condition of the table turned round; unsorted."""
    fields = {"mesh": "data"} | fields
    run = run_of(fields.pop("mesh"), **fields)
    report = types.SimpleNamespace(
        verdict=report_lib.Verdict(report_lib.Fit.DOES_NOT_FIT), num_devices=8,
        params_bytes=40 * GIB, optimizer_bytes=80 * GIB, gathered_bytes=10 * GIB,
        gradient_bytes=20 * GIB, activation_bytes=5 * GIB, device_bytes=100 * GIB,
        messages=[],
    )  # fmt: skip
    place = lowering.device_sharding(run, range(8))
    lines = list(advice_lib.find(report, run, targets_lib.parse("cpu:8"), place))
    assert len(lines) == len(expected)
    for line, word in zip(lines, expected, strict=True):
        assert line.startswith("to fit: ") and word in line
    assert "120.0 GiB now" in "".join(lines) or "fsdp" not in expected
    assert "30.0 GiB now" in "".join(lines) or "model=2" not in expected


def test_slow_messages_are_told():
    """Mutation: `SLOW` infinite."""
    report = types.SimpleNamespace(
        verdict=report_lib.Verdict(report_lib.Fit.FITS), num_devices=16, tokens_per_step=16, training_flops_per_token=1,
        messages=report_of("fsdp").messages,
    )  # fmt: skip
    target = targets_lib.parse("h200:16")
    (line,) = advice_lib.find(report, run_of("fsdp", **{"model.dtype": "bfloat16"}),
                            target, None)  # fmt: skip
    assert "over 'data' take" in line and "train.batch_size" in line


@pytest.mark.parametrize(
    "target, message",
    [
        ("v7x", "unknown choice"),
        ("v5e", "write a chip and its slice"),
        ("v5e:2y4", "write a chip and its slice"),
        ("h200:12", "whole hosts of 8 GPUs"),
        ("cpu:0", "0 devices"),
        ("v6e:0x4", "0 devices; must be from 1 to 65536"),
        ("cpu:4096", "xla_force_host_platform_device_count=4096"),
    ],
)
def test_bad_targets_are_one_line(target, message):
    """Mutation: a topology not matched whole."""
    with pytest.raises(ConfigError) as caught:
        dryrun.examine(run_of(), target)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_report_reads_and_stores():
    """Every figure in text and in JSON. Mutation: `describe` without the memory."""
    report = report_of("fsdp_tensor:model=4")
    text = report_lib.describe(report)
    for wanted in (
        "model.embed_dim = 128",
        "data=2 x model=4",
        "checkpoint",
        "reduce-scatter",
        "compiler: temporary",
    ):
        assert wanted in text
    assert "warning: " not in text and not report.warnings  # all is well with it
    worrying = dataclasses.replace(report, warnings=["one thing", "another"])
    told = report_lib.describe(worrying).splitlines()[-2:]
    assert told == ["warning: one thing", "warning: another"]
    stored = json.loads(report.as_json())
    assert stored["memory"]["total"] == stored["plan_bytes"] == report.memory.total
    counted = stored["parameters"]
    params = jax.eval_shape(lambda: model_lib.init(run_of().model))
    assert counted["total"] == sum(x.size for x in jax.tree.leaves(params))


def test_tables_are_joined_in_the_type_they_are_read_in():
    """bfloat16 models join and differentiate tables at 2 bytes; microbatches add up at 4.

    Mutation: `whole` of the stored parameters.
    """
    small = {"model.dtype": "bfloat16"}
    reports = [
        dryrun.examine(run_of("fsdp", **fields), "cpu:8", "none")
        for fields in (small, small | {"train.num_microbatches": 2}, {})
    ]
    counted = reports[0].parameters
    values, tables = counted["total"], counted["tables"]
    narrow, whole = 4 * values - 2 * tables, 4 * values
    assert [r.gathered_bytes for r in reports] == [narrow, narrow, whole]
    assert [r.gradient_bytes for r in reports] == [narrow, whole, whole]


def test_hours_at_the_chips_peak():
    """Products of the whole run over bf16 FLOPs; a CPU's peak is not known.

    Mutation: seconds, or the hours of one step.
    """
    fields = {"train.num_steps": 10**6}
    report = dryrun.examine(run_of(**fields), "h100", "none")
    tokens = 10**6 * B * L
    expected = tokens * report.training_flops_per_token / 989e12 / 3600
    assert report.device_hours_at_peak == pytest.approx(expected, rel=1e-12)
    assert "device hours at peak" in report_lib.describe(report)
    on_cpu = dryrun.examine(run_of(**fields), "cpu", "none")
    assert on_cpu.device_hours_at_peak == 0
    assert "device hours" not in report_lib.describe(on_cpu)


def test_the_command_prints_json(tmp_path, capsys):
    """`--json` alone on standard output; `--output` holds the same.

    Mutation: `describe` printed as well.
    """
    config = str(toy.config_file(tmp_path))
    path = tmp_path / "report.json"
    words = ["dryrun", f"--config={config}", "--compile=none", "--json"]
    with pytest.raises(SystemExit) as ended:
        command.main([*words, f"--output={path}"])
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text())
    assert printed["plan_bytes"] == 0 and printed["verdict"] == "not compiled"
