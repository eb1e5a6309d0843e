"""A network of glimpses and the table of its steps, in whole numbers that can be counted."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import config as config_lib
from memoryformer import errors
from memoryformer.tasks import experiment, trainer
from memoryformer.tasks.memorised import __main__ as command
from memoryformer.tasks.memorised import digits, network, study, table

pytest.importorskip("sklearn")
SMALL = network.NetworkConfig(
    state_size=6, state_bits=2, num_glimpses=3, hidden=16, hidden_glimpse=12
)
OPTIONS = network.MemorisedConfig(4, batch_size=32, learning_rate=1e-2, warmup_steps=1)


@pytest.fixture(scope="module")
def params():
    """Weights with which states and corners vary."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: network.Memorised(SMALL, OPTIONS).init(0))
    drawn = jax.tree.map(
        lambda p: np.float32(rng.normal(size=p.shape) * (2 / p.shape[0]) ** 0.5), shapes
    )
    for layer in drawn.values():
        layer["bias"] *= 0.1
    drawn["W1"]["kernel"] *= 4
    for name in ("U", "W5", "W6", "W9"):  # its inputs are positive
        drawn[name]["kernel"] -= drawn[name]["kernel"].mean(axis=0)
    drawn["W6"]["bias"] += 0.5
    return drawn


def test_the_digits_are_parted_once():
    """898 and 899 images, none in both halves, values in [0, 1], each digit in both.

    Mutations: halves that overlap; an order drawn anew.
    """
    train, held_out = digits.load("train"), digits.load("validation")
    assert (len(train.labels), len(held_out.labels)) == (898, 899)
    for images in (train, held_out):
        assert images.pixels.min() == 0 and images.pixels.max() == 1
        assert set(images.labels) == set(range(10))
    both = {image.tobytes() for image in train.pixels} & {
        image.tobytes() for image in held_out.pixels
    }
    assert len(both) <= 1  # scikit-learn's images are not all different


def test_without_scikit_learn_one_line_says_so(monkeypatch):
    """Mutation: an ImportError in the middle of a run."""
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.ConfigError, match=r"memoryformer-jax\[digits\]"):
        experiment.resolve(config_lib.load("configs/memorised.py"))


def test_a_glimpse_is_a_mean_of_pixels():
    """Written out for every corner; outside of the image there is nothing.

    Mutations: rows and columns exchanged; a wide patch that does not share the centre.
    """
    config = network.NetworkConfig(patch_bits=8)
    image = digits.load("train").pixels[0]
    corners = np.array([(i, j) for i in range(9) for j in range(9)])
    found = network.glimpse(config, np.broadcast_to(image, (81, 8, 8)), corners)
    around = np.zeros((16, 16))
    around[4:12, 4:12] = image
    for (i, j), phi in zip(corners, np.asarray(found), strict=True):
        near = around[i + 3 : i + 5, j + 3 : j + 5].ravel()
        wide = [
            around[i + 2 + a : i + 4 + a, j + 2 + b : j + 4 + b].mean()
            for a in (0, 2)
            for b in (0, 2)
        ]
        np.testing.assert_allclose(phi, [*near, *wide], atol=0.5 / 255 + 1e-6)


def test_locations_and_corners():
    """Mutation: a corner that is rounded down."""
    corners = np.array([[0, 4], [8, 3]])
    location = network.location(corners)
    np.testing.assert_allclose(location, [[-1, 0], [1, -0.25]])
    np.testing.assert_array_equal(network.corner(location + 0.12), corners)
    np.testing.assert_array_equal(network.corner(jnp.array([-3.0, 0.13])), [0, 5])


def oracle(params, pixels, first):
    """The equations of the network in float64, image by image: states, corners, logits."""
    relu = lambda x: np.maximum(x, 0)  # noqa: E731

    def layer(name, x):
        return x @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])

    for image, place in zip(pixels, first, strict=True):
        h, states, corners, logits = np.zeros(6), [], [], []
        for _ in range(3):
            phi = np.asarray(network.glimpse(SMALL, image[None], place[None]))[0]
            g = relu(
                layer("W3", relu(layer("W1", phi)))
                + layer("W4", relu(layer("W2", place / 4 - 1)))
            )
            inner = relu(layer("W5", g) + layer("U", h))
            h = np.round(np.clip(layer("W6", inner), 0, 1) * 3) / 3
            mean = np.tanh(layer("W8", layer_relu := relu(layer("W7", h))))
            assert layer_relu.shape == (12,)
            place = np.round((np.clip(mean, -1, 1) + 1) * 4).astype(int)
            states.append(h)
            corners.append(place)
            logits.append(layer("W9", h))
        yield states, corners, logits


def test_the_network_is_its_equations(params):
    """Mutations: no U; h that is not rounded; the corner of a glimpse one step late."""
    pixels = digits.load("train").pixels[:12]
    first = table.first_corners(12, 0)
    seen = toy.quick_jit(functools.partial(network.episode, SMALL))(
        params, pixels, first
    )
    for i, (states, corners, logits) in enumerate(oracle(params, pixels, first)):
        np.testing.assert_allclose(seen.states[1:, i], states, atol=1e-6)
        np.testing.assert_array_equal(seen.corners[1:, i], corners)
        np.testing.assert_allclose(seen.logits[:, i], logits, atol=1e-5)
    assert len(np.unique(seen.corners[1:])) > 3
    assert len(np.unique(seen.states[1:], axis=1)) > 1


def test_the_policy_gradient_is_reinforce(params):
    """d loss / d (W8's bias) is -weight sum_t (drawn - mean) / std^2 (R - b) (1 - mean^2).

    Mutations: the reward's gradient; the sign; the last location, which nobody looks at;
    a gradient through the drawn location.
    """
    task = network.Memorised(SMALL, OPTIONS)
    batch = task.batch(0, "train")
    std, weight = OPTIONS.policy_std, OPTIONS.policy_weight

    @toy.quick_jit
    def both(p):
        places = batch["pixels"], batch["first"], batch["noise"]
        seen = network.episode(SMALL, p, *places, std)
        return jax.grad(lambda p: task.sums(p, batch)["loss"][0])(p), seen

    grads, seen = both(params)
    seen = jax.device_get(seen)
    correct = np.argmax(seen.logits[-1], axis=-1) == batch["labels"]
    expected = np.zeros(2)
    for t in range(SMALL.num_glimpses - 1):
        inner = np.asarray(seen.states[t + 1]) @ params["W7"]["kernel"]
        hidden = np.maximum(inner + params["W7"]["bias"], 0)
        mean = np.tanh(hidden @ params["W8"]["kernel"] + params["W8"]["bias"])
        slope = batch["noise"][t] / std * (1 - mean**2)
        expected -= weight * slope.T @ (correct - np.asarray(seen.baselines[t]))
    np.testing.assert_allclose(grads["W8"]["bias"], expected, rtol=1e-3, atol=1e-5)
    # Baselines learn from their own error only, and nothing of it reaches h.
    ahead = correct - np.asarray(seen.baselines)
    np.testing.assert_allclose(
        grads["baseline"]["bias"][0], -2 * np.sum(ahead) / SMALL.num_glimpses, rtol=1e-3
    )


def test_batches_follow_from_seed_step_and_split():
    """Held-out images have no noise. Mutations: training images held out; noise for all."""
    task = network.Memorised(SMALL, OPTIONS)
    one, two = task.batch(3, "train"), task.batch(3, "train")
    jax.tree.map(np.testing.assert_array_equal, one, two)
    held_out = task.batch(3, "validation")
    assert np.abs(one["noise"]).max() > 0 == np.abs(held_out["noise"]).max()
    known = {image.tobytes() for image in digits.load("validation").pixels}
    assert {image.tobytes() for image in held_out["pixels"]} <= known


@pytest.mark.parametrize("weights", [table.EQUAL, (30.0, 2.5, 7.0)])
def test_the_table_of_the_images_themselves_is_the_network(params, weights):
    """Every step meets its row at distance 0, and every image gets the network's answer.

    Mutations: rows with the class of the step before; phi left out of the key; corners of the
    glimpse that follows.
    """
    images = digits.load("validation")
    first = table.first_corners(len(images.labels), 3)
    rows, answers = table.steps(SMALL, params, images.pixels, first)
    classes, hits = table.follow(
        SMALL, table.Nearest(rows, weights), images.pixels, first
    )
    assert hits == 1 and (classes == answers).all()
    assert len(np.unique(answers)) > 1 and len(rows.keys) == 3 * len(answers)
    others = rows.of_images(50)
    assert len(others.keys) == 150
    classes, hits = table.follow(
        SMALL, table.Nearest(others, weights), images.pixels, first
    )
    assert hits < 1 and (classes[:50] == answers[:50]).all()


def drawn_table(rng, number):
    """A table of random levels, and the levels of its keys."""
    states, corners = (
        rng.integers(4, size=(number, 6)),
        rng.integers(9, size=(number, 2)),
    )
    patches = rng.integers(4, size=(number, 8))
    keys = table.key_bits(SMALL, states, corners, patches)
    values = table.Values(
        rng.integers(4, size=(number, 6)),
        rng.integers(9, size=(number, 2)),
        rng.integers(10, size=number),
    )
    rows = table.Table(SMALL, keys, values, np.arange(number) // 3)
    return rows, np.concatenate([patches, states, corners], axis=1)


def test_the_nearest_row_is_that_of_the_weighted_distance():
    """In whole numbers, by loops; the image's own rows passed over where asked.

    Mutations: weights in another order; levels as one bit; own rows at distance 0.
    """
    rng = np.random.default_rng(0)
    rows, levels = drawn_table(rng, 40)
    asked, asked_levels = drawn_table(rng, 15)
    weights = (3.0, 1.0, 2.0)
    assert sum(table.widths(SMALL)) == rows.keys.shape[1] == 24 + 18 + 16
    each = np.repeat(weights, [8, 6, 2])
    images = np.arange(15) % 14
    for passed in (None, images):
        found, _ = table.Nearest(rows, weights, passed)(asked.keys)
        for i, query in enumerate(asked_levels):
            distance = [
                np.inf
                if passed is not None and row // 3 == images[i]
                else np.sum(each * np.abs(query - levels[row]))
                for row in range(40)
            ]
            best = int(np.argmin(distance))
            np.testing.assert_array_equal(found.states[i], rows.values.states[best])
            assert found.classes[i] == rows.values.classes[best]


def test_hash_codes_read_means_of_rows():
    """Tables as dictionaries: buckets by the bits they look at, means over the tables that hit.

    Mutations: empty buckets counted in the mean; sums in place of means; the high bit last.
    """
    rng = np.random.default_rng(1)
    rows, _ = drawn_table(rng, 200)
    asked, _ = drawn_table(rng, 60)
    reader = table.Hashed(rows, 5, 7, (3.0, 1.0, 2.0), seed=2)
    places = reader.order.reshape(7, 5)
    assert all(len(set(row)) == 5 for row in places)
    numbers = rows.keys[:, places] @ (1 << np.arange(4, -1, -1))
    np.testing.assert_array_equal(reader.codes(rows.keys), numbers)
    found, hits = reader(asked.keys)
    targets = np.concatenate(
        [rows.values.states, rows.values.corners, np.eye(10)[rows.values.classes]],
        axis=1,
    )
    filled = 0
    for i, key in enumerate(asked.keys):
        read = []
        for bits in places:
            same = (rows.keys[:, bits] == key[bits]).all(axis=1)
            if same.any():
                read.append(targets[same].mean(axis=0))
        filled += len(read)
        mean = np.mean(read, axis=0) if read else targets.mean(axis=0)
        clear = np.abs(mean[:8] - np.floor(mean[:8]) - 0.5) > 1e-5
        whole = np.concatenate([found.states[i], found.corners[i]])
        np.testing.assert_array_equal(whole[clear], np.round(mean[:8])[clear])
        assert mean[8 + found.classes[i]] == pytest.approx(mean[8:].max(), abs=1e-6)
    assert hits == pytest.approx(filled / (7 * 60)) and 0 < hits < 1


def test_weights_say_which_bits_are_looked_at():
    """Mutation: chances that do not follow the weights."""
    rows, _ = drawn_table(np.random.default_rng(2), 10)
    reader = table.Hashed(rows, 8, 50, (1e-9, 1.0, 1e-9))
    assert ((reader.order >= 24) & (reader.order < 42)).all()


def test_tuned_weights_are_the_best_that_were_tried(params):
    """Never worse than equal weights on the images tuned on. Mutation: the worst of them."""
    images = digits.load("train")
    pixels, labels = images.pixels[:60], images.labels[:60]
    first = table.first_corners(60, 0)
    rows, answers = table.steps(SMALL, params, pixels, first)

    def accuracy(weights):
        reader = table.Nearest(rows, weights, np.arange(60))
        classes, _ = table.follow(SMALL, reader, pixels, first)
        return np.mean(classes == answers)

    found = table.tune(rows, pixels, answers, first, 5)
    assert accuracy(found) >= accuracy(table.EQUAL)
    assert table.tune(rows, pixels, answers, first, 0) == table.EQUAL
    assert len(labels) == 60


def test_a_run_is_trained_and_measured(tmp_path, capsys):
    """By the two commands' own ways; a step is no step backwards.

    Mutations: accuracy of the images that have rows; the rows of all images for every share.
    """
    config = config_lib.load("configs/memorised.py:16")
    with config.unlocked():
        config.task.update(
            num_steps=300,
            eval_every=300,
            eval_batches=2,
            warmup_steps=5,
            learning_rate=3e-3,
        )
        config.model.update(hidden=64, hidden_glimpse=32, num_glimpses=3)
        config.metrics.trackers = ""
    rows = trainer.train(config, tmp_path / "run")
    assert rows[-1]["val/accuracy"] > 0.2  # 0.1 is chance
    words = ["memorised", f"--workdir={tmp_path / 'run'}", "--draws=1", "--code_bits=6"]
    words += [f"--output={tmp_path / 'rows.json'}", "--percents=10,100"]
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["rows"] for row in found] == [270, 2694]
    assert capsys.readouterr().out.count("\n") >= 4
    for row in found:
        assert 0.1 < row["network"] < 1 and 0 < row["nearest_hits"] < 1
        assert 0 < row["hashed_hits"] <= 1 and 0 <= row["hashed_tuned"] <= 1
    with pytest.raises(errors.ConfigError, match="a key has 56 bits"):
        study.check(network.NetworkConfig(state_size=16), 60)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"patch_size": 3}, "patch_size=3"),
        ({"state_bits": 9}, "state_bits=9"),
        ({"num_scales": 9}, "num_scales=9"),
        ({"state_size": 0}, "state_size=0"),
    ],
)
def test_sizes_are_checked(fields, said):
    """Mutation: one of the checks left out."""
    with pytest.raises(errors.ConfigError, match=said):
        network.NetworkConfig(**fields)


def test_percents_are_checked(capsys):
    """Mutation: the check left out, and a table of no rows."""
    for percents in ("0", "101", "x", ""):
        with pytest.raises(SystemExit) as ended:
            command.main(["memorised", "--workdir=x", f"--percents=15,{percents}"])
        assert ended.value.code == 2
        assert "expected numbers in (0, 100]" in capsys.readouterr().err
