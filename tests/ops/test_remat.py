"""What layers keep for the gradient, and how they are looped over, changes no result."""

import functools
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import errors, model, sharding
from memoryformer.model import losses, mixers
from memoryformer.ops import remat as remat_lib

slow = pytest.mark.slow
VARIANTS = [("codes", True), ("full", False)]
VARIANTS += [("none", True), ("projections", False), ("projections", True)]
CASES = [
    ("memory", *VARIANTS[0]),
    ("memory", *VARIANTS[1]),
    ("dense", *VARIANTS[4]),
    *(pytest.param("memory", *variant, marks=slow) for variant in VARIANTS[2:]),
    *(pytest.param("dense", *variant, marks=slow) for variant in VARIANTS[:4]),
]


def config_of(projection, remat="none", scan=False, **fields):
    fields = {"score": "softmax", "num_layers": 3} | fields
    return toy.model_config(projection, remat=remat, scan_layers=scan, **fields)


@functools.cache
def results(projection, remat="none", scan=False):
    """Nats and gradients of one batch."""
    config = config_of(projection, remat, scan)
    params = toy.quick_jit(lambda: model.init(config_of(projection), 1))()
    batch = jax.tree.map(jnp.asarray, toy.batch(config, batch_size=4))

    def loss(params):
        return jnp.sum(losses.batch_nats(config, params, batch))

    return toy.quick_jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("projection, remat, scan", CASES)
def test_same_loss_and_gradients(projection, remat, scan):
    """Also the same tree of parameters. Mutations: the stack reversed; a layer skipped."""
    loss, grads = results(projection, remat, scan)
    expected_loss, expected = results(projection)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for path, theirs in jax.tree.leaves_with_path(expected):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, grads)
        bound = 1e-5 * max(np.abs(theirs).max(), 1e-6)
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path)
        )


def sent(mesh, remat, scan=False, **fields):
    """Collectives of a training step as it is written: {kind: count}."""
    config = config_of("memory", remat, scan, num_layers=1, seq_len=16, **fields)
    made = sharding.make(mesh)
    specs = model.partition_specs(config, made)

    def gradients(params, batch):
        def loss(params):
            return jnp.sum(losses.batch_nats(config, params, batch))

        return jax.grad(loss)(params)

    def placed(tree, shardings):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            shardings,
        )

    shapes = jax.eval_shape(lambda: model.init(config))
    shapes = placed(shapes, made.named(specs))
    batch = toy.batch(config, batch_size=8, seq_len=16)
    batch = placed(batch, dict.fromkeys(batch, made.named(made.specs.batch_bl)))
    mapped = made.shard_map(gradients, (specs, made.specs.batch_bl), specs)
    with made.activate():
        text = jax.jit(mapped).lower(shapes, batch).as_text()
    return {
        kind: len(re.findall(rf"stablehlo.{kind}\b", text))
        for kind in ("all_gather", "collective_permute")
    }


def test_codes_and_what_the_ring_read_are_not_sent_twice():
    """`codes` gathers as often as `none`, and goes round the ring as often; `full` more.

    Mutations: `depth.name` of the codes left out; that of the ring's log-sums.
    """
    none, codes, full = (
        sent("tensor:model=2,sequence=2", remat, vocab_size=16)
        for remat in ("none", "codes", "full")
    )
    assert none == codes
    assert all(full[kind] > count > 0 for kind, count in codes.items())


def test_a_scan_compiles_one_layer():
    """The text of the program does not grow with depth. Mutation: `scan` not passed on."""

    def size(num_layers, scan):
        config = config_of("memory", scan=scan, num_layers=num_layers)
        params = jax.eval_shape(lambda: model.init(config))
        tokens = jax.ShapeDtypeStruct((1, 12), jnp.int32)
        forward = jax.jit(lambda p, t: model.forward(config, p, t))
        return len(forward.lower(params, tokens).as_text())

    assert size(8, True) < 1.5 * size(2, True)
    assert size(8, False) > 2 * size(2, False)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"remat": "ful"}, "model.remat='ful': unknown choice; did you mean 'full'?"),
        (
            {"recurrence": "rmt", "remat": "full"},
            "model.recurrence='rmt': runs blocks in its own loop",
        ),
    ],
)
def test_refused_in_one_line(fields, message):
    """Mutation: `validate_stack` not called."""
    with pytest.raises(errors.ConfigError) as caught:
        toy.model_config(**fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert remat_lib.REMAT[0] == model.ModelConfig(8, 8, 1, 1, 8).remat == "none"


def names_in(jaxpr):
    """Every name that `depth.name` has given, inside loops and calls too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            found.add(equation.params["name"])
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= names_in(inner)
    return found


@pytest.mark.parametrize("mixer", mixers.MIXERS)
def test_what_is_kept_exists(mixer):
    """Without a mesh too: keeping a name that nothing has would act as `full`, silently.

    Mutation tried: `attended` named by ring attention alone (red for every mixer).
    """
    config = config_of("memory", mixer=mixer, num_layers=1)
    params = jax.eval_shape(lambda: model.init(config))
    tokens = jax.ShapeDtypeStruct((1, 12), jnp.int32)
    traced = jax.make_jaxpr(lambda p, t: model.forward(config, p, t))(params, tokens)
    assert names_in(traced.jaxpr) == set(remat_lib.NAMES)


@pytest.mark.parametrize("remat", ["codes", "full"])
def test_attention_is_kept_once(remat):
    """`codes` keeps what a mixer read, [B, L, H, E], and `full` does not.

    Mutation tried: "attended" left out of `_CODES`.
    """
    config = config_of("dense", remat, num_layers=1)
    params = jax.eval_shape(lambda: model.init(config))
    batch = jax.tree.map(jnp.asarray, toy.batch(config, batch_size=4))
    kept = jax.eval_shape(
        lambda p: jax.vjp(lambda p: losses.batch_nats(config, p, batch), p)[1],
        params,
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    assert shapes.count((4, 12, 2, 8)) == (remat == "codes")


def test_two_passes_are_kept_apart(monkeypatch):
    """By a scan itself, otherwise by jax; nothing is computed again unless asked.

    Mutations: `not` left out; either default of `apply`; a layer of a loop told that it is
    scanned.
    """
    seen = []

    def checkpoint(layer, *, policy, prevent_cse):
        seen.append(prevent_cse)
        return layer

    monkeypatch.setattr(remat_lib.jax, "checkpoint", checkpoint)
    layers, params = (
        [lambda own, x: (own * x, None)] * 2,
        [jnp.float32(2), jnp.float32(3)],
    )
    x = jnp.ones(3)
    for how, kept in (
        ({}, []),
        ({"scan": True}, []),
        ({"remat": "full"}, [True, True]),
        ({"remat": "full", "scan": True}, [False]),
    ):
        np.testing.assert_array_equal(
            remat_lib.apply(layers, params, x, **how)[0], np.full(3, 6.0)
        )
        assert seen == kept
        seen.clear()
    remat_lib.rematerialise(layers[0], "codes")
    assert seen == [True]
    with pytest.raises(ValueError, match="'x': no policy keeps it; known: codes"):
        remat_lib.name(x, "x")
