"""Bytes across `model` per token and layer, from compiled programs; nothing is run.

    python -m benchmarks.communication --target=h200:8   # or v5e:2x4, cpu:8; [--json=FILE]

`data`=2 x `model`=4, D = 1024, K = 128, tau = 8, 16 heads, bf16, 8 rows of 256 tokens:

    memory       MemoryFormer-base: this project's train step, with one block and with two;
                 the difference is one block's
    dense        its dense twin (Pythia's block), the same way: activations are gathered and
                 reduce-scattered
    megatron     a program of this file's own: one sequential dense block in Megatron's layout,
                 column- and row-parallel, its activations whole on every device and summed
                 by an all-reduce behind attention and feed-forward layer (arXiv 1909.08053)

Forward is the evaluation step's (of megatron: the function's), backward what the step with
gradients sends beyond it. The target's compiler must be installed (`memoryformer.accounting.targets`).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import arguments

PROGRAMS = ("megatron", "memory", "dense")

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("--target", default="h200:8")
FLAGS.names("programs", PROGRAMS)
FLAGS.add_argument(
    "--lookup",
    default="auto",
    help="of the memory layers: local, so that it changes compile time only",
)
FLAGS.output("json")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryformer import presets
from memoryformer import sharding as sharding_lib
from memoryformer.accounting import targets as targets_lib
from memoryformer.dryrun import hlo_messages, lowering
from memoryformer.training import experiment

MESH = "tensor:data=2,model=4"
ROWS, LENGTH, WIDTH, HEADS = 8, 256, 1024, 16
TOKENS = ROWS // 2 * LENGTH  # of one device
Pair = tuple[
    list[hlo_messages.Collective], list[hlo_messages.Collective]
]  # forward, forward and backward


def main(argv: Sequence[str] | None = None) -> None:
    """Compile the programs and print the table."""
    options = FLAGS.parse_args(argv)
    chosen = FLAGS.chosen("programs", options.programs, PROGRAMS)
    if PROGRAMS[0] not in chosen:
        reason = f"is without {PROGRAMS[0]}, with which all are compared"
        FLAGS.error(f"--programs={options.programs}: {reason}")
    jax.config.update("jax_enable_compilation_cache", False)  # none for such devices
    devices = targets_lib.parse(options.target).devices()
    memory = presets.memoryformer("base")
    memory.model.lookup = options.lookup
    programs = {
        "megatron": lambda: megatron(devices),
        "memory": lambda: one_block(memory, devices),
        "dense": lambda: one_block(presets.pythia("410m"), devices),
    }
    pairs = {name: programs[name]() for name in chosen}
    rows = {name: per_token(*pair) for name, pair in pairs.items()}
    print(f"wire bytes per token and layer across model, {options.target}")
    for name, row in rows.items():
        ratio = rows["megatron"]["total"] / row["total"]
        print(
            f"{name:<10} " + "  ".join(f"{k} {v:,.0f}" for k, v in row.items()), end=""
        )
        print(f"   megatron's are {ratio:.2f} times as many")
        print(hlo_messages.table(pairs[name][1]) + "\n")
    if options.json:
        listed = {n: [dataclasses.asdict(c) for c in p[1]] for n, p in pairs.items()}
        text = json.dumps({"bytes": rows, "collectives": listed}, indent=2)
        pathlib.Path(options.json).write_text(text + "\n", encoding="utf-8")


def per_token(
    forward: list[hlo_messages.Collective], both: list[hlo_messages.Collective]
) -> dict[str, float]:
    """Wire bytes per token."""
    ahead, total = (
        hlo_messages.wire_bytes(c, "model") / TOKENS for c in (forward, both)
    )
    return {"forward": ahead, "backward": total - ahead, "total": total}


def one_block(config: Any, devices: Sequence[jax.Device]) -> Pair:
    """What one block of an experiment's model sends across `model`."""
    with config.unlocked():
        config.update_from_flattened_dict(
            {
                "model.seq_len": LENGTH,
                "model.vocab_size": 1024,  # outside the blocks
                "train.batch_size": ROWS,
                "eval.batch_size": ROWS,
                "mesh": MESH,
            }
        )
    one, two = (
        _model_collectives(_resolved(config, layers), devices) for layers in (1, 2)
    )
    return hlo_messages.difference(two[0], one[0]), hlo_messages.difference(
        two[1], one[1]
    )


def _resolved(config, num_layers):
    config.model.num_layers = num_layers
    return experiment.resolve(config)


def _model_collectives(run, devices) -> Pair:
    sharding = lowering.device_sharding(run, devices)
    steps = (lowering.trace_forward(run, sharding), lowering.trace(run, sharding)[1])
    lowered = (lowering.lower(step, sharding) for step in steps)
    return tuple(_across(low, sharding.mesh) for low in lowered)


def _across(lowered, mesh) -> list[hlo_messages.Collective]:
    found = hlo_messages.collectives(lowered.compile().as_text(), dict(mesh.shape))
    return [c for c in found if "model" in c.axes]


def megatron(devices: Sequence[jax.Device]) -> Pair:
    """One dense block in Megatron's layout, of its input and its parameters."""
    mesh = sharding_lib.make(MESH, devices).mesh
    dtype, here = jnp.bfloat16, P("data", None, None)
    shapes = {
        "qkv": ((WIDTH, 3, WIDTH), P(None, None, "model")),
        "out": ((WIDTH, WIDTH), P("model", None)),
        "up": ((WIDTH, 4 * WIDTH), P(None, "model")),
        "down": ((4 * WIDTH, WIDTH), P("model", None)),
    }
    x = jax.ShapeDtypeStruct(
        (ROWS, LENGTH, WIDTH), dtype, sharding=NamedSharding(mesh, here)
    )
    params = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in shapes.items()
    }
    specs = {name: spec for name, (_, spec) in shapes.items()}
    block = jax.shard_map(
        _megatron_block, mesh=mesh, in_specs=(specs, here), out_specs=here
    )

    def gradients(params, x, dy):
        y, pull = jax.vjp(block, params, x)
        return y, pull(dy)

    with jax.set_mesh(mesh):
        forward = jax.jit(block).lower(params, x)
        both = jax.jit(gradients).lower(params, x, x)
    return _across(forward, mesh), _across(both, mesh)


def _megatron_block(params, x):
    """[B, L, D], the same on all devices of `model`, which hold their heads and columns."""
    q, k, v = jnp.moveaxis(jnp.einsum("bld,dsf->blsf", _norm(x), params["qkv"]), 2, 0)
    split: Callable = lambda z: z.reshape(*z.shape[:2], -1, WIDTH // HEADS)  # noqa: E731
    y = jax.nn.dot_product_attention(split(q), split(k), split(v), is_causal=True)
    y = jnp.einsum("blf,fd->bld", y.reshape(q.shape), params["out"])
    x = x + jax.lax.psum(y, "model")
    hidden = jax.nn.gelu(jnp.einsum("bld,df->blf", _norm(x), params["up"]))
    return x + jax.lax.psum(jnp.einsum("blf,fd->bld", hidden, params["down"]), "model")


def _norm(x):
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.var(wide, axis=-1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype)


if __name__ == "__main__":
    arguments.run(main)
