"""Where arrays live."""

from memoryformer.sharding.placement import *  # noqa: F403
from memoryformer.sharding.placement import _arranged  # noqa: F401
