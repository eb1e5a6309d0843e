"""Collectives read from the text of compiled programs: hand-written lines and real ones."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryformer.dryrun import hlo_messages

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


def test_a_real_program():
    """Gather, scatter and a loop, compiled for eight CPU devices.

    Mutation: `-done` of an asynchronous collective counted.
    """
    mesh = jax.make_mesh((2, 4), ("data", "model"))

    def f(x):  # [2, 4] on each device
        whole = jax.lax.all_gather(x, "model", axis=1, tiled=True)
        part = jax.lax.psum_scatter(whole, "model", scatter_dimension=1, tiled=True)
        body = lambda i, y: jnp.cos(jax.lax.psum(y, "data")) * 0.5  # noqa: E731
        return jax.lax.fori_loop(0, 3, body, part)

    spec = P("data", "model")
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct(
            (4, 16), jnp.float32, sharding=NamedSharding(mesh, spec)
        )
        compiled = jax.jit(mapped).lower(x).compile()
    found = hlo_messages.collectives(compiled.as_text(), dict(mesh.shape))
    assert {(c.kind, c.axes, c.shape, c.count) for c in found} == {
        ("all-gather", ("model",), (2, 16), 1),
        ("reduce-scatter", ("model",), (2, 16), 1),
        ("all-reduce", ("data",), (2, 4), 3),
    }
    assert hlo_messages.wire_bytes(found, "model") == 2 * 0.75 * 128
    assert hlo_messages.wire_bytes(hlo_messages.difference(found, found), "data") == 0


def test_what_is_no_module_is_refused():
    """Mutation: the entry not looked for."""
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo_messages.collectives("hello\n", MESH)
