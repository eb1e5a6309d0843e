"""What holds weights: cells of an analog memory, or bits of a digital one.

A weight w lies in two cells, one for each sign, as shares r = |w| / w_max of the largest
conductance; the cell of the other sign is at 0. With normal xi, each drawn anew:

    gaussian    w + sigma w_max xi
    pcm         programmed, drifted for t seconds, read (the formulas are at `Pcm`)
    afm_pcm     programming noise of another chip, at no stated time
    reram       noise that was measured after 1 s, 1 day and 2 days
    stuck       a share of cells is stuck, half of them at 0, half at the largest
    flips       int8 in a digital memory, every stored bit flipped with a probability

`cells.Device` is what they all are; `DEVICES` names them.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from memoryformer.cim.cells import (
    Cells,
    Device,
    Gaussian,
    Ideal,
    InPairs,
    check_range,
    normal,
    shares,
)
from memoryformer.errors import ConfigError
from memoryformer.ops.lookup import narrow as narrow_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pcm(InPairs):
    """Phase-change cells of 25 uS, after the fit in aihwkit 1.2 (Nandakumar et al. 2019).

        programmed   g_p = max(g + s xi, 0),   s = .26348 + 1.9650 r - 1.1731 r^2  uS
        drifted      g_d = g_p ((t + t_0) / t_0)^-nu,   t_0 = 20 s,   nu = |mu + sig xi|
                     mu  = clip(-.0155 ln r + .0244, .049, .1)
                     sig = clip(-.0125 ln r - .0059, .008, .045)
        read         g = max(g_d (1 + q sqrt(ln((t + t_0 + t_r) / 2 t_r)) xi), 0)
                     q = min(.0088 / max(r_p^.65, .001), .2),   t_r = 250 ns

    compensate: the outputs of a layer are scaled by what all its weights sum up to, in
    magnitude, when read at t = 0 over the same at t.
    """

    compensate: bool = True
    NAME: ClassVar[str] = "pcm"
    G_MAX: ClassVar[float] = 25.0  # uS
    START: ClassVar[float] = 20.0  # s, from writing to the first reading
    READ: ClassVar[float] = 250e-9  # s, of one reading

    def cells(self, r: Cells, seconds: float, rng: np.random.Generator) -> Cells:
        """Programmed, drifted and read."""
        programmed, nu = self._programmed(r, rng)
        return self._read(programmed, nu, seconds, rng)

    def held(
        self, weights: Cells, largest: Cells, seconds: float, rng: np.random.Generator
    ) -> Cells:
        """The same of both cells, times the compensation."""
        pairs = [self._programmed(r, rng) for r in shares(weights, largest)]

        def difference(seconds):
            plus, minus = (self._read(g, nu, seconds, rng) for g, nu in pairs)
            return plus - minus

        later, factor = difference(seconds), 1.0
        if self.compensate:
            total = np.abs(later).sum(dtype=np.float64)
            first = np.abs(difference(0.0)).sum(dtype=np.float64)
            factor = first / total if total else 1.0
        return np.float32(factor) * largest * later

    def _programmed(self, r, rng):
        """(g_p / g_max, nu)."""
        spread = (0.26348 + r * (1.9650 - 1.1731 * r)) / self.G_MAX
        programmed = np.maximum(r + spread * normal(rng, r.shape), 0)
        log = np.log(np.maximum(r, np.float32(1e-7)))
        mean = np.clip(-0.0155 * log + 0.0244, 0.049, 0.1)
        width = np.clip(-0.0125 * log - 0.0059, 0.008, 0.045)
        return programmed, np.abs(mean + width * normal(rng, r.shape))

    def _read(self, programmed, nu, seconds, rng):
        drifted = programmed
        if seconds:
            drifted = drifted * np.exp(
                -nu * np.float32(math.log1p(seconds / self.START))
            )
        q = np.minimum(0.0088 / np.maximum(programmed**0.65, 1e-3), 0.2)
        since = (seconds + self.START + self.READ) / (2 * self.READ)
        q *= np.float32(math.sqrt(math.log(since)))
        return np.maximum(drifted * (1 + q * normal(rng, q.shape)), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AfmPcm(Device):
    """Programming noise of phase-change memory as in IBM's Analog Foundation Models (2505.09663).

    In units of g = 180 |w| / w_max, with p and p' of `LOW` (g <= 52.5) and `HIGH`:
    w + p(g) xi, and 0 where g < .6. One number a weight, at no stated time.
    """

    NAME: ClassVar[str] = "afm_pcm"
    G_MAX: ClassVar[float] = 180.0
    BORDER: ClassVar[float] = 52.5
    ZERO: ClassVar[float] = 0.6
    LOW: ClassVar = (2.940e-5, -3.716e-3, 0.22420, 2.5797)  # of g^3 .. 1
    HIGH: ClassVar = (1.233e-5, -3.055e-3, 0.24535, 2.1103)

    def held(
        self, weights: Cells, largest: Cells, seconds: float, rng: np.random.Generator
    ) -> Cells:
        """One draw for each weight."""
        unit = np.where(largest > 0, largest, 1) / np.float32(self.G_MAX)
        g = np.abs(weights) / unit
        spread = np.where(
            g > self.BORDER, np.polyval(self.HIGH, g), np.polyval(self.LOW, g)
        )
        noisy = weights + unit * spread.astype(np.float32) * normal(rng, g.shape)
        return np.where(g < self.ZERO, np.float32(0), noisy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReRam(InPairs):
    """Resistive cells of 40 uS: aihwkit's fit to Wan et al. (Nature 2022).

    g = max(g + s xi, 0), s a polynomial in r (`COEFFICIENTS`, uS), between the three times
    linear in the logarithm of the time (that is ours); and 1 % of w_max xi when it is read.
    """

    read_noise: float = 0.01
    NAME: ClassVar[str] = "reram"
    G_MAX: ClassVar[float] = 40.0  # uS
    TIMES: ClassVar = (1.0, 86_400.0, 172_800.0)  # s
    COEFFICIENTS: ClassVar = (  # of 1, r .. r^4
        (0.348, 16.030, -43.853, 45.393, -16.815),
        (0.701, 22.086, -50.773, 47.095, -16.458),
        (0.782, 20.274, -43.507, 37.062, -11.934),
    )

    def check(self, seconds: float) -> None:
        """Only what was measured: 1 s to 2 days."""
        if not self.TIMES[0] <= seconds <= self.TIMES[-1]:
            raise ConfigError(
                f"--seconds={seconds}: reram was measured from 1 s to 2 days; choose a time "
                "between 1 and 172800."
            )

    def cells(self, r: Cells, seconds: float, rng: np.random.Generator) -> Cells:
        """Programmed and read at `seconds`."""
        logs = np.log(self.TIMES)
        spreads = [
            np.interp(math.log(seconds), logs, c)
            for c in zip(*self.COEFFICIENTS, strict=True)
        ]
        spread = np.polyval(spreads[::-1], r) / self.G_MAX
        return np.maximum(r + spread.astype(np.float32) * normal(rng, r.shape), 0)

    def held(
        self, weights: Cells, largest: Cells, seconds: float, rng: np.random.Generator
    ) -> Cells:
        """Both cells, and the noise of reading the weight."""
        read = np.float32(self.read_noise) * largest * normal(rng, weights.shape)
        return super().held(weights, largest, seconds, rng) + read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stuck(InPairs):
    """A share of all cells is stuck, half of them at 0, half at the largest conductance."""

    share: float = 1e-3
    NAME: ClassVar[str] = "stuck"

    def __post_init__(self):
        super().__post_init__()
        check_range("share", self.share, 1.0)

    def cells(self, r: Cells, seconds: float, rng: np.random.Generator) -> Cells:
        """Which are stuck does not depend on the share: a larger one adds more."""
        draw = rng.random(r.shape, np.float32)
        stuck = np.where(
            rng.random(r.shape, np.float32) < 0.5, np.float32(0), np.float32(1)
        )
        return np.where(draw < self.share, stuck, r)

    def held(
        self, weights: Cells, largest: Cells, seconds: float, rng: np.random.Generator
    ) -> Cells:
        """Weights without a stuck cell stay as they are, to the bit."""
        plus, minus = shares(weights, largest)
        read = self.cells(plus, seconds, rng), self.cells(minus, seconds, rng)
        same = (read[0] == plus) & (read[1] == minus)
        return np.where(same, weights, largest * (read[0] - read[1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flips(Device):
    """int8 in a digital memory, every stored bit flipped with probability `rate`.

    A scale for each row of a table and each output of a dense layer, as `narrow` rounds; the
    scales are kept. Two's complement: the highest bit is worth 128 steps.
    """

    rate: float = 1e-5
    NAME: ClassVar[str] = "flips"

    def __post_init__(self):
        super().__post_init__()
        check_range("rate", self.rate, 1.0)

    def held(
        self, weights: Cells, largest: Cells, seconds: float, rng: np.random.Generator
    ) -> Cells:
        """Rounded, flipped, and scaled back."""
        by_row = weights if weights.ndim == 3 else weights.T
        values, scales = narrow_rows.round_rows(by_row)
        values = np.ascontiguousarray(values)  # so that `stored` is a view of them
        stored = values.view(np.uint8).reshape(-1)
        flips = rng.binomial(8 * stored.size, self.rate)
        places = rng.choice(8 * stored.size, flips, replace=False)
        np.bitwise_xor.at(stored, places // 8, (1 << places % 8).astype(np.uint8))
        wide = values.astype(np.float32) * scales[..., None]
        return wide if weights.ndim == 3 else wide.T


DEVICES: dict[str, type[Device]] = {
    cls.NAME: cls for cls in (Ideal, Gaussian, Pcm, AfmPcm, ReRam, Stuck, Flips)
}
