"""Noise of analog cells and of converters, in float64 NumPy: what `memoryformer.cim` is held to."""

import numpy as np


def pcm(r, seconds, rng, compensation=False):
    """A cell of 25 uS at share r of them, after `seconds`: shares of 25 uS, one for each r."""
    sigma = 0.26348 + 1.9650 * r - 1.1731 * r**2  # uS
    g = np.maximum(25 * r + sigma * rng.standard_normal(r.shape), 0)
    log = np.log(np.maximum(r, 1e-7))
    mean = np.clip(-0.0155 * log + 0.0244, 0.049, 0.1)
    width = np.clip(-0.0125 * log - 0.0059, 0.008, 0.045)
    nu = np.abs(mean + width * rng.standard_normal(r.shape))
    since = seconds + 20.0
    drifted = g * (since / 20.0) ** -nu
    q = np.minimum(0.0088 / np.maximum((g / 25) ** 0.65, 1e-3), 0.2)
    noise = q * np.sqrt(np.log((since + 250e-9) / 500e-9))
    return np.maximum(drifted + drifted * noise * rng.standard_normal(r.shape), 0) / 25


def reram(r, seconds, rng):
    """A cell of 40 uS at share r, after 1 s, a day or two days."""
    coefficients = {
        1: (0.348, 16.030, -43.853, 45.393, -16.815),
        86_400: (0.701, 22.086, -50.773, 47.095, -16.458),
        172_800: (0.782, 20.274, -43.507, 37.062, -11.934),
    }[seconds]
    sigma = sum(c * r**i for i, c in enumerate(coefficients))
    return np.maximum(40 * r + sigma * rng.standard_normal(r.shape), 0) / 40


def afm_pcm(w, largest, rng):
    """A weight w of a column whose largest is `largest`."""
    g = 180 * np.abs(w) / largest
    low = 2.940e-5 * g**3 - 3.716e-3 * g**2 + 0.22420 * g + 2.5797
    high = 1.233e-5 * g**3 - 3.055e-3 * g**2 + 0.24535 * g + 2.1103
    sigma = np.where(g > 52.5, high, low) * largest / 180
    return np.where(g < 0.6, 0, w + sigma * rng.standard_normal(w.shape))


def quantise(x, bits, bound, levels):
    """The nearest level in [-bound, bound], looked up among all of them; bound as x, or one."""
    if levels == "mid_tread":
        most = 2 ** (bits - 1) - 1
        table = np.arange(-most, most + 1) / most
    else:
        half = 2 ** (bits - 1)
        table = (np.arange(-half, half) + 0.5) / half
    nearest = np.abs((x / bound)[..., None] - table).argmin(-1)
    return table[nearest] * bound
