"""Bytes of packages and joined dots: the answers are right, and nothing else gives them away."""

import collections
import itertools

import numpy as np
import pytest

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError, DataError
from memoryformer.tasks import experiment, pathfinder, texts

PATHS = pathfinder.PathfinderConfig(1, 1, 1.0, 0)


def test_windows_are_of_their_package_and_split():
    """Mutations: labels drawn a second time; the first quarter held out as well as read."""
    for split, other in (("train", "validation"), ("validation", "train")):
        tokens, labels = texts.batch(0, 3, 24, 64, split)
        assert tokens.shape == (24, 64) and tokens.min() >= 1
        for row, label in zip(tokens, labels, strict=True):
            window = bytes((row - 1).astype(np.uint8))
            assert window in texts.text(texts.PACKAGES[label], split).tobytes()
        inside = [
            bytes((row - 1).astype(np.uint8))
            in texts.text(texts.PACKAGES[label], other).tobytes()
            for row, label in zip(tokens, labels, strict=True)
        ]
        assert np.mean(inside) < 0.3  # tables and licences repeat
    assert len(set(texts.batch(0, 0, 200, 8)[1])) == len(texts.PACKAGES)


def test_a_split_is_a_part_of_every_file():
    """Mutation: the border counted from the end."""
    sizes = [len(texts.text("email", split)) for split in ("train", "validation")]
    assert sizes[1] == pytest.approx(sum(sizes) / 4, rel=0.01)


def test_missing_sources_are_told():
    """Mutation: the check left out (a window of nothing)."""
    with pytest.raises(DataError, match="install Python with its sources"):
        texts.text("no_such_package", "train")


def _islands(image):
    """Number the pixels that are not empty, joined over gaps of one pixel: {place: island}."""
    places = {tuple(p) for p in np.argwhere(image != pathfinder.EMPTY)}
    island = {}
    for number, start in enumerate(sorted(places)):
        todo = [start] if start not in island else []
        while todo:
            y, x = todo.pop()
            if (y, x) in island:
                continue
            island[y, x] = number
            near = itertools.product(range(-2, 3), repeat=2)
            todo += [(y + i, x + j) for i, j in near if (y + i, x + j) in places]
    return island


def test_dots_are_joined_or_not():
    """By flooding the image: two dots, on one island or on two, as the label says.

    Mutations: APART 1, over which other paths come near; the second dot always on its own
    path; a dash longer than its gap can bridge (DASH - 2 left out too).
    """
    rng, labels = np.random.default_rng(0), []
    for _ in range(60):
        image, joined = pathfinder.draw(rng, PATHS)
        island = _islands(image)
        one, two = (island[tuple(p)] for p in np.argwhere(image == pathfinder.DOT))
        assert (one == two) == joined
        assert len(set(island.values())) == 2 + PATHS.num_distractors
        labels.append(joined)
    assert 15 < sum(labels) < 45


def test_the_answers_share_their_pixels():
    """As many pixels of each kind, whatever the answer: counting them says nothing.

    Mutation: a shorter second path where the dots are joined.
    """
    rng, counts = np.random.default_rng(1), collections.defaultdict(list)
    for _ in range(40):
        image, joined = pathfinder.draw(rng, PATHS)
        counts[joined].append(tuple(np.bincount(image.ravel(), minlength=4)))
    assert all(row[pathfinder.DOT] == 2 for rows in counts.values() for row in rows)
    # An end that falls on a gap of the dashes is filled by its dot.
    assert {r[pathfinder.PATH] for r in counts[0]} == {
        r[pathfinder.PATH] for r in counts[1]
    }


def test_what_does_not_fit_is_refused():
    """Mutations: either check left out (an endless search; a row that is no image)."""
    crowded = pathfinder.PathfinderConfig(1, 1, 1.0, 0, side=6, num_distractors=9)
    with pytest.raises(ConfigError, match=r"task\.side=6: no place"):
        pathfinder.draw(np.random.default_rng(0), crowded)
    config = config_lib.load("shared_memory:pathfinder")
    config.model.seq_len = 255
    with pytest.raises(ConfigError, match=r"model\.seq_len=255: .*256 pixels"):
        experiment.resolve(config)
