"""Everything a GPU is asked, a part at a time; `gpu_day.sh` runs the parts in order of worth.

    python -m benchmarks.gpu_day checks --output=DIR         # on a GPU
    python -m benchmarks.gpu_day checks --output=DIR --check # any machine, toy sizes

    checks       every GPU path against float64: lookups, attention, a model, decoding
    quickstart   300 steps of the quickstart on this device and on the CPU: the losses
    step         a training step of each model beside its dense twin: tokens/s, MFU, memory
    base         the same of MemoryFormer-base, with lean tables, beside Pythia-410M
    decode       tokens per second at 1, 8 and 64 streams

A part writes DIR/PART.json after each of its rows, so that a cut loses only what was not
done, and stops before a row that would start after --seconds.
"""

import gc
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

from benchmarks import arguments, timing

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("part", choices=("checks", "quickstart", "step", "base", "decode"))
FLAGS.add_argument("--check", action="store_true", help="toy sizes, any machine")
FLAGS.real("seconds", 120.0, help="after which no row starts")
FLAGS.add_argument("--rows", default="", help="only rows whose name has this in it")
FLAGS.add_argument("--output", type=pathlib.Path, default=pathlib.Path("gpu_day"))

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import optax

from benchmarks import gpu_checks, train_step
from memoryformer import accounting, config, model, sharding
from memoryformer.accounting import targets as targets_lib
from memoryformer.generation import sampler
from memoryformer.training import experiment
from memoryformer.training import programs as programs_lib
from memoryformer.training import step as step_lib

ROOT = pathlib.Path(__file__).parent.parent
PEAK_FLOPS = targets_lib.CHIPS["h100"].matrix_flops  # an H200's too
PEERS = {"tiny": "pythia_70m", "small": "pythia_160m"}
Row = dict[str, object]


def main(argv: list[str] | None = None) -> None:
    """Run one part; a row that fails is written with its error, and the exit code is 1."""
    flags = FLAGS.parse_args(argv)
    if jax.default_backend() != "gpu" and not flags.check:
        raise SystemExit(f"the platform is {jax.default_backend()}, not gpu: --check")
    flags.output.mkdir(parents=True, exist_ok=True)
    path = flags.output / f"{flags.part}.json"
    started = time.perf_counter()
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "rows": {},
        "skipped": [],
    }
    failed = False
    for name, run in PARTS[flags.part](flags.check):
        if flags.rows not in name:
            continue
        if time.perf_counter() - started > flags.seconds:
            report["skipped"].append(name)
            continue
        try:
            row = run()
        except Exception as error:
            row, failed = {"error": f"{type(error).__name__}: {error}"[:600]}, True
        report["rows"][name] = row
        path.write_text(json.dumps(report, indent=2) + "\n")  # a cut may come any time
        print(
            f"{time.perf_counter() - started:6.1f} s  {name}: {json.dumps(row)}",
            flush=True,
        )
        gc.collect()
    path.write_text(json.dumps(report, indent=2) + "\n")
    if failed:
        raise SystemExit(1)


# --- A training step. -------------------------------------------------------------------


def step(toy: bool) -> list[tuple[str, Callable[[], Row]]]:
    """Tokens per second of 16,384 tokens a step, in bfloat16, of each model and its twin."""
    return [
        (f"{preset} {name}", lambda p=preset, f=fields: time_step(p, f, toy))
        for (preset, name), fields in list(STEPS.items())[: 2 if toy else None]
    ]


CUDNN = {"model.mixer_options.attention": "cudnn"}
LEAN = {"optimizer.table_state": "lean"}
LEANEST = LEAN | {
    "optimizer.table_state_options.dtype": "bfloat16",
    "optimizer.table_state_options.rounding": "stochastic",
}
STEPS = {  # (preset, name) -> fields, in the order of worth
    ("memoryformer_tiny", "gpu"): CUDNN,
    ("pythia_70m", "cudnn"): CUDNN,
    ("memoryformer_small", "gpu"): CUDNN,
    ("pythia_160m", "cudnn"): CUDNN,
    ("memoryformer_tiny", "xla"): {"model.lookup": "xla"} | CUDNN,
    ("pythia_70m", "xla attention"): {},
}
BASE = {
    ("memoryformer_base", "6 bytes an entry"): {"model.remat": "codes"} | LEAN | CUDNN,
    ("memoryformer_base", "4 bytes an entry"): LEANEST | CUDNN,
    ("pythia_410m", "cudnn"): CUDNN,
}


def base(toy: bool) -> list[tuple[str, Callable[[], Row]]]:
    """The paper's largest model with lean tables, beside its twin."""
    return [
        (f"{preset} {name}", lambda p=preset, f=fields: time_step(p, f, toy))
        for (preset, name), fields in list(BASE.items())[
            1 if toy else 0 : 2 if toy else None
        ]
    ]


def time_step(preset: str, fields: Row, toy: bool, steps: int = 20) -> Row:
    """Quartiles of a step's milliseconds; memory is XLA's plan and the allocator's peak."""
    chosen = config.load(str(ROOT / "configs" / f"{preset}.py"))
    chosen.mesh = "single"
    chosen.train.batch_size = chosen.eval.batch_size = 8
    for field, value in fields.items():
        if jax.default_backend() == "gpu" or field.startswith("optimizer."):
            config.override(chosen, {field: value})
    if toy:
        chosen.model.update(TOY)
        chosen.train.batch_size, steps = 2, 2
    run = experiment.resolve(chosen)
    mesh = sharding.make(run.mesh)
    programs = programs_lib.make(run, mesh)
    hyper = step_lib.hyperparams(run)
    batches = [
        jax.device_put(train_step.make_batch(run.model, run.train.batch_size, i))
        for i in range(4)
    ]
    state = programs.draw(0)
    started = time.perf_counter()
    compiled = programs.train_step.lower(state, batches[0], hyper).compile()
    compile_seconds = time.perf_counter() - started
    losses, milliseconds = [], []
    for i in range(steps + 2):
        started = time.perf_counter()
        state, values = compiled(state, batches[i % 4], hyper)
        losses.append(float(values["nats"] / values["weight"]))  # waits for the step
        if i >= 2:
            milliseconds.append(1e3 * (time.perf_counter() - started))
    if not np.isfinite(losses).all():
        raise AssertionError(f"losses {losses}")
    plan = compiled.memory_analysis()
    tokens = run.train.batch_size * run.model.seq_len
    median = statistics.median(milliseconds)
    flops = accounting.count(run.model).training_flops_per_token * tokens
    row = {
        "ms": timing.quartiles(milliseconds),
        "tokens/s": tokens / median * 1e3,
        "model TFLOP a step": flops / 1e12,
        "MFU": flops / (median / 1e3) / PEAK_FLOPS,
        "plan GB": (plan.argument_size_in_bytes + plan.temp_size_in_bytes) / 1e9,
        "peak GB so far": peak_bytes() / 1e9,
        "compile s": compile_seconds,
        "parameters": sum(p.size for p in jax.tree.leaves(state.params)),
        "losses": [losses[0], losses[-1]],
    }
    print(f"{preset}, before its profile: {json.dumps(row)}", flush=True)
    return row | {
        "kernels, ms a step": kernels(lambda: compiled(state, batches[0], hyper))
    }


def kernels(step: Callable, most: int = 40) -> list[tuple[float, int, str]]:
    """What one call spends on the device: (milliseconds, launches, kernel and its source)."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(step())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    spent: dict[str, list[float]] = {}
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                source = stats.get("tf_op") or stats.get("name") or ""
                label = f"{event.name[:60]} | {str(source)[-90:]}"
                spent.setdefault(label, []).append(event.duration_ns / 1e6)
    rows = [(round(sum(t), 3), len(t), label) for label, t in spent.items()]
    return sorted(rows, reverse=True)[:most]


def peak_bytes() -> int:
    """The most that this process has held on the device; 0 where nobody counts."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


# --- Decoding. -------------------------------------------------------------------------


def decode(toy: bool) -> list[tuple[str, Callable[[], Row]]]:
    """Greedy tokens a second, memory layers and dense twin in turns."""
    return [
        (
            f"{size}, {streams} streams",
            lambda z=size, n=streams: time_decoding(z, n, toy),
        )
        for size in (("tiny",) if toy else ("small", "tiny"))
        for streams in ((2,) if toy else (1, 8, 64))
    ]


def time_decoding(size: str, streams: int, toy: bool, rounds: int = 5) -> Row:
    """Quartiles of tokens per second of 128 tokens after a prompt of 16, and the ratio."""
    tokens = 4 if toy else 128
    peers = {}
    for name, preset in (("memory", f"memoryformer_{size}"), ("dense", PEERS[size])):
        chosen = config.load(str(ROOT / "configs" / f"{preset}.py"))
        if toy:
            chosen.model.update(TOY)
        model_config = experiment.resolve(chosen).model
        params = model.init(model_config, 0)
        # Read-only weights in the type they are computed in, as a server would hold them.
        params = optax.tree.cast(params, model_config.dtype)
        peers[name] = sampler.Generator(model_config, params)
    sampling = sampler.SamplingConfig(max_tokens=tokens, temperature=0.0)
    prompts = [[1 + (i + j) % 99 for j in range(16)] for i in range(streams)]
    works = {
        name: lambda _, peer=peer: list(peer.stream_batch(prompts, sampling))
        for name, peer in peers.items()
    }
    seconds = timing.in_turns(works, rounds, time.perf_counter)
    return {
        name: timing.quartiles(streams * tokens / s for s in series)
        for name, series in seconds.items()
    } | {"memory over dense": timing.ratio(seconds["dense"], seconds["memory"])}


TOY = {
    "vocab_size": 264, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "seq_len": 32,
}  # fmt: skip
PARTS = {
    "checks": gpu_checks.checks,
    "quickstart": gpu_checks.quickstart,
    "step": step,
    "base": base,
    "decode": decode,
}

if __name__ == "__main__":
    arguments.run(main)
