"""Collectives read from the text of compiled programs: hand-written lines and real ones."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryformer.dryrun import hlo_messages, jaxpr_messages

# What `program`, below, compiles to: jax-VERSION-TARGET.hlo, without metadata.
SAMPLES = sorted((pathlib.Path(__file__).parent / "hlo_samples").glob("*.hlo"))
MESH = {"data": 2, "model": 4}
HEAD = "HloModule m, is_scheduled=true\n\n"


def module(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"{HEAD}{before}ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def one(line):
    (found,) = hlo_messages.collectives(module(line), MESH)
    return found


@pytest.mark.parametrize(
    "groups, axes, size",
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("model",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("[2,4]<=[8]", ("model",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[1,8]<=[8]", ("data", "model"), 8),
        ("mesh['data'=2,'model'=4] {'model'}", ("model",), 4),
        ("{}", ("data", "model"), 8),
    ],
)
def test_groups_in_every_syntax(groups, axes, size):
    """Mutations: the transpose of an iota list ignored; axes named by stride alone."""
    line = (
        "%a = f32[16]{0} all-reduce(%p), channel_id=1, "
        f"replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
    )
    found = one(line)
    assert (found.axes, found.group_size) == (axes, size)
    assert found.wire_bytes == 2 * (size - 1) / size * 64


@pytest.mark.parametrize(
    "line, dtype, shape, wire",
    [
        (
            "%a = u8[2,4,8]{2,1,0} all-gather(%p), replica_groups=[2,4]<=[8], "
            "dimensions={2}",
            "u8", (2, 4, 8), 48,
        ),
        (
            "%a = (u8[2,4,2]{2,1,0}, u8[2,4,8]{2,1,0:T(8,128)(4,1)}) "
            "all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={2}",
            "u8", (2, 4, 8), 48,
        ),
        (
            "ROOT %a = bf16[2,4,2]{2,1,0} reduce-scatter(%p), "
            "replica_groups=[2,4]<=[8], dimensions={2}, to_apply=%add",
            "bf16", (2, 4, 8), 96,
        ),
        (
            "%a = (bf16[2,4,8]{2,1,0}, bf16[2,4,2]{2,1,0}) "
            "reduce-scatter-start(%p), replica_groups=[2,4]<=[8], dimensions={2}",
            "bf16", (2, 4, 8), 96,
        ),
        (
            "%a = f32[16]{0} collective-permute(%p), "
            "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            "f32", (16,), 64,
        ),
        (
            "%a = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%p), "
            "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            "f32", (16,), 64,
        ),
    ],
)  # fmt: skip
def test_payload_and_wire(line, dtype, shape, wire):
    """Mutations: the scattered part taken for the payload; a start's operand counted too."""
    found = one(line)
    assert (found.dtype, found.shape, found.wire_bytes) == (dtype, shape, wire)
    assert found.axes == ("model",)


def test_combined_and_silent():
    """A combined collective is several; groups of one device send nothing.

    Mutation: the size of a group not looked at.
    """
    combined = (
        "%a = (f32[4]{0}, bf16[8]{0}) all-reduce(%p, %q), replica_groups=[2,4]<=[8]"
    )
    alone = "%b = f32[4]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3}}"
    found = hlo_messages.collectives(module(combined, alone), MESH)
    assert {(c.dtype, c.shape, c.count) for c in found} == {
        ("f32", (4,), 1),
        ("bf16", (8,), 1),
    }


@pytest.mark.parametrize(
    "known", [', backend_config={"known_trip_count":{"n":"5"}}', ""]
)
def test_loops_multiply(known):
    """By the compiler's trip count, or by the bound that the condition compares with.

    Mutation: a loop's body counted once.
    """
    before = (
        "%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {\n"
        "  %a = f32[4]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add\n}\n\n"
        "%cond.1 (p: (s32[], f32[4])) -> pred[] {\n"
        "  %c = s32[] constant(5)\n"
        "  ROOT %r = pred[] compare(%i, %c), direction=LT\n}\n\n"
    )
    loop = "%w = (s32[], f32[4]) while(%t), condition=%cond.1, body=%body.1" + known
    (found,) = hlo_messages.collectives(module(loop, before=before), MESH)
    assert found.count == 5


def program(x):
    """Every kind of message, on 2 x 4 devices; x is [2, 4] on each."""
    whole = jax.lax.all_gather(x, "model", axis=1, tiled=True)
    part = jax.lax.psum_scatter(whole, "model", scatter_dimension=1, tiled=True)
    part = jax.lax.ppermute(part, "data", [(0, 1), (1, 0)])
    turned = jax.lax.all_to_all(part, "model", split_axis=1, concat_axis=0, tiled=True)
    body = lambda i, y: jnp.cos(jax.lax.psum(y, "data")) * 0.5  # noqa: E731
    return jax.lax.fori_loop(0, 3, body, turned)


def traced(function):
    mesh, spec = jax.make_mesh((2, 4), ("data", "model")), P("data", "model")
    specs = {"in_specs": spec, "out_specs": spec, "check_vma": False}
    mapped = jax.shard_map(function, mesh=mesh, **specs)
    place = NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=place)
    with jax.set_mesh(mesh):
        return jax.jit(mapped).trace(x)


SENT = {  # (kind, axis, values of the payload, times)
    ("all-gather", "model", 32, 1),
    ("reduce-scatter", "model", 32, 1),
    ("collective-permute", "data", 8, 1),
    ("all-to-all", "model", 8, 1),
    ("all-reduce", "data", 8, 3),
}


def sent(messages):
    assert all(c.dtype == "f32" for c in messages)
    return {(c.kind, *c.axes, c.payload_bytes // 4, c.count) for c in messages}


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_what_each_version_of_jax_writes(path):
    """Stored texts of one program, for CPU and, with asynchronous starts, for a GPU.

    Mutations: `mesh[..]` groups not read; the operand of an `all-reduce-start` counted too.
    """
    assert sent(hlo_messages.collectives(path.read_text(), MESH)) == SENT


def test_a_real_program():
    """The same, compiled for eight CPU devices by the jax that is installed, and as traced.

    Mutation: `-done` of an asynchronous collective counted.
    """
    step = traced(program)
    text = step.lower().compile().as_text()
    messages = hlo_messages.collectives(text, MESH)
    assert sent(messages) == sent(jaxpr_messages.collectives(step.jaxpr, MESH)) == SENT
    assert hlo_messages.wire_bytes(messages, "model") == 2 * 0.75 * 128 + 0.75 * 32
    difference = hlo_messages.difference(messages, messages)
    assert hlo_messages.wire_bytes(difference, "data") == 0


@pytest.mark.parametrize(
    "line",
    [
        "%a = f32[16]{0} all-scatter(%p), channel_id=1, replica_groups=[2,4]<=[8]",
        "ROOT %a = (f32[4]{0}, u32[]) pass-on-start(%p), source_target_pairs={{0,1}}",
        "%a = f32[16]{0} all-mix(%p), replica_groups=mesh['data'=2,'model'=4] {'model'}",
    ],
)
def test_an_unknown_message_is_an_error(line):
    """... not a count that is too low, unless its name is asked for.

    Mutations: `_UNKNOWN` not looked for; `unknown` not filled.
    """
    name = line.split("(%p)")[0].split()[-1]
    with pytest.raises(ValueError, match=f"'{name}' sends messages of an unknown kind"):
        hlo_messages.collectives(module(line), MESH)
    unknown = set()
    assert hlo_messages.collectives(module(line), MESH, unknown) == []
    assert unknown == {name}


def test_an_unknown_message_of_a_trace_is_an_error(monkeypatch):
    """Mutation: only primitives of `KINDS` looked at."""
    step = traced(lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]))
    assert len(jaxpr_messages.collectives(step.jaxpr, MESH)) == 1
    monkeypatch.delitem(jaxpr_messages.KINDS, "ppermute")
    with pytest.raises(
        ValueError, match="'ppermute' sends messages of an unknown kind"
    ):
        jaxpr_messages.collectives(step.jaxpr, MESH)


def test_what_is_no_module_is_refused():
    """Mutation: the entry not looked for."""
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo_messages.collectives("hello\n", MESH)
