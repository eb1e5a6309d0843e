"""Handwritten digits, 8 x 8, that are shipped with scikit-learn: half to train, half to measure.

Start at `load`.
"""

import functools
import importlib.util
from typing import NamedTuple

import numpy as np

from memoryformer.errors import ConfigError
from memoryformer.notation import Float, Int

SIDE = 8
NUM_CLASSES = 10
SPLITS = ("train", "validation")


class Images(NamedTuple):
    """Images with values in [0, 1], and their digits."""

    pixels: Float[np.ndarray, "N 8 8"]
    labels: Int[np.ndarray, " N"]


def check() -> None:
    """Raise `ConfigError` without scikit-learn."""
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            "task.name='memorised': its images come with scikit-learn, which is not installed; "
            "pip install 'memoryformer-jax[digits]'."
        )


@functools.cache
def load(split: str) -> Images:
    """Return the 898 images to train on or the 899 others, in an order drawn once."""
    check()
    from sklearn import datasets

    found = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    half = np.array_split(order, 2)[1 - SPLITS.index(split)]
    pixels = (found.images[half] / found.images.max()).astype(np.float32)
    return Images(pixels, found.target[half].astype(np.int32))
