"""Codes of memory layers come out of every loop as they are, and cost nothing unless asked for."""

import functools

import jax
import numpy as np
import pytest
import toy

from memoryformer import model
from memoryformer.evaluation import buckets
from memoryformer.model import codes, losses, mixers

LOOPS = {
    "chunks": {"sequence_chunk": 5},
    "remat": {"remat": "full"},
    "scan": {"scan_layers": True},
    "all": {"scan_layers": True, "remat": "codes", "sequence_chunk": 4},
}


def read_codes(config, params, batch):
    return toy.quick_jit(lambda p: buckets.codes(config, p, batch))(params)


@functools.cache
def of_no_loop():
    """Parameters, a batch, and its codes where nothing loops."""
    plain = toy.model_config()
    params, batch = model.init(plain), toy.batch(plain, batch_size=2)
    return params, batch, read_codes(plain, params, batch)


@pytest.mark.parametrize("loops", LOOPS)
def test_loops_do_not_change_them(loops):
    """Of two layers, in a scan, computed again, by chunks that do not divide the row.

    Mutation: `give` left out of the stack; the padding of the last chunk kept.
    """
    params, batch, expected = of_no_loop()
    read = read_codes(toy.model_config(**LOOPS[loops]), params, batch)
    assert read.keys() == expected.keys() and len(read) == 6
    for path, theirs in expected.items():
        assert theirs.shape[:2] == batch["inputs"].shape
        np.testing.assert_array_equal(read[path], theirs)


def _looped_outputs(jaxpr):
    """Types of what loops and checkpoints put out, at any depth."""
    for equation in jaxpr.eqns:
        inner = [getattr(p, "jaxpr", p) for p in equation.params.values()]
        inner = [p for p in inner if hasattr(p, "eqns")]
        if inner and equation.primitive.name in ("scan", "checkpoint", "remat2"):
            yield from (out.aval.dtype for out in equation.outvars)
        for part in inner:
            yield from _looped_outputs(part)


def test_a_model_that_is_not_asked_returns_none():
    """No integer leaves a loop of the loss; it does where codes are asked for.

    Mutation: `keeps_codes = True` in every layer.
    """
    config = toy.model_config(**LOOPS["all"])
    params, batch = model.init(config), toy.batch(config, batch_size=2)
    loss = jax.make_jaxpr(lambda p: losses.batch_nats(config, p, batch))(params)
    asked = jax.make_jaxpr(lambda p: buckets.codes(config, p, batch))(params)
    integers = [
        [dtype for dtype in _looped_outputs(traced.jaxpr) if dtype == np.int32]
        for traced in (loss, asked)
    ]
    assert not integers[0] and integers[1]


def test_what_is_taken_is_gone():
    """Mutation: `taken` that leaves the codes where they are."""
    config = toy.model_config()
    batch = toy.batch(config, batch_size=2)

    def read(params, batch):
        network = model.merge(config, params)
        seq = mixers.SeqInfo(batch["positions"], batch["segment_ids"])
        by_layer = codes.of_tokens(network, batch["inputs"], seq)
        assert by_layer and not codes.taken(network)

    jax.eval_shape(read, toy.numpy_params(config), batch)


def test_codes_beside_memory_tokens_are_those_of_the_text():
    """The first layer hashes each token alone, with a memory before the chunk or none.

    Mutation: `before` of `recurrence.rmt` left at 0.
    """
    options = {"chunk_size": 4, "num_slots": 3}
    config = toy.model_config(recurrence="rmt", recurrence_options=options)
    plain, name = toy.model_config(), "blocks.0.mixer.qkv"
    params, batch = model.init(config), toy.batch(config, batch_size=2)
    read = read_codes(config, params, batch)[name]
    trunk = {key: part for key, part in params.items() if key != "recurrence"}
    real = batch["segment_ids"] > 0
    expected = read_codes(plain, trunk, batch)[name]
    np.testing.assert_array_equal(np.asarray(read)[real], np.asarray(expected)[real])
