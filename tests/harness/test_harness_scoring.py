"""Scoring windows: equals a plain loop, depends on nothing but the window."""

import jax
import numpy as np
import pytest

from memoryformer import errors, model
from memoryformer.harness import scoring

SEQ_LEN = 48


@pytest.fixture(scope="module")
def setup():
    config = model.ModelConfig(
        vocab_size=61,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        seq_len=SEQ_LEN,
        code_bits=4,
        mixer_std=0.5,
        ffn_std=0.5,
        head_std=1.0,
    )
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(2, SEQ_LEN + 1, 70), 1, 32, 33, SEQ_LEN]
    windows = [
        scoring.Window(
            rng.integers(0, 61, size + 1).tolist(), int(rng.integers(0, size + 1))
        )
        for size in map(int, sizes)
    ]
    return config, model.init(config), windows


def one_device(config, params, **kwargs):
    return scoring.Scorer(config, params, devices=jax.local_devices()[:1], **kwargs)


def assert_bitwise(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        np.testing.assert_array_equal(a.greedy, b.greedy)


def test_equals_a_plain_loop(setup):
    """One window at a time through `forward`, unpadded: <= 1e-5 a token, same argmax.

    Red when targets are off by one, when padding is attended to, or when positions start
    elsewhere than 0.
    """
    config, params, windows = setup
    scorer = one_device(config, params)
    scores = scorer.score(windows)
    forward = jax.jit(lambda tokens: model.forward(config, params, tokens))
    for (tokens, num_scored), score in zip(windows, scores, strict=True):
        padded = np.zeros((1, SEQ_LEN), np.int32)  # causal: what follows is not seen
        padded[0, : len(tokens) - 1] = tokens[:-1]
        logits = np.asarray(forward(padded), np.float64)[0, : len(tokens) - 1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        first = len(tokens) - 1 - num_scored
        expected = [logprobs[i, tokens[i + 1]] for i in range(first, len(tokens) - 1)]
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
        greedy = logits[first:].argmax(-1) == tokens[first + 1 :]
        np.testing.assert_array_equal(score.greedy, greedy)
    assert scorer.shapes == {32, 48}


def test_batch_size_order_and_neighbours_change_nothing(setup):
    """Bitwise on one device.

    Red when the rows of one group follow the batch size, or when a window is padded to the
    longest beside it.
    """
    config, params, windows = setup
    scorer = one_device(config, params)
    scores = scorer.score(windows)
    for batch_size in (1, 100):
        assert_bitwise(
            one_device(config, params, batch_size=batch_size).score(windows), scores
        )
    order = np.random.default_rng(1).permutation(len(windows))
    shuffled = scorer.score([windows[i] for i in order])
    assert_bitwise(shuffled, [scores[i] for i in order])
    assert_bitwise(scorer.score(windows[:3]), scores[:3])
    assert_bitwise(scorer.score(windows[-1:]), scores[-1:])


@pytest.mark.parametrize("num_devices", [3, 8])
def test_devices_change_nothing(setup, num_devices):
    """Within 1e-5 across device counts, rows that do not divide included.

    Red when a device scores another's groups.
    """
    config, params, windows = setup
    devices = jax.local_devices()[:num_devices]
    actual = scoring.Scorer(config, params, devices=devices).score(windows)
    for a, b in zip(actual, one_device(config, params).score(windows), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(a.greedy, b.greedy)


def test_shapes_are_bounded_and_reused(setup):
    """At most six lengths whatever the model's, and no more programs than lengths.

    Red when a partly filled batch compiles a program of its own.
    """
    for seq_len in (8, 32, 100, 512, 2048, 100_000):
        found = scoring.lengths(seq_len)
        assert (
            len(found) <= 6
            and found[-1] == seq_len
            and sorted(set(found)) == list(found)
        )
    config, params, windows = setup
    scorer = one_device(config, params, batch_size=1)
    for count in (1, 2, len(windows)):
        scorer.score(windows[:count])
    assert scorer._call._cache_size() == len(scorer.shapes) <= 2


@pytest.mark.parametrize(
    ("tokens", "num_scored"), [([1] * (SEQ_LEN + 2), 1), ([1, 2], 2), ([1, 61], 1)]
)
def test_impossible_windows_are_refused(setup, tokens, num_scored):
    """Too long, nothing to predict from, foreign tokens: `DataError`.

    Red when a window is cut, or an id is clipped, without a word.
    """
    config, params, _ = setup
    with pytest.raises(errors.DataError):
        one_device(config, params).score([scoring.Window(tokens, num_scored)])
