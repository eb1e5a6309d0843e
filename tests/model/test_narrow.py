"""Weights stored narrower: what decoding and evaluation make of them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import cli, errors, model
from memoryformer.generation import sampler
from memoryformer.model import narrow
from memoryformer.ops.lookup import narrow as narrow_rows
from memoryformer.training import evaluate_run

INT8 = narrow.WeightKinds("int8", "int8", "int8")


def greedy(config, params, kinds, prompts, max_tokens=20):
    generator = sampler.Generator(config, params, kinds)
    sampling = sampler.SamplingConfig(max_tokens=max_tokens, temperature=0.0)
    return np.array(list(generator.stream_batch(prompts, sampling)))


@pytest.mark.parametrize("projection", ["memory", "dense"])
def test_decoding_with_narrow_weights_is_the_forward_pass_of_rounded_ones(projection):
    """More tokens than one call of the loop. Red if a scale is lost, the loop's calls do
    not join, or `round_weights` rounds other leaves than `prepare`."""
    config = toy.model_config(projection, seq_len=40, lookup="auto")
    params = model.init(config, 3)
    prompts = [[5, 1, 7], [2, 2, 4]]
    tokens = greedy(config, params, INT8, prompts, sampler.LOOP + 4).T
    rounded = narrow.round_weights(config, params, INT8)
    whole = np.concatenate([prompts, tokens], axis=1)
    logits = toy.forward(config, rounded, whole)
    np.testing.assert_array_equal(logits[:, 2:-1].argmax(-1), tokens)


def test_only_weights_are_packed():
    """Tables, head and kernels, each as asked; norms, biases and embedding stay. Red if
    the head is stored as the dense layers are."""
    kinds = narrow.WeightKinds("int8", "int4", "bfloat16")
    config = toy.model_config("dense")
    stored = narrow.prepare(config, model.init(config), kinds)
    assert stored["head"]["kernel"].values.dtype == jnp.uint8
    block = stored["blocks"]["0"]
    assert block["ffn"]["up"]["kernel"].values.dtype == jnp.bfloat16
    assert block["norm1"]["scale"].dtype == stored["embed"]["embedding"].dtype
    config = toy.model_config("memory")
    stored = narrow.prepare(config, model.init(config), kinds)
    tables = stored["blocks"]["1"]["mixer"]["qkv"]["tables"]
    assert (
        isinstance(tables, narrow_rows.PackedTables) and tables.values.dtype == jnp.int8
    )
    again = narrow.prepare(config, stored, narrow.WeightKinds())
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, stored, again))


@pytest.mark.parametrize("density", [1.0, 0.5, 0.25])
def test_pruning_keeps_the_largest(density):
    """Red if the smallest are kept, the head is pruned, or the count is of all weights."""
    config = toy.model_config("dense")
    params = model.init(config)
    pruned, operations = narrow.prune(config, params, density)
    before = np.abs(np.asarray(params["blocks"]["0"]["ffn"]["up"]["kernel"]))
    after = np.abs(np.asarray(pruned["blocks"]["0"]["ffn"]["up"]["kernel"]))
    assert np.count_nonzero(after) == round(density * before.size)
    if density < 1:
        assert after[after > 0].min() >= before[after == 0].max()
    assert pruned["head"]["kernel"] is params["head"]["kernel"]
    share = operations["effective_multiply_adds"] / operations["multiply_adds"]
    assert share == pytest.approx(density)


def test_what_cannot_be_stored_is_refused():
    """Red if a typo is taken for float32."""
    for fields, message in (
        ({"tables": "int4"}, "--tables"),
        ({"head": "int9"}, "--head"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            narrow.WeightKinds(**fields)
    with pytest.raises(errors.ConfigError, match="--density"):
        narrow.prune(toy.model_config("dense"), {}, 0.0)


@pytest.mark.parametrize("function", [narrow.prepare, narrow.round_weights])
def test_a_head_that_is_the_embedding_is_not_said_to_be_narrow(function):
    """Red if --head does nothing where embeddings are tied."""
    config = toy.model_config(tie_embeddings=True)
    params = model.init(config)
    with pytest.raises(errors.ConfigError, match=r"--head=int8: with model\.tie"):
        function(config, params, narrow.WeightKinds(head="int8"))
    function(config, params, narrow.WeightKinds(tables="int8"))


def test_int8_tables_cost_next_to_nothing(tmp_path):
    """A trained toy: the loss moves by less than 0.002 nats, and says what it is of. Red if
    one scale serves all rows of a layer, or the weights are not rounded at all."""
    workdir = toy.trained(tmp_path)
    float32 = evaluate_run.evaluate_checkpoint(workdir)
    kinds = narrow.WeightKinds("int8", "int8")
    int8 = evaluate_run.evaluate_checkpoint(workdir, kinds=kinds)
    assert 0 < abs(int8["val/loss"] - float32["val/loss"]) < 0.002
    assert int8["weights"] == dataclasses.asdict(kinds)


def test_what_is_altered_is_said():
    """Nothing unless it is asked for. Mutations: `==` for `!=`; `is` for `is not`."""
    config = toy.model_config("dense")
    params = jax.tree.map(np.asarray, model.init(config))
    same, told = narrow.altered(config, params, None, 1)
    assert same is params and told == {}
    half, told = narrow.altered(config, params, None, 0.5)
    assert set(told) == {"multiply_adds", "effective_multiply_adds"}
    assert told["effective_multiply_adds"] * 2 == told["multiply_adds"]
    sizes = {
        name: weights.size
        for name, weights in zip(
            map(jax.tree_util.keystr, dict(jax.tree.leaves_with_path(params))),
            jax.tree.leaves(params),
            strict=True,
        )
        if "kernel" in name and "head" not in name
    }
    assert told["multiply_adds"] == sum(sizes.values())
    kinds = narrow.WeightKinds(dense="int8")
    rounded, told = narrow.altered(config, half, kinds, 1)
    assert told == {
        "weights": {"tables": "float32", "head": "float32", "dense": "int8"}
    }
    up = [tree["blocks"]["0"]["ffn"]["up"]["kernel"] for tree in (half, rounded)]
    assert 0 < np.abs(up[0] - up[1]).max() <= np.abs(up[0]).max() / 127
    _, told = narrow.altered(config, params, kinds, 0.5)
    assert len(told) == 3
    tiny, counts = narrow.prune(config, params, 1e-9)
    assert counts["effective_multiply_adds"] == 0
    assert not tiny["blocks"]["0"]["ffn"]["up"]["kernel"].any()
    assert tiny["head"]["kernel"].any()
    for density in (0.0, 1.1, -0.5):
        with pytest.raises(
            errors.ConfigError, match=f"--density={density}: must be in"
        ):
            narrow.prune(config, params, density)
    for field in ("tables", "head", "dense"):
        with pytest.raises(errors.ConfigError, match=f"--{field}='x'"):
            narrow.WeightKinds(**{field: "x"})


def test_flags_that_say_nothing_are_none(monkeypatch):
    """Mutation: `!=` for `==`."""
    values = {"tables": "float32", "head": "float32", "dense": "float32"}

    def flags():
        return {k: types.SimpleNamespace(value=v) for k, v in values.items()}

    monkeypatch.setattr(cli.flags, "FLAGS", flags())
    assert cli.chosen(narrow.WeightKinds) is None
    values["head"] = "int4"
    monkeypatch.setattr(cli.flags, "FLAGS", flags())
    assert cli.chosen(narrow.WeightKinds) == narrow.WeightKinds(head="int4")
