"""What lies in a run's folder.

Commands name it before they know that they need jax, so nothing is imported here.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ml_collections

    from memoryformer.notation import Params


def load(
    workdir: str | os.PathLike, step: int | None = None
) -> "tuple[ml_collections.ConfigDict, Params]":
    """Load (config, params) of a run, here or in a store; see `steps.load`."""
    from memoryformer.runs import remote, steps

    return steps.load(remote.copied(workdir, step), step)
