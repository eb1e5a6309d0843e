"""Three clusters of points: are their centres the corners of an equilateral triangle?

After the triangles of Ahmad and Omohundro (1990) in PMI's experiments: three clusters of eight
points, each within 1 of its centre, on a square of 64. Here every point is a token (x, y), in
no order, instead of a pixel. Half of the triples are equilateral, of any turn and place. The others
have a longest side of at least `ratio` times the shortest: without such a gap the noise of the
points would hide the answer. All sides are from 16 to 40, so that size alone tells nothing.

Start at `centres`.
"""

import dataclasses

import numpy as np
from flax import nnx

from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.tasks import base, labelled, pmi

SIZE, POINTS, RADIUS = 64, 8, 1.0
SHORTEST, LONGEST = 16.0, 40.0  # sides
KINDS = ("other", "equilateral")


@dataclasses.dataclass(frozen=True)
class TrianglesConfig(base.TrainerConfig):
    """How far the others are from equilateral, and the training."""

    ratio: float = field(
        "numbers", 1.2, doc="Least longest side over shortest of the others."
    )

    def __post_init__(self):
        super().__post_init__()
        if not 1 < self.ratio <= 2:
            raise ConfigError(
                f"task.ratio={self.ratio}: must be above 1 and at most 2."
            )


def centres(rng: np.random.Generator, labels: np.ndarray, ratio: float) -> np.ndarray:
    """Draw three centres [B, 3, 2] for every label [B], 1 for equilateral."""
    places = np.zeros((len(labels), 3, 2))
    fresh = np.arange(len(labels))
    while len(fresh):  # those that do not fit are drawn again, whole
        equal = _equilateral(rng, len(fresh))
        other = rng.uniform(RADIUS, SIZE - RADIUS, (len(fresh), 3, 2))
        right = labels[fresh] == 1
        places[fresh] = np.where(right[:, None, None], equal, other)
        inside = (places[fresh] >= RADIUS) & (places[fresh] <= SIZE - RADIUS)
        short, long = (f(sides(places[fresh]), axis=1) for f in (np.min, np.max))
        uneven = (short >= SHORTEST) & (long <= LONGEST) & (long >= ratio * short)
        fresh = fresh[~(inside.all(axis=(1, 2)) & (right | uneven))]
    return places


def sides(places: np.ndarray) -> np.ndarray:
    """Return the three sides [B, 3] of corners [B, 3, 2]."""
    return np.linalg.norm(places - np.roll(places, 1, axis=1), axis=-1)


def _equilateral(rng, count):
    side = rng.uniform(SHORTEST, LONGEST, (count, 1))
    turn = rng.uniform(0, 2 * np.pi, (count, 1)) + np.arange(3) * 2 * np.pi / 3
    middle = rng.uniform(0, SIZE, (count, 1, 2))
    corners = np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    return middle + side[..., None] / np.sqrt(3) * corners


def batch(options: TrianglesConfig, step: int, split: str) -> dict[str, np.ndarray]:
    """Batch of a step: inputs [B, 24, 2] from -1 to 1, real [B, 24], labels and kinds [B]."""
    rng = base.rng(options.seed, step, split)
    labels = rng.integers(0, 2, options.batch_size, np.int32)
    corners = centres(rng, labels, options.ratio)
    shape = (options.batch_size, 3, POINTS)
    far, turn = RADIUS * np.sqrt(rng.random(shape)), rng.uniform(0, 2 * np.pi, shape)
    spread = far[..., None] * np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    points = (corners[:, :, None] + spread).reshape(options.batch_size, -1, 2)
    order = rng.random(points.shape[:2]).argsort(axis=1)
    points = np.take_along_axis(points, order[..., None], axis=1)
    return {
        "inputs": (2 * points / SIZE - 1).astype(np.float32),
        "real": np.ones(points.shape[:2], bool),
        "labels": labels,
        "kinds": labels,
    }


class Triangles(labelled.Labelled):
    """Equilateral or not."""

    Options = TrianglesConfig
    num_classes = 2
    kinds = KINDS

    def inputs(self, rngs: nnx.Rngs) -> nnx.Module:
        """A dense layer of a point's two places."""
        return pmi.dense(self.model, 2, self.model.embed_dim, rngs=rngs)

    def batch(self, step: int, split: str) -> dict[str, np.ndarray]:
        """See `batch`."""
        return batch(self.options, step, split)
