"""A trained model's weights as a device holds them.

w_max, what the device's noise is relative to, is the largest |w| of an output's column of a dense
layer. Of tables [K, C, F] it is that of each table, or of each column F over all tables
(`cells.Device.table_scale`). Norms, biases, the embedding and a head that is tied to it stay as they are.
Weights come through `narrow.map_weights`, as for int8.

A result follows from the parameters, the device, the seconds and the seed. Start at `perturb`.
"""

import hashlib
from typing import Any

import numpy as np

from memoryformer import config as config_lib
from memoryformer.cim.cells import Cells, Device
from memoryformer.cim.devices import DEVICES
from memoryformer.model import ModelConfig, narrow
from memoryformer.notation import Params


def perturb(
    model_config: ModelConfig,
    params: Params,
    device: str | Device,
    seconds: float = 0.0,
    seed: int = 0,
) -> Params:
    """Return the weights as `device` holds them after `seconds`; 'ideal' keeps every bit.

    Args:
      model_config: the model's.
      params: its parameters, not packed.
      device: a name of `DEVICES`, as it is by default, or one of their objects.
      seconds: since the weights were written.
      seed: of all draws.

    Raises `ConfigError` for a device or a time that there is not.
    """
    if isinstance(device, str):
        device = DEVICES[config_lib.choose(device, DEVICES, "--technology")]()
    device.check(seconds)
    if device.exact:
        return params

    def noisy(role: str, path: str, leaf: Any) -> Any:
        if role not in device.roles:
            return leaf
        weights = np.asarray(leaf, np.float32)
        axes = 2 if role == "tables" else 1  # K and C, or D, before the features
        flat = weights.reshape(*weights.shape[:axes], -1)
        largest = _largest(flat, device.table_scale)
        held = device.held(flat, largest, seconds, _generator(seed, path))
        return np.asarray(held, np.float32).reshape(weights.shape)

    return narrow.map_weights(model_config, params, noisy)


def _largest(weights: Cells, table_scale: str) -> Cells:
    """w_max of [K, C, F] (`table_scale`) or [D, F], to be broadcast."""
    axes: dict[str, Any] = {"table": (1, 2), "column": (0, 1)}
    axis = axes[table_scale] if weights.ndim == 3 else 0
    return np.abs(weights).max(axis=axis, keepdims=True)


def _generator(seed: int, path: str) -> np.random.Generator:
    """A stream for each leaf, so that what is drawn for one does not hang on the others."""
    digest = hashlib.sha256(path.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
