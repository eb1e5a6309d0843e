"""One device equals eight: losses, gradients, optimizer and evaluation on every mesh."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec as P

from memoryformer import evaluation, experiment, mixers, model, sharding, trainer
from memoryformer.errors import ConfigError

STEPS = 20
B, L = 16, 16
MODELS = {
    "memory": {"score": "learned", "lookup": "xla"},
    "paper": {"score": "softmax", "memory_bias": False, "bias_std": 0.0},
    "tied": {"tie_embeddings": True, "norm": "layernorm"},
    "dense": {"projection": "dense"},
}
PREFIX_MIXERS = (
    "linear",
    "trained_kernel",
    "performer",
    "cosformer",
    "linformer",
    "luna",
)
MODELS |= {
    name: {"lookup": "xla", "mixer": name, "prefix_chunk": 3}
    for name in (*PREFIX_MIXERS, "conv_luna")
}
MODELS["performer"] |= {"performer_features": 6, "performer_redraw_every": 8}
MODELS["linformer"] |= {"linformer_slots": 5}
MODELS["luna"] |= {"luna_slots": 5}
MODELS["conv_luna"] |= {"luna_slots": 5}
MESHES = ("data", "fsdp", "tensor:model=2", "fsdp_tensor:model=2", "tensor:model=4")
slow = pytest.mark.slow
CASES = [
    *(("memory", mesh, 1) for mesh in MESHES[:3]),
    ("memory", "fsdp_tensor:model=2", 2),
    ("dense", "fsdp_tensor:model=2", 2),
    ("memory", "sequence", 1),
    ("dense", "fsdp:sequence=4", 2),
    pytest.param("dense", "tensor:model=4", 1, marks=slow),
    pytest.param("memory", "fsdp_tensor:model=2,sequence=2", 2, marks=slow),
    pytest.param("memory", "sequence:sequence=4", 1, marks=slow),
    pytest.param("dense", "sequence", 1, marks=slow),
    pytest.param("performer", "sequence:sequence=4", 1, marks=slow),
    pytest.param("performer", "sequence", 1, marks=slow),
    pytest.param("conv_luna", "tensor:model=2,sequence=4", 1, marks=slow),
    *(
        pytest.param(name, "sequence", 1, marks=slow)
        for name in (*PREFIX_MIXERS[:2], *PREFIX_MIXERS[3:], "conv_luna")
    ),
    *(
        pytest.param(name, mesh, 1, marks=slow)
        for name in ("paper", "tied", "dense")
        for mesh in MESHES[:4]
    ),
]


@functools.cache
def run_of(name, microbatches=1):
    config = experiment.default_config()
    sizes = {"vocab_size": 16, "embed_dim": 32, "num_heads": 4}
    sizes |= {"seq_len": L, "num_layers": 1}
    config.model.update(dataclasses.asdict(toy.model_config(**sizes | MODELS[name])))
    config.train.update(
        num_steps=STEPS, batch_size=B, num_microbatches=microbatches, spike_window=4
    )
    config.optimizer.update(learning_rate=1e-3, warmup_steps=2)
    config.eval.batch_size = B
    return experiment.resolve(config)


@functools.cache
def initial_params(name):
    """Drawn in numpy: compiling `init` would take most of the time."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(run_of(name).model))

    def draw(path, x):
        start = {"scale": 1, "beta": 2, "gamma": 1}.get(path[-1].key, 0)
        return (start + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


def place(state, abstract):
    return jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding) if a.sharding else jnp.asarray(x),
        state,
        abstract,
    )


@functools.cache
def results(name, mesh, microbatches=1):
    """(losses, gradient norms, first momentum, state, validation nats) of 20 steps."""
    run = run_of(name, microbatches)
    made = sharding.make(mesh, striped=mixers.takes_any_order(run.model))
    specs = trainer._check_fit(run, made)
    losses, norms = [], []
    with made.activate():
        _, abstract = trainer.init_state(run, made, specs)
        state = place(trainer.new_state(run, initial_params(name)), abstract)
        batches = [
            made.put_batch(toy.batch(run.model, seed, B, L)) for seed in range(STEPS)
        ]
        step = trainer.make_train_step(run, made, specs).lower(state, batches[0])
        options = {"xla_llvm_disable_expensive_passes": True}
        step = step.compile(compiler_options=options)
        for i, batch in enumerate(batches):
            state, values = step(state, batch)
            losses.append(float(values["nats"] / values["weight"]))
            norms.append(float(values["grad_norm"]))
            if not i:  # (1 - b1) times the clipped gradient
                momentum = jax.device_get(state.opt_state.mu)
        nats = evaluation.make_eval_step(run.model, made)(state.params, batches[0])
        return losses, norms, momentum, state, np.asarray(nats)


@pytest.mark.parametrize("name, mesh, microbatches", CASES)
def test_one_device_equals_eight(name, mesh, microbatches):
    """20 losses, gradients and gradient norms, within 1e-5 of one device's.

    Rows have unequal weights, and two meshes also add up microbatches. Mutations: psum
    of gradients left out over `data`, `sequence` or `model`; `nats` not divided by the size of
    `model`; the gradient of each microbatch divided by its own weight; over `sequence`:
    `_combine` without `keep`, or its `empty`; `_larger` without `same`; `_later_tail`
    that returns the right tail; evaluation's psum over it left out.
    """
    assert jax.device_count() == 8
    losses, norms, momentum, state, nats = results(name, mesh, microbatches)
    expected = results(name, "single")
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    np.testing.assert_allclose(norms, expected[1], rtol=1e-4)
    np.testing.assert_allclose(norms[0], expected[1][0], rtol=1e-5)
    for path, theirs in jax.tree.leaves_with_path(expected[2]):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, momentum)
        # One number summed over all tokens and chunks, such as gamma, rounds more.
        bound = (1e-5 if theirs.ndim else 1e-4) * np.abs(theirs).max()
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path)
        )
    np.testing.assert_allclose(nats, expected[4], rtol=1e-4)
    assert losses[-1] != losses[0] and int(state.step) == STEPS


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=slow)])
def test_gradient_accumulation_equals_one_batch(count):
    """Microbatches of unequal weight, on one device.

    Mutation: `_accumulate` without its first part.
    """
    losses, norms, *_ = results("memory", "single", count)
    expected = results("memory", "single")
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    np.testing.assert_allclose(norms[0], expected[1][0], rtol=1e-5)


def test_state_keeps_its_place():
    """After steps, tables and their moments lie as the specs say, an eighth each.

    Mutation: `out_specs` of the gradients P() under fsdp_tensor.
    """
    state = results("memory", "fsdp_tensor:model=2", 2)[3]
    trees = (state.params, state.opt_state.mu, state.opt_state.nu)
    for tree in trees:
        block = tree["blocks"]["0"]
        qkv, down = block["mixer"]["qkv"]["tables"], block["ffn"]["down"]["tables"]
        assert qkv.sharding.spec == P(None, "data", None, "model")
        assert down.sharding.spec == P(None, "data", "model")
        for array in (qkv, down, tree["embed"]["embedding"], tree["head"]["kernel"]):
            assert array.addressable_shards[0].data.size == array.size // 8
        assert len(tree["final_norm"]["scale"].sharding.device_set) == 8


def test_first_state_does_not_depend_on_the_mesh():
    """Drawn where it lies; what one device draws, but for the last bit.

    Mutation: a seed folded with the device's index in `draw`.
    """
    run, drawn = run_of("memory"), []
    for mesh in ("single", "fsdp_tensor:model=2"):
        made = sharding.make(mesh)
        specs = trainer._check_fit(run, made)
        with made.activate():
            draw, abstract = trainer.init_state(run, made, specs)
            state = draw()
        for x, a in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert (x.shape, x.dtype) == (a.shape, a.dtype)
        drawn.append(jax.device_get(state))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(near, *drawn)


def test_bare_specs_run_anywhere():
    """One device, and any mesh's preset on one device, has no mesh at all.

    Mutation: a mesh of size 1 in `make`.
    """
    for mesh in sharding.PRESETS:
        made = sharding.make(mesh, jax.devices()[:1])
        assert made.mesh is None and made.num_devices == 1
        assert made.specs == sharding.ShardingSpecs()


@pytest.mark.parametrize(
    "mesh, shape",
    [
        ("data", {"data": 8}),
        ("fsdp", {"data": 8}),
        ("tensor", {"model": 8}),
        ("tensor:model=2", {"data": 4, "model": 2}),
        ("fsdp_tensor:data=2,model=4", {"data": 2, "model": 4}),
        ("sequence", {"sequence": 8}),
        ("sequence:sequence=4", {"data": 2, "sequence": 4}),
        ("data:sequence=4,data=2", {"data": 2, "sequence": 4}),
        ("tensor:sequence=2", {"sequence": 2, "model": 4}),
        ("fsdp_tensor:model=2,sequence=2", {"data": 2, "sequence": 2, "model": 2}),
    ],
)
def test_mesh_strings(mesh, shape):
    """Sizes not given are filled in. Mutation: `model` 1 where 'tensor' names no size."""
    assert dict(sharding.make(mesh).mesh.shape) == shape


@pytest.mark.parametrize(
    "mesh, message",
    [
        ("fsd", "mesh='fsd': unknown choice; did you mean 'fsdp'?"),
        ("tensor:modle=2", "did you mean 'model'?"),
        ("tensor:model=3", "model=3 does not fit 8 devices"),
        ("tensor:model=16", "model=16 does not fit 8 devices"),
        ("tensor:model=two", "model='two' is not a size >= 1"),
        ("tensor:model=0", "model='0' is not a size >= 1"),
        ("data:data=4", "data=4 does not fit 8 devices"),
        ("data:sequence=3", "sequence=3 does not fit 8 devices"),
        ("tensor:sequence=16", "sequence=16 x model=1 does not fit 8 devices"),
    ],
)
def test_bad_mesh_strings_are_one_line(mesh, message):
    """Mutation: `rest` not looked at in `make`."""
    with pytest.raises(ConfigError) as caught:
        sharding.make(mesh)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def slice_of_tpus(rows, columns, kind="TPU v6 lite", slice_index=0):
    """Devices of one slice as jax describes them, hosts of 2 x 2."""
    return [
        types.SimpleNamespace(
            platform="tpu",
            device_kind=kind,
            core_on_chip=0,
            coords=(x, y, 0),
            slice_index=slice_index,
            process_index=(y // 2 * ((columns + 1) // 2) + x // 2, slice_index),
            id=x + columns * y + 1000 * slice_index,
        )
        for y, x in np.ndindex(rows, columns)
    ]


@pytest.mark.parametrize(
    "devices, sizes",
    [
        (slice_of_tpus(8, 8), (16, 4)),
        (slice_of_tpus(4, 4), (8, 2)),
        (slice_of_tpus(4, 4, "TPU v5 lite"), (8, 2)),
        (slice_of_tpus(4, 4), (2, 2, 4)),
    ],
)
def test_meshes_that_split_an_axis_of_the_torus(devices, sizes):
    """Every device once; those of a `model` group are neighbours.

    Mutation: `jax.make_mesh`, which refuses all but v5e.
    """
    made = sharding._arranged(sizes, devices)
    assert made.shape == sizes and len({d.id for d in made.flat}) == len(devices)
    for group in made.reshape(-1, sizes[-1]):
        spread = np.ptp([d.coords for d in group], axis=0) + 1
        assert np.prod(spread) == len(group)


@pytest.mark.parametrize(
    "sizes, across",
    [((8, 4), (2, 1)), ((32,), (2,)), ((16, 2), (2, 1)), ((1, 32), (1, 2))],
)
def test_meshes_of_several_slices(sizes, across):
    """The first axis that can lies across slices, the others inside one.

    Mutation: `create_device_mesh` for all devices; or `sizes` from the last.
    """
    devices = slice_of_tpus(4, 4) + slice_of_tpus(4, 4, slice_index=1)
    made = sharding._arranged(sizes, devices)
    assert made.shape == sizes and len({d.id for d in made.flat}) == len(devices)
    slices = np.vectorize(lambda d: d.slice_index)(made)
    for axis, size in enumerate(across):
        for line in np.moveaxis(slices, axis, -1).reshape(-1, sizes[axis]):
            assert len(set(line)) == size
            assert list(line) == sorted(line)  # consecutive parts in one slice


@pytest.mark.parametrize(
    "devices, reason",
    [
        ([*slice_of_tpus(4, 3)[:-1], *slice_of_tpus(6, 6)[-1:]], "jax_devices="),
        (slice_of_tpus(2, 4) + slice_of_tpus(2, 2, slice_index=1), "must equal"),
    ],
)
def test_devices_that_cannot_be_laid_out(devices, reason):
    """A hole, slices of two sizes: one line. Mutation: jax's errors let through."""
    with pytest.raises(ConfigError, match="data=6 x model=2 cannot be laid") as caught:
        sharding.make("tensor:model=2", devices)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, mesh, message",
    [
        ({"vocab_size": 13}, "tensor:model=4", "head.kernel (16, 13): 13 does not div"),
        (
            {"num_heads": 2},
            "tensor:model=4",
            "model.num_heads=2 does not divide over 4",
        ),
        (
            {"batch_size": 6},
            "tensor:model=2",
            "batch_size=6 does not divide over 4 dev",
        ),
        (
            {"embed_dim": 48, "code_bits": 8},
            "tensor:model=4",
            "tables (6, 1024, 48): the number of tables, 6, does not divide over 4",
        ),
        (
            {"vocab_size": 14, "tie_embeddings": True},
            "tensor:model=4",
            "with model.tie_embeddings, model.vocab_size=14 does not divide over 4",
        ),
        ({"code_bits": 2, "extra_bits": 0}, "fsdp", "(8, 4, 16): 4 does not divide"),
    ],
)
def test_what_does_not_divide_is_named(fields, mesh, message):
    """The field or the parameter, its size, the axis; before anything is traced.

    Mutations: only the batch checked; `tables` or `embedding` not looked at, with which jax
    raises ValueError while it traces.
    """
    made = sharding.make(mesh)
    fields = {"num_heads": 4, "vocab_size": 16, "extra_bits": 2} | fields
    batch_size = fields.pop("batch_size", 8)
    config = toy.model_config(**fields)
    specs = model.partition_specs(config, made)
    shapes = jax.eval_shape(lambda: model.init(config))
    with pytest.raises(ConfigError) as caught:
        sharding.validate(made, specs, shapes, batch_size, config.num_heads)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"seq_len": 12}, "model.seq_len=12 does not divide over 8 devices along 'seq"),
        ({"logit_transform": "dape_v2"}, "logit_transform='dape_v2' cannot run over"),
        ({"attention": "cudnn"}, "model.attention='cudnn' with model.logit_transform="),
        ({"mixer": "luna", "causal": False}, "causal=False sums over whole rows"),
        ({"recurrence": "rmt"}, "model.recurrence='rmt' carries a memory"),
    ],
)
def test_what_cannot_run_over_a_sequence_axis_is_refused(fields, message):
    """Before anything is compiled, in one line; encoders of softmax may.

    Mutation: `validate_sequence` not called by `partition_specs`.
    """
    made = sharding.make("sequence")
    with pytest.raises(ConfigError) as caught:
        model.partition_specs(toy.model_config(**{"seq_len": 16} | fields), made)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    model.partition_specs(toy.model_config(seq_len=16, causal=False), made)
