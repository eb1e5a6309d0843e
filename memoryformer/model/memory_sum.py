"""Several memory layers of one input, added up: y = sum_m ML_m(x).

Each hashes x behind its own mix and thresholds, so each parts the inputs in another way. Given
the codes the sum is linear in all tables, as one layer is: `convert.memorise` fits them together.
M layers read M times the rows, and hold M times the tables. Start at `MemorySum`.
"""

from collections.abc import Sequence

from flax import nnx

from memoryformer.model import layers
from memoryformer.notation import Activations, Array


class MemorySum(nnx.Module):
    """y = sum_m ML_m(x): [.., D] -> [.., *features]; the first layer has the bias, if any."""

    def __init__(self, terms: Sequence[layers.MemoryLayer]):
        self.terms = nnx.List(terms)

    def __call__(self, x: Activations) -> Array:
        """[.., D] -> [.., *features], in the layers' dtype."""
        first, *others = self.terms
        y = first(x)
        for layer in others:
            y = y + layer(x)
        return y
