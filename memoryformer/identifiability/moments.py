"""What the second moment of features says of the weights behind them. Start at `Certificate`."""

import dataclasses

import numpy as np

from memoryformer.notation import Float


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What examples say of weights w, where an output is w . (features of its input).

    examples: N.
    unknowns: weights of one output.
    rank: of the second moment of the features.
    freedom: dimension of the weights that are known to change no output at all (but for
        an epsilon in a norm).
    smallest: the smallest eigenvalue; above 0, one choice of weights has the least error.
    smallest_beyond: the smallest one beside those of `freedom`; above 0, one function has.
    largest: the largest eigenvalue, the scale of the two.
    """

    examples: int
    unknowns: int
    rank: int
    freedom: int
    smallest: float
    smallest_beyond: float
    largest: float

    @property
    def weights_are_unique(self) -> bool:
        """Whether one choice of weights has the least square error."""
        return self.rank == self.unknowns

    @property
    def function_is_unique(self) -> bool:
        """Whether all weights of least square error are the same function."""
        return self.smallest_beyond > 0


def certificate(
    eigenvalues: Float[np.ndarray, " M"],
    num_examples: int,
    freedom: int = 0,
    dtype: np.dtype | type = np.float64,
) -> Certificate:
    """Read the ascending eigenvalues of a second moment; what rounding leaves of a 0 is 0.

    dtype: of the inputs that features were made of; an eigenvalue has the square of its rounding.
    """
    largest = float(eigenvalues[-1])
    relative = max(float(np.finfo(dtype).eps) ** 2, np.finfo(np.float64).eps)
    rounding = largest * len(eigenvalues) * relative
    eigenvalues = np.where(eigenvalues > rounding, eigenvalues, 0.0)
    freedom = min(freedom, len(eigenvalues) - 1)
    return Certificate(
        examples=num_examples,
        unknowns=len(eigenvalues),
        rank=int(np.count_nonzero(eigenvalues)),
        freedom=freedom,
        smallest=float(eigenvalues[0]),
        smallest_beyond=float(eigenvalues[freedom]),
        largest=largest,
    )
