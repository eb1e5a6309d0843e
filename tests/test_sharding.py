"""One device equals eight: losses, gradients, optimizer and evaluation on every mesh."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec as P

from memoryformer import model, sharding
from memoryformer.errors import ConfigError
from memoryformer.evaluation import loss as loss_lib
from memoryformer.model import losses, mixers
from memoryformer.training import experiment, programs
from memoryformer.training import step as step_lib

STEPS = 20
B, L = 16, 16
MODELS = {
    "memory": {"score": "learned", "lookup": "xla"},
    "paper": {
        "score": "softmax",
        "projection_options": {"memory_bias": False, "bias_std": 0.0},
    },
    "tied": {"tie_embeddings": True, "norm": "layernorm"},
    "dense": {"projection": "dense"},
    "variants": {
        "lookup": "xla",
        "projection_options": {
            "rows_read": 2,
            "ngram_rows": 20,
            "token_rows": True,
        },
    },
    "token rows": {"lookup": "xla", "projection_options": {"token_rows": True}},
    "parts": {
        "projection": "mixed",
        "projection_options": {
            "memory_bias": True,
            "parts": "ffn=memory_block,mix=none+hadamard,thresholds; "
            "qkv=memory,mix=orthogonal; output=memory,mix=grouped",
        },
    },
}
# Nothing of it divides over eight devices: 4 tables of 4 buckets, 12 tokens.
MODELS["few"] = {
    "lookup": "xla",
    "embed_dim": 8,
    "num_heads": 2,
    "code_bits": 2,
    "vocab_size": 12,
    "projection_options": {"extra_bits": 0},
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
    name: {"lookup": "xla", "mixer": name, "mixer_options": {"prefix_chunk": 3}}
    for name in (*PREFIX_MIXERS, "conv_luna", "mamba2")
}
MODELS["mamba2"]["mixer_options"] |= {"state_size": 8}
MODELS["performer"]["mixer_options"] |= {"num_features": 6, "redraw_every": 8}
for name in ("linformer", "luna", "conv_luna"):
    MODELS[name]["mixer_options"] |= {"num_slots": 5}
MESHES = ("data", "fsdp", "tensor:model=2", "fsdp_tensor:model=2", "tensor:model=4")
slow = pytest.mark.slow
CASES = [
    *(("memory", mesh, 1) for mesh in MESHES[:3]),
    ("memory", "fsdp_tensor:model=2", 2),
    ("dense", "fsdp_tensor:model=2", 2),
    ("memory", "sequence", 1),
    ("dense", "fsdp:sequence=4", 2),
    ("few", "fsdp:shard=2", 1),
    pytest.param("few", "fsdp_tensor:shard=2,model=2", 2, marks=slow),
    pytest.param("dense", "tensor:model=4", 1, marks=slow),
    pytest.param("parts", "fsdp_tensor:model=2", 1, marks=slow),
    pytest.param("variants", "fsdp_tensor:model=2", 1, marks=slow),
    pytest.param("token rows", "sequence:sequence=4", 1, marks=slow),
    pytest.param("memory", "fsdp_tensor:model=2,sequence=2", 2, marks=slow),
    pytest.param("memory", "sequence:sequence=4", 1, marks=slow),
    pytest.param("dense", "sequence", 1, marks=slow),
    pytest.param("performer", "sequence:sequence=4", 1, marks=slow),
    pytest.param("performer", "sequence", 1, marks=slow),
    pytest.param("conv_luna", "tensor:model=2,sequence=4", 1, marks=slow),
    pytest.param("mamba2", "tensor:model=2,sequence=4", 1, marks=slow),
    *(
        pytest.param(name, "sequence", 1, marks=slow)
        for name in (*PREFIX_MIXERS[:2], *PREFIX_MIXERS[3:], "conv_luna", "mamba2")
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
        num_steps=STEPS, batch_size=B, num_microbatches=microbatches, spikes="skip"
    )
    config.train.spikes_options.update(sigmas=0.0, window=4)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=2)
    config.eval.batch_size = B
    return experiment.resolve(config)


@functools.cache
def initial_params(name):
    """Drawn in numpy: compiling `init` would take most of the time."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(run_of(name).model))

    def draw(path, x):
        if path[-1].key == "order":
            return rng.permutation(x.size).astype(np.float32)
        start = {"scale": 1, "beta": 2, "gamma": 1}.get(path[-1].key, 0)
        return (start + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


def place(state, abstract):
    return jax.tree.map(
        lambda x, a: jax.device_put(x, a.sharding) if a.sharding else jnp.asarray(x),
        state,
        abstract,
    )


class Results(NamedTuple):
    """What a mesh makes of a model, and of the states that one device went through.

    Rounding differs from mesh to mesh and flips a code in one step of some hundreds; and
    Adam makes a whole step of any gradient, so that the mesh's own run strays. From one
    device's states only a step with such a flip may differ.
    """

    own: list[float]  # losses of its own run of 20 steps
    state: step_lib.TrainState  # after them, where it lies
    states: list[step_lib.TrainState]  # on the way, of one device
    losses: list[float]  # of one step from each of one device's states
    norms: list[float]  # of those steps' gradients
    last: list[
        tuple[float, Any, np.ndarray]
    ]  # at one device's parameters after 20 steps,
    # for two batches: the loss, (1 - b1) times the clipped gradient, the nats of every row


@functools.cache
def results(name, mesh, microbatches=1):
    """Run a model on a mesh: its `Results`."""
    run = run_of(name, microbatches)
    made = sharding.make(mesh, striped=mixers.takes_any_order(run.model))
    specs = programs.check_fit(run, made)
    one_device = (mesh, microbatches) == ("single", 1)
    own, losses, norms, states = [], [], [], []
    with made.activate():
        _, abstract = programs.init_state(run, made, specs)
        state = place(step_lib.new_state(run, initial_params(name)), abstract)
        batches = [
            made.put_batch(toy.batch(run.model, seed, B, L))
            for seed in range(STEPS + 2)
        ]
        step = step_lib.make_train_step(run, made, specs).lower(state, batches[0])
        options = {"xla_llvm_disable_expensive_passes": True}
        step = step.compile(compiler_options=options)
        for batch in batches[:STEPS]:
            states += [jax.device_get(state)] if one_device else []
            state, values = step(state, batch)
            own.append(float(values["nats"] / values["weight"]))
        states += [jax.device_get(state)] if one_device else []
        states = states or results(name, "single").states
        for before, batch in zip(states[:STEPS], batches[:STEPS], strict=True):
            _, values = step(place(before, abstract), batch)
            losses.append(float(values["nats"] / values["weight"]))
            norms.append(float(values["grad_norm"]))
        # A fresh optimizer's momentum is (1 - b1) times the clipped gradient.
        fresh = place(step_lib.new_state(run, states[-1].params), abstract)
        eval_step, last = loss_lib.make_eval_step(run.model, made), []
        for batch in batches[STEPS:]:
            after, values = step(fresh, batch)
            nats = np.asarray(eval_step(fresh.params, batch))
            loss = float(values["nats"] / values["weight"])
            last.append((loss, jax.device_get(after.opt_state.mu), nats))
        return Results(own, state, states, losses, norms, last)


def assert_close(ours, theirs):
    """Within 1e-5, but for two numbers in which a code may have flipped."""
    error = np.sort(np.abs(np.asarray(ours) / np.asarray(theirs) - 1))
    assert error[-3] <= 1e-5 and error[-1] < 0.05, error


def assert_same_steps(ours, theirs):
    """Losses and norms of 20 steps, and of one more every gradient, where its loss says that
    no code has flipped: within 1e-5 of the largest of its array (a scalar: of its layer).
    """
    assert_close(ours.losses, theirs.losses)
    assert_close(ours.norms, theirs.norms)
    pairs = zip(ours.last, theirs.last, strict=True)
    same = [(a[1], b[1]) for a, b in pairs if abs(a[0] / b[0] - 1) <= 1e-5]
    assert same
    for pair in same:
        assert_same_gradients(*pair)


def assert_same_gradients(ours, theirs):
    for path, leaf in jax.tree.leaves_with_path(theirs):
        *layer, name = (key.key for key in path)
        there = functools.reduce(dict.__getitem__, layer, theirs)
        # A scalar, such as gamma, sums terms of both signs over all tokens and chunks.
        beside = [leaf] if leaf.ndim else jax.tree.leaves(there)
        bound = 1e-5 * max(np.abs(x).max() for x in beside)
        assert bound > 0, path
        same = functools.reduce(dict.__getitem__, layer, ours)[name]
        np.testing.assert_allclose(
            same, leaf, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("name, mesh, microbatches", CASES)
def test_one_device_equals_eight(name, mesh, microbatches):
    """From each of one device's states the same loss and norm of the gradient, and after 20
    steps the same gradients, entry by entry, and nats of the rows: within 1e-5.

    Its own 20 steps stay near; those of the dense model, which has no codes, within 1e-5.

    Rows have unequal weights, and two meshes also add up microbatches. Mutations: psum
    of gradients left out over `data`, `sequence` or `model`; `nats` not divided by the size of
    `model`; the gradient of each microbatch divided by its own weight; over `shard`:
    `gather_params` without it, or rows of a batch split over `data` alone; over `sequence`:
    `_combine` without `keep`, or its `empty`; `_larger` without `same`; `later_tail`
    that returns the right tail; evaluation's psum over it left out.
    """
    assert jax.device_count() == 8
    found, expected = results(name, mesh, microbatches), results(name, "single")
    assert len(found.losses) == STEPS and found.losses[-1] != found.losses[0]
    assert_same_steps(found, expected)
    for ours, theirs in zip(found.last, expected.last, strict=True):
        assert_close(ours[2], theirs[2])
    near = 1e-5 if name == "dense" else 0.05
    np.testing.assert_allclose(found.own, expected.own, rtol=near)
    assert int(found.state.step) == STEPS


def test_gradients_are_of_the_mean():
    """The loss and the norm of its gradient, in numbers, straight from the definition.

    Neither Adam nor clipping would notice a factor. Mutations: gradients multiplied by the
    weight; the sum of nats for their mean.
    """
    run, found = run_of("memory"), results("memory", "single")
    batch, state = toy.batch(run.model, 0, B, L), found.states[0]

    def mean_nats(params):
        nats = losses.batch_nats(run.model, params, batch)
        return nats.sum() / batch["weights"].sum()

    loss, grads = toy.quick_jit(jax.value_and_grad(mean_nats))(state.params)
    square = sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(found.losses[0], loss, rtol=1e-5)
    np.testing.assert_allclose(found.norms[0], square**0.5, rtol=1e-4)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=slow)])
def test_gradient_accumulation_equals_one_batch(count):
    """Microbatches of unequal weight, on one device.

    Mutation: `_accumulate` without its first part.
    """
    found, expected = results("memory", "single", count), results("memory", "single")
    assert_same_steps(found, expected)


def test_state_keeps_its_place():
    """After steps, tables and their moments lie as the specs say, an eighth each.

    Mutation: `out_specs` of the gradients P() under fsdp_tensor.
    """
    state = results("memory", "fsdp_tensor:model=2", 2).state
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
        specs = programs.check_fit(run, made)
        with made.activate():
            draw, abstract = programs.init_state(run, made, specs)
            state = draw()
        for x, a in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert (x.shape, x.dtype) == (a.shape, a.dtype)
        drawn.append(jax.device_get(state))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(near, *drawn)


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
        (
            {"code_bits": 2, "projection_options": {"extra_bits": 0}},
            "fsdp",
            "(8, 4, 16): 4 does not divide",
        ),
    ],
)
def test_what_does_not_divide_is_named(fields, mesh, message):
    """The field or the parameter, its size, the axis; before anything is traced.

    Mutations: only the batch checked; `_COMPUTED_BY_PARTS` not looked at, with which jax
    raises ValueError while it traces.
    """
    made = sharding.make(mesh)
    options = {"projection_options": {"extra_bits": 2}}
    fields = {"num_heads": 4, "vocab_size": 16} | options | fields
    batch_size = fields.pop("batch_size", 8)
    config = toy.model_config(**fields)
    names = model.param_specs(config)
    shapes = jax.eval_shape(lambda: model.init(config))
    with pytest.raises(ConfigError) as caught:
        sharding.validate(made, names, shapes, batch_size, config.num_heads)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"seq_len": 12}, "model.seq_len=12 does not divide over 8 devices along 'seq"),
        (
            {"mixer_options": {"logit_transform": "dape_v2"}},
            "logit_transform='dape_v2' cannot run over",
        ),
        (
            {"mixer_options": {"attention": "cudnn"}},
            "model.mixer_options.attention='cudnn' with logit_transform=",
        ),
        ({"mixer": "luna", "causal": False}, "causal=False sums over whole rows"),
        ({"recurrence": "rmt"}, "model.recurrence='rmt' carries a memory"),
        ({"projection_options": {"ngram_rows": 4}}, "the border of two devices"),
    ],
)
def test_what_cannot_run_over_a_sequence_axis_is_refused(fields, message):
    """Before anything is compiled, in one line; encoders of softmax may.

    Mutation: `check_sequence` not called by `partition_specs`.
    """
    made = sharding.make("sequence")
    with pytest.raises(ConfigError) as caught:
        model.partition_specs(toy.model_config(**{"seq_len": 16} | fields), made)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    model.partition_specs(toy.model_config(seq_len=16, causal=False), made)
