"""The quickstart training step with the native and with the XLA lookup, in turns.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --cores=1 --clock=cpu     # on a busy machine

Both arms start from the same parameters and read the same random batches; their losses are
held against each other after every step. The share of the lookups is what a step loses when
they are replaced by a function that reads nothing and has gradients of the same shapes (the
scores are still computed): an upper bound, for XLA then drops other work too.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from memoryformer import model
from memoryformer.model import losses as losses_lib
from memoryformer.ops import lookup
from memoryformer.ops.lookup import native as lookup_native
from memoryformer.training import experiment, optimizer

ARMS = ("native", "xla", "none")
# Nats. The first step differs by rounding; later a sign that rounding flips reads another
# row, and the curves drift apart as they do between two orders of summation.
FIRST_TOLERANCE, TOLERANCE = 1e-5, 2e-2


@jax.custom_vjp
def no_lookup(tables, codes, scores):
    """Zeros [N, F], of which nothing is a function."""
    return jnp.zeros((codes.shape[0], tables.shape[2]), scores.dtype)


no_lookup.defvjp(
    lambda *operands: (no_lookup(*operands), operands),
    lambda operands, dy: (jnp.zeros_like(operands[0]), None, operands[2] * dy[:, :1]),
)


def main(argv: list[str] | None = None) -> dict:
    """Time the steps in turns; print and write medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cores", type=int, default=0, help="0: all")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall")
    parser.add_argument("--output", type=pathlib.Path, default="train_step.json")
    args = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))[: args.cores or None]
    os.sched_setaffinity(0, cores)  # before any thread pool starts
    if not lookup_native.available():
        raise SystemExit("no C++ compiler: nothing to compare")
    run = experiment.resolve(quickstart())
    arms = {name: make_step(run, name) for name in ARMS}
    seconds = {name: [] for name in ARMS}
    losses = {name: [] for name in ARMS}
    clock = timing.CLOCKS[args.clock]
    for i in range(args.steps + 1):
        batch = make_batch(run.model, run.train.batch_size, i)
        for name in ARMS[i % 3 :] + ARMS[: i % 3]:
            start = clock()
            losses[name].append(float(arms[name](batch)))
            if i:
                seconds[name].append(clock() - start)
    differences = np.abs(np.subtract(losses["native"], losses["xla"]))
    if not (differences[0] < FIRST_TOLERANCE and differences.max() < TOLERANCE):
        raise AssertionError(f"the losses part by {differences}")
    medians = {name: statistics.median(series) for name, series in seconds.items()}
    result = {
        "milliseconds": {
            name: [round(1e3 * q, 2) for q in statistics.quantiles(series, n=4)]
            for name, series in seconds.items()
        },
        "xla_over_native": medians["xla"] / medians["native"],
        "share_of_lookups": {
            name: 1 - medians["none"] / medians[name] for name in ("native", "xla")
        },
        "first_loss_difference": float(differences[0]),
        "largest_loss_difference": float(differences.max()),
        "first_and_last_loss": [losses["native"][0], losses["native"][-1]],
        "cores": len(cores),
        "clock": args.clock,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def quickstart():
    """The quickstart's config."""
    path = pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def make_batch(
    model_config: model.ModelConfig, rows: int, seed: int
) -> dict[str, np.ndarray]:
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


def make_step(run, name: str):
    """Return a function of a batch: one update of this arm's own state, its loss."""
    chosen = "xla" if name == "none" else name
    config = dataclasses.replace(run.model, lookup=chosen)
    groups = model.param_groups(run.model)
    tx = optimizer.make(run.optimizer, run.train.num_steps, groups)

    def step(params, opt_state, batch):
        def loss(params):
            nats = losses_lib.batch_nats(config, params, batch)
            return jnp.sum(nats) / jnp.sum(batch["weights"])

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return params, opt_state, value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = model.init(config, 0)
    state = [params, tx.init(params)]

    def run_step(batch):
        replaced = lookup.lookup_xla.scan_tables
        if name == "none":  # only while its step is traced
            lookup.lookup_xla.scan_tables = no_lookup
        try:
            *state[:], value = compiled(*state, batch)
        finally:
            lookup.lookup_xla.scan_tables = replaced
        return jax.block_until_ready(value)

    return run_step


if __name__ == "__main__":
    main()
