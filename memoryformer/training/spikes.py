"""Skip updates whose loss or gradient norm leaps out of the recent ones.

    spike  <=>  x > mean + sigmas * std,   x the loss or the gradient norm,

over the last `window` steps, once there have been that many. The values of a skipped step
enter the history too, so that a level that lasts is accepted in the end. The history is
part of the training state: a run that was stopped judges like one that was not.

`train.spikes` says what becomes of them; after OLMo's SkipStepOptimizer (window 128, 6 sigmas).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryformer.config import at_least, field
from memoryformer.notation import Array, Params


@dataclasses.dataclass(frozen=True)
class Keep:
    """Spikes are updates like others; the history that would tell them is kept."""

    sigmas, window = 0.0, 128


@dataclasses.dataclass(frozen=True)
class Skip:
    """Leave spikes out."""

    sigmas: float = field(
        "numbers", 6.0, doc="Deviations above the mean that make a spike; 0: none does."
    )
    window: int = field("numbers", 128, doc="Steps that these are taken over.")

    def __post_init__(self):
        at_least(self, "train.spikes_options", 0, "sigmas")
        at_least(self, "train.spikes_options", 2, "window")


KINDS = {"keep": Keep, "skip": Skip}


class SpikeState(NamedTuple):
    """The last losses and gradient norms, a ring."""

    values: Array  # [2, window] float32
    seen: Array  # int32, finite steps so far


def init(window: int) -> SpikeState:
    """Return an empty history."""
    return SpikeState(jnp.zeros((2, window), jnp.float32), jnp.zeros((), jnp.int32))


def is_spike(
    state: SpikeState, loss: Array, grad_norm: Array, sigmas: float
) -> Array | bool:
    """Whether this step leaps out of the history; never with `sigmas` 0."""
    if not sigmas:
        return False
    mean, std = jnp.mean(state.values, axis=1), jnp.std(state.values, axis=1)
    leaps = jnp.stack([loss, grad_norm]) > mean + sigmas * std
    return (state.seen >= state.values.shape[1]) & jnp.any(leaps)


def record(state: SpikeState, loss: Array, grad_norm: Array) -> SpikeState:
    """Return the history with this step in it, if its numbers are finite."""
    new = jnp.stack([loss, grad_norm])  # [2]
    finite = jnp.all(jnp.isfinite(new))
    window = state.values.shape[1]
    here = finite & (jnp.arange(window) == state.seen % window)  # [window]
    values = jnp.where(here[None, :], new[:, None], state.values)
    return SpikeState(values, state.seen + finite.astype(jnp.int32))


@jax.jit
def are_finite(params: Params) -> Array:
    """Whether every parameter is a finite number; asked before a state is saved.

    In the step the answer would keep the old and the new parameters in memory at once.
    """
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]))
