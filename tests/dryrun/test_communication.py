"""What crosses the devices in a train step, read from the program compiled for CPU.

CPU widens bfloat16 sums, so all is float32 here; benchmarks/communication.py counts the bytes
of the real targets. One block's messages are those that two blocks have beyond one.
"""

import dataclasses
import functools
import math

import jax
import pytest
import toy

from memoryformer.dryrun import hlo_messages, jaxpr_messages, lowering
from memoryformer.training import experiment

B, L, D, K = 16, 16, 64, 8  # tau = 8
DATA, MODEL = 2, 4
HERE = (B // DATA, L)  # tokens of one device


@functools.cache
def collectives(projection, mesh, num_layers, microbatches=1):
    config = experiment.default_config()
    fields = {"code_bits": 8, "lookup": "xla", "num_heads": 4}
    if projection == "memory":
        fields["projection_options"] = {"extra_bits": 2}
    sizes = {"embed_dim": D, "seq_len": L, "num_layers": num_layers, "vocab_size": 24}
    model = toy.model_config(projection, **sizes | fields)
    config.model.update(dataclasses.asdict(model))
    config.train.update(num_steps=4, batch_size=B, num_microbatches=microbatches)
    config.eval.batch_size = B
    config.mesh = mesh
    run = experiment.resolve(config)
    sharding = lowering.device_sharding(run, jax.devices())
    state, step = lowering.trace(run, sharding)
    options = {"xla_llvm_disable_expensive_passes": True}
    text = lowering.lower(step, sharding).compile(compiler_options=options).as_text()
    shape = dict(sharding.mesh.shape)
    return (
        state,
        hlo_messages.collectives(text, shape),
        jaxpr_messages.collectives(step.jaxpr, shape),
    )


def of_one_block(projection):
    found = [collectives(projection, f"tensor:model={MODEL}", n)[1] for n in (2, 1)]
    # Scalars are the norm of all gradients, outside the blocks.
    return [c for c in hlo_messages.difference(*found) if "model" in c.axes and c.shape]


def test_a_memory_block_sends_codes_scores_and_statistics():
    """Exactly the intended collectives across `model`, and nothing of size B L D.

    Mutations: codes gathered as int32; one hash each for Q, K and V; x gathered before it is
    hashed; scores gathered without their reduce-scatter.
    """
    found = of_one_block("memory")
    large = {(c.kind, c.dtype, c.shape): c.count for c in found if c.shape[-1] > 1}
    gathered = "all-gather"
    assert large == {
        (gathered, "u8", (*HERE, K)): 2,  # Q, K and V together; up
        (gathered, "u16", (*HERE, K)): 1,  # down: tau + 2 bits
        (gathered, "f32", (*HERE, K)): 3,  # scores
        ("reduce-scatter", "f32", (*HERE, K)): 3,  # their gradients
    }
    statistics = [c for c in found if c.shape[-1:] == (1,)]
    assert {(c.kind, c.dtype) for c in statistics} == {("all-reduce", "f32")}
    # Two RMSNorms and the two sums of a LayerNorm, each way.
    assert sum(c.count * math.prod(c.shape) for c in statistics) == 8 * math.prod(HERE)
    assert len(found) == len(large) + len(statistics)
    assert all(math.prod(c.shape) < math.prod(HERE) * D for c in found)


@pytest.mark.slow
def test_a_dense_block_sends_activations():
    """The counter-example: seven of size B L D, of the eight halves of four all-reduces.

    Both branches of Pythia's parallel residual have the same gradient: it is gathered once.
    Mutation: `split_inputs` ignored.
    """
    found = of_one_block("dense")
    whole = [c for c in found if c.shape == (*HERE, D)]
    assert sum(c.count for c in whole) == 7
    assert sum(c.wire_bytes for c in whole) == 7 * 0.75 * math.prod(HERE) * D * 4


@pytest.mark.parametrize(
    "mesh, kind",
    [
        ("fsdp_tensor", "reduce-scatter"),
        pytest.param("tensor", "all-reduce", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_tables_cross_data_once_a_step(mesh, kind):
    """With two microbatches: once for each table, as large as it is held.

    Mutations: `sum_gradients` inside `microbatch`; an all-reduce under FSDP.
    """
    state, found, _ = collectives("memory", f"{mesh}:model={MODEL}", 1, 2)
    tables = [
        x
        for path, x in jax.tree.leaves_with_path(state.params)
        if path[-1].key == "tables"
    ]
    wanted = sum(x.size // MODEL for x in tables)  # values on a device along `data`
    sums = [
        c
        for c in found
        if c.axes == ("data",) and c.kind == kind and math.prod(c.shape) > D * D
    ]
    assert sum(c.count * math.prod(c.shape) for c in sums) == wanted
    others = [c for c in found if "data" in c.axes and c not in sums]
    gathers = [c for c in others if c.kind == "all-gather"]
    assert sum(c.count * math.prod(c.shape) for c in gathers) <= (
        1.1 * wanted if mesh == "fsdp_tensor" else 0
    )
    left = [c for c in others if c not in gathers]
    assert all(math.prod(c.shape) <= D * D for c in left)


def test_what_is_traced_is_what_is_compiled():
    """The jaxpr's messages are the compiled program's, but for the norm of all gradients.

    Mutations: a scan's length ignored; an all-gather's operand counted.
    """
    _, compiled, found = collectives("memory", f"fsdp_tensor:model={MODEL}", 1, 2)
    for kind in ("all-gather", "reduce-scatter"):
        ours, theirs = (
            {(c.dtype, c.shape, c.axes): c.count for c in side if c.kind == kind}
            for side in (found, compiled)
        )
        assert ours == theirs
    for axis in ("data", "model"):
        ours, theirs = (
            hlo_messages.wire_bytes(side, axis) for side in (found, compiled)
        )
        assert ours == pytest.approx(theirs, rel=0.02)
