"""Learning rates over the steps, as fractions of the peak.

    constant   rise(t)
    cosine     rise(t) (e + (1 - e) (1 + cos(pi d)) / 2),   d = (t - warmup) / (horizon - warmup)
    wsd        rise(t) (e + (1 - e) (1 - d)),               d over the last part of the horizon

`rise(t) = min((t + 1) / warmup, 1)`: the last update of the warm-up has the peak, and none
has rate 0. d is held between 0 and 1: from the horizon on the rate stays at e.

These are optax's `join_schedules` of a linear one and a cosine, which round the last bit of
one step in four otherwise: runs would not go on bit for bit as they began.
"""

from collections.abc import Callable

import jax.numpy as jnp

from memoryformer.notation import Array

SCHEDULES = ("cosine", "constant", "wsd")


def relative_rate(
    schedule: str,
    warmup: int,
    horizon: int,
    end_fraction: float,
    cooldown_fraction: float,
) -> Callable[[Array | int], Array]:
    """Return `step -> learning rate / peak` of one of `SCHEDULES`; step 0 is the first."""
    # The first step that is below the peak, and how many steps the fall takes.
    start = warmup
    if schedule == "wsd":
        start = max(warmup, round(horizon * (1 - cooldown_fraction)))
    length = max(horizon - start, 1)

    def relative(step: Array | int) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        done = jnp.clip((step - start) / length, 0.0, 1.0)
        if schedule == "constant":
            return rise
        left = 1 - done
        if schedule == "cosine":
            left = 0.5 * (1 + jnp.cos(jnp.pi * done))
        return rise * (end_fraction + (1 - end_fraction) * left)

    return relative
