"""The training step beside its dense twin's and plain PyTorch's, in turns.

    python -m benchmarks.train_step --steps=60
    python -m benchmarks.train_step --size=wide --arms=native,dense,torch
    python -m benchmarks.train_step --cores=1 --clock=cpu     # on a busy machine

    arm      what is trained, on the same random batches, from random weights
    native   MemoryFormer by the trainer's own step, with what is written in C++
    xla      the same without it (model.lookup='xla')
    none     the same with a lookup that reads nothing and has gradients of the same shapes
    dense    the dense twin by the trainer's own step
    torch    GPT-NeoX of the dense twin's shape (`torch_twin`); needs torch and transformers

The losses of `native` and `xla`, which begin with the same weights, are held against each other
after every step. The share of the lookups is what `xla` and `native` take beyond `none`: an upper
bound, for XLA then drops other work too.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
from collections.abc import Callable

from benchmarks import arguments, timing

ARMS = ("native", "xla", "none", "dense", "torch")
# D, layers, heads; the vocabulary, the lengths and the rest are the quickstart's.
SIZES = {"quickstart": (128, 3, 2), "wide": (512, 8, 8)}

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("--size", choices=SIZES, default="quickstart")
FLAGS.names("arms", ARMS)
FLAGS.number("steps", 30, low=2)
FLAGS.cores()
FLAGS.clock()
FLAGS.output("output", "train_step.json")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from memoryformer import model, sharding
from memoryformer.ops import lookup
from memoryformer.ops.lookup import native as lookup_native
from memoryformer.training import experiment, host_memory, programs
from memoryformer.training import step as step_lib

WARM_UP = 2  # steps: the first compiles, the second finds its memory
# Nats. The first step differs by rounding; later a sign that rounding flips reads another
# row, and the curves drift apart as they do between two orders of summation.
FIRST_TOLERANCE, TOLERANCE = 1e-5, 2e-2

Batch = dict[str, np.ndarray]


@jax.custom_vjp
def no_lookup(tables, codes, scores):
    """Zeros [N, F], of which nothing is a function."""
    return jnp.zeros((codes.shape[0], tables.shape[2]), scores.dtype)


no_lookup.defvjp(
    lambda *operands: (no_lookup(*operands), operands),
    lambda operands, dy: (jnp.zeros_like(operands[0]), None, operands[2] * dy[:, :1]),
)


def main(argv: list[str] | None = None) -> dict:
    """Time the steps in turns; print and write quartiles."""
    args = FLAGS.parse_args(argv)
    names = FLAGS.chosen("arms", args.arms, ARMS)
    cores = timing.use_cores(args.cores)
    if not lookup_native.available():
        raise SystemExit("no C++ compiler: nothing to compare")
    host_memory.keep()
    arms = {name: make_arm(name, args.size) for name in names}
    seconds, losses = timed(arms, args.steps, timing.CLOCKS[args.clock])
    medians = {name: statistics.median(series) for name, series in seconds.items()}
    result = {
        "milliseconds": {
            name: [round(1e3 * q, 2) for q in timing.quartiles(series)]
            for name, series in seconds.items()
        },
        "native_is_faster_by": {
            name: medians[name] / medians["native"]
            for name in names
            if "native" in names and name != "native"
        },
        "losses": {name: [series[0], series[-1]] for name, series in losses.items()},
        "size": args.size,
        "cores": cores,
        "processor": timing.processor(),
        "clock": args.clock,
        "load": os.getloadavg()[0],
    }
    if {"native", "xla"} <= losses.keys():
        result["loss_differences"] = _agreeing(losses["native"], losses["xla"])
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def timed(
    arms: dict[str, Callable[[Batch], float]], steps: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return seconds and losses of every arm's steps, each round in another order."""
    config = experiment.resolve(quickstart())
    losses: dict[str, list[float]] = {name: [] for name in arms}

    def batch(index):
        return make_batch(config.model, config.train.batch_size, index)

    def step(name):
        return lambda batch: losses[name].append(arms[name](batch))

    works = {name: step(name) for name in arms}
    return timing.in_turns(works, steps, clock, batch, WARM_UP), losses


def _agreeing(ours, theirs) -> dict[str, float]:
    differences = np.abs(np.subtract(ours, theirs))
    if not (differences[0] < FIRST_TOLERANCE and differences.max() < TOLERANCE):
        raise AssertionError(f"the losses part by {differences}")
    return {"first": float(differences[0]), "largest": float(differences.max())}


def quickstart(projection: str = "memory") -> ml_collections.ConfigDict:
    """The quickstart's config."""
    path = pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(projection)


def make_batch(model_config: model.ModelConfig, rows: int, seed: int) -> Batch:
    """Draw tokens with a skewed distribution, so that there is something to learn."""
    random = np.random.default_rng(seed)
    shape = (rows, model_config.seq_len)
    tokens = random.integers(0, model_config.vocab_size, (rows, shape[1] + 1)) ** 2
    tokens = (tokens // model_config.vocab_size).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }


def make_run(name: str, size: str) -> experiment.Experiment:
    """The experiment of an arm."""
    config = quickstart("dense" if name in ("dense", "torch") else "memory")
    width, layers, heads = SIZES[size]
    config.model.update(embed_dim=width, num_layers=layers, num_heads=heads)
    run = experiment.resolve(config)
    implementation = {"native": "native", "xla": "xla", "none": "xla"}.get(name, "auto")
    chosen = dataclasses.replace(run.model, lookup=implementation)
    return dataclasses.replace(run, model=chosen)


def make_arm(name: str, size: str) -> Callable[[Batch], float]:
    """Return a function of a batch: one update of this arm's own state, its loss."""
    run = make_run(name, size)
    if name == "torch":
        from benchmarks import torch_twin

        return torch_twin.make_step(run)
    return make_step(run, reads=name != "none")


def make_step(
    run: experiment.Experiment, reads: bool = True
) -> Callable[[Batch], float]:
    """Return the trainer's own step of a run; without `reads`, with `no_lookup`."""
    made = programs.make(run, sharding.make("single"))
    state = [made.draw(run.train.seed)]
    hyper = step_lib.hyperparams(run)

    def step(batch):
        replaced = lookup.lookup_xla.scan_tables
        if not reads:  # only while its step is traced
            lookup.lookup_xla.scan_tables = no_lookup
        try:
            state[0], values = made.train_step(state[0], jax.device_put(batch), hyper)
        finally:
            lookup.lookup_xla.scan_tables = replaced
        jax.block_until_ready(state)
        return float(values["nats"] / values["weight"])

    return step


if __name__ == "__main__":
    arguments.run(main)
