"""Learning rates over the steps, as fractions of the peak.

    constant   rise(t)
    cosine     rise(t) (e + (1 - e) (1 + cos(pi d)) / 2),   d = (t - warmup) / (horizon - warmup)
    wsd        rise(t) (e + (1 - e) (1 - d)),               d over the last part of the horizon

`rise(t) = min((t + 1) / warmup, 1)`: the last update of the warm-up has the peak, and none
has rate 0. d is held between 0 and 1: from the horizon on the rate stays at e.

These are optax's `join_schedules` of a linear one and a cosine, which round the last bit of
one step in four otherwise: runs would not go on bit for bit as they began.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from memoryformer.config import at_least, field
from memoryformer.errors import ConfigError
from memoryformer.notation import Array

_NAME = "optimizer.schedule_options"


@dataclasses.dataclass(frozen=True)
class Constant:
    """The peak to the end."""


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Half a wave, from the end of the warm-up to the horizon."""

    decay_steps: int = field(
        "numbers", 0, doc="Horizon of the schedule in steps; 0: train.num_steps."
    )
    end_fraction: float = field(
        "numbers", 0.1, doc="Floor of the schedule, as a fraction of the peak."
    )

    def __post_init__(self):
        at_least(self, _NAME, 0, "decay_steps")
        if not 0 <= self.end_fraction <= 1:
            raise ConfigError(
                f"{_NAME}.end_fraction={self.end_fraction}: must be in [0, 1]."
            )


@dataclasses.dataclass(frozen=True)
class Wsd(Cosine):
    """Warm up, stay, decay: a line over the last part of the horizon."""

    cooldown_fraction: float = field(
        "numbers", 0.2, doc="Last part of the horizon, in which the rate falls."
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.cooldown_fraction <= 1:
            value = self.cooldown_fraction
            raise ConfigError(f"{_NAME}.cooldown_fraction={value}: must be in (0, 1].")


SCHEDULES = {"cosine": Cosine, "constant": Constant, "wsd": Wsd}


RelativeRate = Callable[[Array | int], Array]  # step -> learning rate / peak


def relative_rate(options: Any, warmup: int, num_steps: int) -> RelativeRate:
    """Return `step -> learning rate / peak`; step 0 is the first.

    options: of one of `SCHEDULES`. Raises `ConfigError` where the warm-up does not fit.
    """

    def rise(step: Array | int) -> Array:
        return jnp.minimum((jnp.asarray(step, jnp.float32) + 1) / max(warmup, 1), 1.0)

    if isinstance(options, Constant):
        return rise
    horizon = options.decay_steps or num_steps
    if warmup >= horizon:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup}: must be below the schedule's horizon of "
            f"{horizon} steps ({_NAME}.decay_steps, or train.num_steps where that is 0)."
        )
    # The first step that is below the peak.
    start, is_wave = warmup, not isinstance(options, Wsd)
    if not is_wave:
        start = max(warmup, round(horizon * (1 - options.cooldown_fraction)))
    length = max(horizon - start, 1)  # of the fall, in steps

    def relative(step: Array | int) -> Array:
        done = jnp.clip((jnp.asarray(step, jnp.float32) - start) / length, 0.0, 1.0)
        left = 0.5 * (1 + jnp.cos(jnp.pi * done)) if is_wave else 1 - done
        return rise(step) * (options.end_fraction + (1 - options.end_fraction) * left)

    return relative
