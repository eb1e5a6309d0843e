"""What every device that holds weights is, and the two plainest. Start at `Device`."""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.notation import Float

ROLES = ("tables", "dense", "head")
TABLE_SCALES = ("table", "column")
Cells = Float[np.ndarray, "*shape"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What holds weights. roles: which; table_scale: what w_max of tables is the largest of."""

    roles: tuple[str, ...] = ROLES
    table_scale: str = "table"
    NAME: ClassVar[str] = "ideal"

    @property
    def exact(self) -> bool:
        """Whether every weight stays as it is, to the bit."""
        return False

    def __post_init__(self):
        for role in self.roles:
            config_lib.choose(role, ROLES, "--roles")
        config_lib.choose(self.table_scale, TABLE_SCALES, "--table_scale")

    def check(self, seconds: float) -> None:
        """Raise `ConfigError` for a time that the device has no figures for."""
        if not 0 <= seconds < math.inf:
            raise ConfigError(f"--seconds={seconds}: must be a time, 0 or more.")

    def held(
        self, weights: Cells, largest: Cells, seconds: float, rng: np.random.Generator
    ) -> Cells:
        """Return weights [K, C, F] or [D, F], float32, as they are read after `seconds`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ideal(Device):
    """Every weight as it is."""

    @property
    def exact(self):
        """It is."""
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(Device):
    """w + sigma w_max xi: the plain model of analog noise."""

    sigma: float = 0.05
    NAME: ClassVar[str] = "gaussian"

    def __post_init__(self):
        super().__post_init__()
        check_range("sigma", self.sigma, 10.0)

    @property
    def exact(self):
        """Without noise."""
        return self.sigma == 0

    def held(
        self, weights: Cells, largest: Cells, seconds: float, rng: np.random.Generator
    ) -> Cells:
        """One draw for each weight."""
        return weights + np.float32(self.sigma) * largest * normal(rng, weights.shape)


class InPairs(Device):
    """A device of analog cells, two for a weight."""

    def cells(self, r: Cells, seconds: float, rng: np.random.Generator) -> Cells:
        """Shares of the largest conductance -> what is read after `seconds`."""
        raise NotImplementedError

    def held(
        self, weights: Cells, largest: Cells, seconds: float, rng: np.random.Generator
    ) -> Cells:
        """w_max times the difference of the two cells."""
        plus, minus = shares(weights, largest)
        return largest * (
            self.cells(plus, seconds, rng) - self.cells(minus, seconds, rng)
        )


def shares(weights: Cells, largest: Cells) -> tuple[Cells, Cells]:
    """The two cells of each weight; a column of zeros is a column of zeros."""
    r = weights / np.where(largest > 0, largest, np.float32(1))
    return np.maximum(r, 0), np.maximum(-r, 0)


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Cells:
    """Draw xi, float32."""
    return rng.standard_normal(shape, np.float32)


def check_range(name: str, value: float, top: float) -> None:
    """Raise `ConfigError` for a value outside of [0, top]."""
    if not 0 <= value <= top:
        raise ConfigError(f"{name}={value}: must be from 0 to {top:g}.")
