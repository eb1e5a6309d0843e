"""Relations between six objects, after Sort-of-CLEVR (Santoro et al. 2017), without an image.

A scene has one object of each of six colours, a square or a circle with even odds, at integer
places in [5, 70)^2, centres at least 10 apart. One question is asked of it:

    unary     its shape;  left half?;  upper half?
    binary    shape of the nearest other object;  of the furthest;  how many others have its shape
    ternary   of two objects: others in the box that they span;  is another one within 12 above
              or below the line through both?;  others that make an obtuse triangle with both

Distances that are equal go to the first colour. Counts are classes of their own. Re-derived from
the generator in the code of PMI's authors, with two of its defects mended: there the nearest object
was the object itself when all others were over 31.6 away, and ternary questions never asked
about the sixth colour. Two rounding matters differ too: our angles are exact, in integers, and
a vertical line has on it what has the same x.

Tokens are the question (18 bits, as there) and the six objects, each with its colour, shape and
place. Start at `answer` for what is right, at `batch` for the data.
"""

import numpy as np
from flax import nnx

from memoryformer.tasks import base, labelled, pmi

COLOURS, SHAPES = 6, 2
KINDS = ("unary", "binary", "ternary")
YES, NO, SQUARE, CIRCLE, COUNT = range(5)  # classes; COUNT + n stands for n
QUESTION = 2 * COLOURS + 3 + 3  # bits: two colours, kind, which of its questions
OBJECT = COLOURS + SHAPES + 2
LOWEST, HIGHEST, APART, MIDDLE, BAND = 5, 70, 10, 37.5, 12


def scenes(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw places [count, 6, 2] and shapes [count, 6], 1 for a circle."""
    places = np.zeros((count, COLOURS, 2), np.int64)
    for i in range(COLOURS):
        fresh = np.arange(count)
        while len(fresh):  # those of these scenes whose object i is not placed well
            places[fresh, i] = rng.integers(LOWEST, HIGHEST, (len(fresh), 2))
            near = _squares(places[fresh, :i], places[fresh, i, None]) < APART**2
            fresh = fresh[near.any(axis=1)]
    return places, rng.integers(0, SHAPES, (count, COLOURS))


def questions(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw [count, 4]: two different colours, kind, which of its three questions."""
    first = rng.integers(0, COLOURS, count)
    second = (first + rng.integers(1, COLOURS, count)) % COLOURS
    return np.stack([first, second, *rng.integers(0, 3, (2, count))], axis=1)


def answer(places: np.ndarray, shapes: np.ndarray, question: np.ndarray) -> np.ndarray:
    """Return the class of every question [B, 4] about its scene [B, 6, 2], [B, 6]."""
    rows = np.arange(len(places))
    first, second, kind, which = question.T
    a, b = places[rows, first], places[rows, second]
    every = np.arange(COLOURS)[None]
    others = every != first[:, None]
    rest = others & (every != second[:, None])
    from_first = _squares(places, a[:, None])
    nearest = np.where(others, from_first, 2 * HIGHEST**2).argmin(axis=1)
    alike = (shapes == shapes[rows, first][:, None]) & others
    answers = [
        [SQUARE + shapes[rows, first], *(np.where(x < MIDDLE, YES, NO) for x in a.T)],
        [
            SQUARE + shapes[rows, nearest],
            SQUARE + shapes[rows, from_first.argmax(axis=1)],
            COUNT + alike.sum(axis=1),
        ],
        [
            COUNT + (_between(places, a, b) & rest).sum(axis=1),
            np.where((_on_line(places, a, b) & rest).any(axis=1), YES, NO),
            COUNT + (_obtuse(places, a, b) & rest).sum(axis=1),
        ],
    ]
    return np.array(answers)[kind, which, rows].astype(np.int32)


def _squares(places, point):
    """Squared distances."""
    return ((places - point) ** 2).sum(axis=-1)


def _between(places, a, b):
    """Whether each place [B, 6, 2] is in the box of corners a, b [B, 2]."""
    low, high = np.minimum(a, b)[:, None], np.maximum(a, b)[:, None]
    return ((low <= places) & (places <= high)).all(axis=-1)


def _on_line(places, a, b):
    """|y - y of the line at x| <= 12, without a division: both sides times |x_b - x_a|."""
    along, to = (b - a)[:, None], places - a[:, None]
    return np.abs(_cross(along, to)) <= BAND * np.abs(along[..., 0])


def _obtuse(places, a, b):
    """Whether the largest angle is in [90, 180) degrees."""
    sides = np.stack(
        [
            _squares(places, a[:, None]),
            _squares(places, b[:, None]),
            np.broadcast_to(_squares(a, b)[:, None], places.shape[:2]),
        ]
    )
    flat = _cross((b - a)[:, None], places - a[:, None]) == 0
    return (2 * sides.max(axis=0) >= sides.sum(axis=0)) & ~flat


def _cross(u, v):
    return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]


def encode(places: np.ndarray, shapes: np.ndarray, question: np.ndarray) -> np.ndarray:
    """Return tokens [B, 7, 28]: the question, then the objects; places from -1 to 1."""
    count = len(places)
    tokens = np.zeros((count, 1 + COLOURS, QUESTION + OBJECT), np.float32)
    rows, (first, second, kind, which) = np.arange(count), question.T
    tokens[rows, 0, first] = 1
    tokens[rows, 0, 2 * COLOURS + kind] = 1
    tokens[rows, 0, 2 * COLOURS + 3 + which] = 1
    two = kind == KINDS.index("ternary")
    tokens[rows[two], 0, COLOURS + second[two]] = 1
    objects = tokens[:, 1:, QUESTION:]
    objects[:, :, :COLOURS] = np.eye(COLOURS)
    objects[:, :, COLOURS : COLOURS + SHAPES] = np.eye(SHAPES)[shapes]
    objects[:, :, COLOURS + SHAPES :] = places / MIDDLE - 1
    return tokens


def batch(options: base.TrainerConfig, step: int, split: str) -> dict[str, np.ndarray]:
    """Batch of a step: inputs [B, 7, 28], real [B, 7], labels and kinds [B]."""
    rng = base.rng(options.seed, step, split)
    scene = scenes(rng, options.batch_size)
    question = questions(rng, options.batch_size)
    inputs = encode(*scene, question)
    return {
        "inputs": inputs,
        "real": np.ones(inputs.shape[:2], bool),
        "labels": answer(*scene, question),
        "kinds": question[:, 2].astype(np.int32),
    }


class Relations(labelled.Labelled):
    """An answer out of yes, no, square, circle and the counts 0 to 5."""

    num_classes = COUNT + COLOURS
    kinds = KINDS

    def inputs(self, rngs: nnx.Rngs) -> nnx.Module:
        """A row of length about 1 for every bit of a question and of an object, as words have."""
        sizes = QUESTION + OBJECT, self.model.embed_dim
        return pmi.dense(self.model, *sizes, std=1.0, rngs=rngs)

    def batch(self, step: int, split: str) -> dict[str, np.ndarray]:
        """See `batch`."""
        return batch(self.options, step, split)
