"""Which noise at which levels: the rows of an experiment. Start at `settings`."""

import dataclasses
from collections.abc import Callable, Sequence

from memoryformer import config as config_lib
from memoryformer.cim.cells import Device, Gaussian, Ideal
from memoryformer.cim.devices import AfmPcm, Flips, Pcm, ReRam, Stuck
from memoryformer.cim.periphery import AIHWKIT, AIHWKIT_TRAINED, Periphery
from memoryformer.errors import ConfigError

EXACT, PLAIN = Ideal(), Periphery()
HOUR, DAY, YEAR = 3600.0, 86_400.0, 31_536_000.0
TIMES = (1.0, HOUR, DAY, YEAR)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One level of one kind of noise.

    level: on the axis of the kind's picture. energy: the technology of `technologies` whose
    energy is set beside it. random: whether seeds differ.
    """

    kind: str
    level: float
    device: Device = EXACT
    seconds: float = 0.0
    periphery: Periphery = PLAIN
    energy: str = "isaac"
    random: bool = True


AXES = {
    "ideal": "-",
    "gaussian": "sigma / w_max",
    "pcm": "seconds",
    "pcm_uncompensated": "seconds",
    "afm_pcm": "-",
    "reram": "seconds",
    "stuck": "share of cells",
    "flips": "probability of a bit",
    "io": "bits in and out",
    "io_mid_rise": "bits in and out",
    "aihwkit": "-",
    "aihwkit_trained": "-",
    "output_noise": "standard deviation / u",
}
BITS_IN = {8: "isaac", 6: "isaac_in6", 4: "isaac_in4"}  # bits -> energy


def settings(
    technologies: Sequence[str],
    seconds: float,
    device_options: dict[str, object],
) -> list[Setting]:
    """Return what to measure, the model as it is first.

    technologies: of `TECHNOLOGIES`, or 'all'. seconds: the last of the times of those that
    age. device_options: fields of every `Device`. Raises `ConfigError`.
    """
    names = list(TECHNOLOGIES) if list(technologies) == ["all"] else list(technologies)
    if not names:
        raise ConfigError("--technology: names none; one of " + ", ".join(TECHNOLOGIES))
    if not 0 <= seconds < 1e12:
        raise ConfigError(f"--seconds={seconds}: must be a time, from 0 to 1e12.")
    found = [Setting("ideal", 0.0, random=False)]
    for name in dict.fromkeys(names):
        config_lib.choose(name, TECHNOLOGIES, "--technology")
        found += TECHNOLOGIES[name](seconds, device_options)
    return found


def _times(seconds: float, lowest: float, highest: float) -> list[float]:
    """Those of `TIMES` up to `seconds`, and `seconds` itself, within what was measured."""
    times = [t for t in TIMES if t < seconds] + [seconds]
    within = [t for t in times if lowest <= t <= highest]
    if seconds > highest:
        within.append(highest)
    return within or [lowest]


def _pcm(seconds, options):
    return [
        Setting(kind, t, Pcm(compensate=on, **options), t, energy="hermes_4phase")
        for kind, on in (("pcm", True), ("pcm_uncompensated", False))
        for t in _times(seconds, 0.0, float("inf"))
    ]


def _reram(seconds, options):
    return [
        Setting("reram", t, ReRam(**options), t, energy="neurram_8_6")
        for t in _times(seconds, ReRam.TIMES[0], ReRam.TIMES[-1])
    ]


def _io(seconds, options):
    return [
        Setting(
            kind,
            bits,
            periphery=Periphery(bits, bits, levels=levels),
            energy=energy,
            random=False,
        )
        for kind, levels in (("io", "mid_tread"), ("io_mid_rise", "mid_rise"))
        for bits, energy in BITS_IN.items()
    ]


def _converters(seconds, options):
    noises = [
        Setting("output_noise", noise, periphery=Periphery(output_noise=noise))
        for noise in (0.01, 0.02, 0.04, 0.06)
    ]
    return [
        *noises,
        Setting("aihwkit", 0.0, periphery=AIHWKIT),
        Setting("aihwkit_trained", 0.0, periphery=AIHWKIT_TRAINED),
    ]


TECHNOLOGIES: dict[str, Callable[[float, dict], list[Setting]]] = {
    "io": _io,
    "gaussian": lambda seconds, options: [
        Setting("gaussian", sigma, Gaussian(sigma=sigma, **options))
        for sigma in (0.01, 0.02, 0.05, 0.1)
    ],
    "pcm": _pcm,
    "afm_pcm": lambda seconds, options: [
        Setting("afm_pcm", 0.0, AfmPcm(**options), energy="hermes_4phase")
    ],
    "reram": _reram,
    "stuck": lambda seconds, options: [
        Setting("stuck", share, Stuck(share=share, **options))
        for share in (1e-4, 1e-3, 1e-2)
    ],
    "flips": lambda seconds, options: [
        Setting("flips", rate, Flips(rate=rate, **options), energy="edram")
        for rate in (1e-6, 1e-5, 1e-4, 1e-3)
    ],
    "converters": _converters,
}
