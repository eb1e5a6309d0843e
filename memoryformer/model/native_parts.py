"""Whether what surrounds a model's lookups is computed in C++ too. Start at `usable`."""

from typing import Any

import jax

from memoryformer.model.config import ModelConfig
from memoryformer.ops.lookup import native


def usable(config: ModelConfig, sharding: Any) -> bool:
    """Whether a train step runs on one CPU, in float32, and reads tables natively.

    `model.lookup` decides for all of it: 'xla' leaves everything to XLA, and so does a
    machine without a compiler. `sharding` is a `sharding.Sharding`.
    """
    return (
        config.lookup in ("auto", "native")
        and config.dtype == "float32"
        and sharding.mesh is None
        and jax.default_backend() == "cpu"
        and native.available()
    )
