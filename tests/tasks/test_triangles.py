"""Triangles: labels are right, and neither size nor order tells them."""

import itertools

import numpy as np
import pytest

from memoryformer.errors import ConfigError
from memoryformer.tasks import triangles

OPTIONS = triangles.TrianglesConfig(
    1, batch_size=200, learning_rate=1e-3, warmup_steps=0
)


def _sides(points):
    """Sides between three clusters that are found again: points within 2 of each other."""
    clusters = []
    for point in points:
        near = [c for c in clusters if min(abs(c - point)) <= 2 + 1e-3]
        (clusters.append(np.array([point])) if not near else None)
        for i, c in enumerate(clusters):
            if near and c is near[0]:
                clusters[i] = np.append(c, point)
    assert len(clusters) == 3 and all(len(c) == triangles.POINTS for c in clusters)
    means = [c.mean() for c in clusters]
    return sorted(abs(a - b) for a, b in itertools.combinations(means, 2))


def test_labels():
    """From the points: clusters, their means, three sides as complex numbers.

    Mutations: a turn of 100 degrees; others without the ratio; sides from 10.
    """
    data = triangles.batch(OPTIONS, 0, "train")
    points = (data["inputs"] + 1) * triangles.SIZE / 2
    for row, label in zip(points, data["labels"], strict=True):
        short, _, long = _sides(row[:, 0] + 1j * row[:, 1])
        assert 14.5 < short and long < 41.5  # means are about 1/4 off
        assert (long / short < 1.12) == (label == 1)
    assert points.min() >= -1e-4 and points.max() <= 64 + 1e-4
    assert 70 < data["labels"].sum() < 130


def test_centres():
    """Exactly. Mutation: the ratio of the two shorter sides."""
    labels = np.arange(400) % 2
    length = triangles.sides(triangles.centres(np.random.default_rng(0), labels, 1.2))
    ratio = length.max(axis=1) / length.min(axis=1)
    np.testing.assert_allclose(ratio[labels == 1], 1, rtol=1e-9)
    assert 1.2 <= ratio[labels == 0].min() < 1.25
    assert length.min() >= 16 and length.max() <= 40


def test_points_come_in_no_order():
    """And from seed, step and split. Mutation: clusters one after the other."""
    data = triangles.batch(OPTIONS, 0, "train")
    points = data["inputs"][:, :9, 0] + 1j * data["inputs"][:, :9, 1]
    one_cluster_first = np.abs(points[:, :8] - points[:, :1]).max(axis=1) < 4.1 / 64
    assert one_cluster_first.mean() < 0.05
    again = triangles.batch(OPTIONS, 0, "train")
    np.testing.assert_array_equal(again["inputs"], data["inputs"])
    other = triangles.batch(OPTIONS, 0, "validation")
    assert (other["inputs"] != data["inputs"]).any()


@pytest.mark.parametrize("ratio", [1.0, 2.1])
def test_ratios_that_cannot_be_are_refused(ratio):
    """Mutation: the check left out."""
    with pytest.raises(ConfigError, match=rf"task\.ratio={ratio}: must be above 1"):
        triangles.TrianglesConfig(
            1, batch_size=2, learning_rate=1.0, warmup_steps=0, ratio=ratio
        )
