"""Heads that look at near tokens become recurrent: their ratio, what moves, the run that goes on.

Mutations tried by hand are named with the test that they turn red.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toy

from memoryformer import model
from memoryformer.convert import __main__ as command
from memoryformer.convert import recency, transfer
from memoryformer.errors import ConfigError
from memoryformer.model import mixers
from memoryformer.runs import metrics
from memoryformer.training import experiment, loop

WINDOW = 2


@functools.cache
def softmax_model(projection):
    config = toy.model_config(projection, num_heads=4, score="learned")
    return config, jax.device_get(toy.quick_jit(lambda: model.init(config))())


def logits(config, params):
    batch = toy.batch(config, batch_size=2)
    names = ("inputs", "segment_ids", "positions")
    forward = toy.quick_jit(lambda params, *args: model.forward(config, params, *args))
    real = batch["segment_ids"] != 0
    return np.asarray(forward(params, *(batch[name] for name in names)))[real]


def test_ratio_by_hand():
    """Of every head, token by token in float64, over packed documents and padding.

    Mutations: queries from w on; near tokens `<=` w; positions of the row; the first token of the
    row; padding counted among the outputs.
    """
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 12, 4, 5)).astype(np.float32)
    segments = np.array([[1] * 7 + [2] * 5, [0] + [3] * 9 + [0] * 2], np.int32)
    seq = mixers.SeqInfo(toy.positions(segments), segments)
    sums = toy.quick_jit(functools.partial(recency._of_heads, window=WINDOW))(
        q, k, v, jax.tree.map(jnp.asarray, seq)
    )
    near, first = np.zeros(4), np.zeros(4)
    for row, t, head in np.ndindex(2, 12, 4):
        document = np.flatnonzero(segments[row] == segments[row, t])
        seen = document[document <= t]
        if segments[row, t] and len(seen) > 2 * WINDOW:
            scores = k[row, seen, head].astype(np.float64) @ q[row, t, head] / 5**0.5
            weights = np.exp(scores) / np.exp(scores).sum()
            near[head] += weights[-WINDOW:].sum()
            first[head] += weights[-WINDOW:].sum() + weights[0]
    np.testing.assert_allclose(sums["near"], near, rtol=1e-5)
    np.testing.assert_allclose(sums["first"], first, rtol=1e-5)
    y = oracle.attention(*(x.astype(np.float64) for x in (q, k, v)), segments)
    np.testing.assert_allclose(sums["square"], (y**2).sum(axis=(0, 1, 3)), rtol=1e-5)


def test_a_head_that_looks_back_one_token_is_all_near():
    """A model whose first head sees nothing else, by its positions. Mutation: heads transposed."""
    config, params = softmax_model("dense")
    params = jax.tree.map(np.copy, params)
    qkv = params["blocks"]["1"]["mixer"]["qkv"]
    qkv["kernel"][:, :2, 4:8] = (
        0  # head 1: the same q and k everywhere, turned by 90 degrees
    )
    qkv["bias"][:2, 4:8] = 0
    frequency = 1.0
    qkv["bias"][1, 4], qkv["bias"][0, [4, 5]] = (
        200,
        (200 * np.cos(frequency), -200 * np.sin(frequency)),
    )
    config = dataclasses.replace(config, rotary_fraction=0.5)
    measured = recency.measure(config, params, [toy.batch(config, seq_len=12)], WINDOW)
    assert measured.ratio.shape == (2, 4)
    assert measured.ratio[1, 1] > 0.99
    assert measured.ratio.max() <= 1 + 1e-6
    assert np.all(measured.with_first >= measured.ratio)
    with pytest.raises(ConfigError, match=r"--window=6: no document .* 12 before it"):
        recency.measure(config, params, [toy.batch(config)], 6)


def test_which_heads():
    """Shares over all layers, a threshold that may be met, ties in order. Mutation: per layer."""
    ratio = np.array([[0.9, 0.2], [0.8, 0.9]])
    for share, threshold, chosen in (
        (0.5, None, [[1, 0], [0, 1]]),
        (0.25, None, [[1, 0], [0, 0]]),
        (0.0, None, [[0, 0], [0, 0]]),
        (0.0, 0.8, [[1, 0], [1, 1]]),
    ):
        got = recency.choose(ratio, share, threshold)
        np.testing.assert_array_equal(got, np.array(chosen, bool))


@pytest.mark.parametrize("projection", ["memory", "dense"])
def test_no_head_replaced(projection):
    """Softmax, bit for bit, with the same parameters. Mutation: another order of draws."""
    config, params = softmax_model(projection)
    none = np.zeros((2, 4), bool)
    same, moved = recency.convert(config, params, none, np.ones((2, 4)), 16)
    assert same.mixer == "recurformer" and same.mixer_options.recurrent_heads == (0, 0)
    jax.tree.map(np.testing.assert_array_equal, moved, params)
    np.testing.assert_array_equal(logits(same, moved), logits(config, params))


@pytest.mark.parametrize(
    "projection", ["memory", pytest.param("dense", marks=pytest.mark.slow)]
)
def test_heads_in_another_order(projection):
    """Stored in another order and put back: no logit changes.

    Mutations: the inverse of the order; the places of another layer.
    """
    config, params = softmax_model(projection)
    order = np.array([2, 0, 3, 1, 1, 3, 0, 2])
    options = {"recurrent_heads": (0,), "head_order": tuple(map(int, order))}
    permuted = dataclasses.replace(config, mixer="recurformer", mixer_options=options)
    moved = jax.tree.map(np.copy, params)
    for i in range(2):
        qkv = moved["blocks"][str(i)]["mixer"]["qkv"]
        for name, array in qkv.items():
            if array.ndim:
                heads = array.reshape(*array.shape[:-1], 4, 4)
                heads = heads[..., order[4 * i : 4 * i + 4], :]
                qkv[name] = heads.reshape(array.shape)
    np.testing.assert_array_equal(logits(permuted, moved), logits(config, params))


@pytest.mark.parametrize(
    "projection", ["memory", pytest.param("dense", marks=pytest.mark.slow)]
)
def test_kept_heads_are_as_they_were(projection):
    """A silenced head says the same in both: with V of 0 there, and with a scale of 0 here.

    Mutations: columns of the replaced heads kept; the output in stored order.
    """
    config, params = softmax_model(projection)
    chosen = np.array([[0, 1, 0, 1], [1, 1, 1, 1]], bool)
    silent = jax.tree.map(np.copy, params)
    for i, row in enumerate(chosen):
        for array in silent["blocks"][str(i)]["mixer"]["qkv"].values():
            if array.ndim:
                array[..., 2, :] *= np.repeat(~row, 4)
    converted, moved = recency.convert(config, params, chosen, np.zeros((2, 4)), 16)
    assert converted.mixer_options.recurrent_heads == (2, 4)
    np.testing.assert_allclose(
        logits(converted, moved), logits(config, silent), atol=1e-6
    )
    # What a recurrent head begins with.
    layer = moved["blocks"]["0"]["mixer"]["recurrent"]
    name = "tables" if projection == "memory" else "kernel"
    theirs = params["blocks"]["0"]["mixer"]["qkv"][name]
    ours = layer["inputs"][name].reshape(*theirs.shape[:-2], 2, 17)
    np.testing.assert_array_equal(ours[..., 1, :4], theirs[..., 0, 12:])
    np.testing.assert_array_equal(ours[..., 0, 4:8], theirs[..., 1, 4:8])
    np.testing.assert_array_equal(ours[..., 0, 8:12], theirs[..., 2, 4:8])
    assert not ours[..., 12:].any()
    step = np.log1p(np.exp(layer["ssd"]["dt_bias"]))
    np.testing.assert_allclose(
        np.exp(-step * np.exp(layer["ssd"]["a_log"])), 15 / 16, rtol=1e-5
    )


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    """A trained run is measured, converted, and goes on; a broken write leaves nothing.

    Mutations: the folder filled in place; the model's config as it was; another tokenizer.
    """
    workdir = toy.trained(tmp_path, **{"train.num_steps": 2, "eval.every_steps": 0})
    out = tmp_path / "converted"
    words = ["convert", "recency", f"--workdir={workdir}", "--window=3", "--batches=1"]
    with pytest.raises(SystemExit, match="0"):
        command.main(words)
    assert capsys.readouterr().out.count("| softmax |") == 1 and not out.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer.step_lib, "new_state", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recency.convert_run(workdir, out, window=3, batches=1)
    assert not out.exists()
    with pytest.raises(SystemExit, match="0"):
        command.main([*words, f"--output={out}"])
    report = json.loads((out / recency.REPORT).read_text("utf-8"))
    assert np.sum(report["recurrent"]) == 1 and report["window"] == 3
    run, _, facts = experiment.load(out)
    assert facts["step"] == 0 and run.model.mixer_options.recurrent_heads == (1,)
    options = {f"model.mixer_options.{name}": getattr(run.model.mixer_options, name)
               for name in ("recurrent_heads", "head_order")}  # fmt: skip
    fields = {"train.num_steps": 2, "eval.every_steps": 0, "model.mixer": "recurformer"}
    loop.train(toy.run_config(tmp_path, **fields | options), out)
    assert metrics.read(out)[-1]["step"] == 2
    with pytest.raises(ConfigError, match="holds"):
        recency.convert_run(workdir, out, window=3, batches=1)
    with pytest.raises(ConfigError, match="'recurformer': only a causal softmax model"):
        recency.convert_run(out)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--share=0.5"], "--workdir=RUN: missing"),
        (["--workdir=x", "--tables=int8"], "--tables: recency does not look at it"),
        (
            ["--workdir=x", "--share=1", "--threshold=0.5"],
            "--share: --threshold chooses",
        ),
        (["--workdir=x", "--share=nan"], "--share=nan: must be from 0 to 1"),
        (["--workdir=x", "--threshold=nan"], "--threshold=nan: must be from 0 to 1"),
        (["export", "a", "b", "--window=3"], "--window: only recency looks at it"),
    ],
)
def test_what_the_command_refuses(words, message, capsys):
    """One line each, exit code 2. Mutation: a check left out."""
    first = [] if words[0] == "export" else ["recency"]
    with pytest.raises(SystemExit) as ended:
        command.main(["convert", *first, *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
