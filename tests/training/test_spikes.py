"""The spike rule, on numbers."""

import jax.numpy as jnp
import numpy as np

from memoryformer.training import spikes


def filled(values, window=4):
    state = spikes.init(window)
    for loss, norm in values:
        state = spikes.record(state, jnp.float32(loss), jnp.float32(norm))
    return state


def is_spike(state, loss, norm, sigmas=3.0):
    return bool(spikes.is_spike(state, jnp.float32(loss), jnp.float32(norm), sigmas))


def test_leaps_of_either_number_are_spikes():
    """mean 2, deviation 1: above 5 is a spike, in either number, and never below.

    Mutation: look at the loss alone; or take the absolute difference.
    """
    state = filled([(1, 3), (3, 1), (1, 3), (3, 1)])
    assert not is_spike(state, 4.9, 4.9)
    assert is_spike(state, 5.1, 2) and is_spike(state, 2, 5.1)
    assert not is_spike(state, -100, 0)
    assert not is_spike(state, 100, 100, sigmas=0.0)  # off


def test_nothing_is_judged_before_the_window_is_full():
    """Mutation: drop the comparison with `seen`."""
    assert not is_spike(filled([(1, 1)] * 3), 100, 100)
    assert is_spike(filled([(1, 1)] * 4), 100, 100)


def test_the_oldest_value_goes_and_nan_never_comes():
    """Mutation: `seen` counts a step that is not finite; or index 0 always."""
    state = filled([(1, 1), (2, 2), (np.nan, 3), (3, np.inf), (4, 4), (5, 5), (6, 6)])
    assert sorted(np.asarray(state.values)[0].tolist()) == [2, 4, 5, 6]
    assert int(state.seen) == 5


def test_a_level_that_lasts_is_accepted():
    """Mutation: record only what was taken."""
    state = filled([(1, 1)] * 4)
    verdicts = []
    for _ in range(5):
        verdicts.append(is_spike(state, 9, 9, sigmas=2.0))
        state = spikes.record(state, jnp.float32(9), jnp.float32(9))
    assert verdicts[0] and not verdicts[-1]


def test_at_the_edge_and_of_two_sizes():
    """What equals the bound is none; the window is counted in steps, not numbers.

    Mutations: `>=` for `>`; `and` for either number; the other axis.
    """
    state = filled([(1, 3), (3, 1), (1, 3), (3, 1)])
    assert not is_spike(state, 5, 5)
    assert not is_spike(filled([(1, 1)] * 2, window=3), 9, 9)
    assert is_spike(filled([(1, 1)] * 3, window=3), 9, 0)
    assert spikes.init(7).values.shape == (2, 7)


def test_parameters_that_are_no_numbers():
    """In any leaf. Mutation: the last leaf alone."""
    good = {"a": jnp.ones(3), "b": jnp.zeros((2, 2))}
    assert spikes.are_finite(good)
    for bad in (jnp.nan, jnp.inf):
        assert not spikes.are_finite(good | {"a": jnp.array([1.0, bad, 1.0])})
