"""What cells do to a model's weights: exact without noise, as the oracle says with it."""

import dataclasses

import jax
import numpy as np
import oracle_cells
import pytest
import toy

from memoryformer import cim, errors, model
from memoryformer.cim import cells, devices, noise
from memoryformer.model import narrow

CELLS = 100_000
DAY = 86_400.0


def params_of(config, seed=0):
    """Normal weights, without compiling `init`."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(config))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


def moments(values):
    return np.array([values.mean(), values.std()])


def close(ours, theirs, what):
    """Mean and deviation of 1e5 draws each: within five standard errors of the difference."""
    error = np.array([1.0, 0.9]) * max(theirs.std(), 1e-9) * np.sqrt(2 / CELLS)
    assert np.all(np.abs(moments(ours) - moments(theirs)) < 5 * error), what


@pytest.mark.parametrize("projection", ["memory", "dense"])
@pytest.mark.parametrize(
    "device", ["ideal", cells.Gaussian(sigma=0.0), devices.Stuck(share=0.0)], ids=str
)
def test_no_noise_is_the_model_itself(projection, device):
    """To the bit. Mutation: `plus - minus` times `largest` also where no cell is stuck."""
    config = toy.model_config(projection)
    params = params_of(config)
    params["head"]["kernel"][0, 0] = -0.0  # whose sign a sum with 0 would lose
    same = cim.perturb(config, params, device, DAY, 3)
    for before, after in zip(
        jax.tree.leaves(params), jax.tree.leaves(same), strict=True
    ):
        assert before.tobytes() == np.asarray(after).tobytes()


def test_only_weights_change_and_draws_hang_on_nothing_else():
    """Norms, biases and the embedding stay; the noise of one layer is that of the seed and its
    name. Mutations: the role in the place of the path; `roles` not looked at."""
    config = toy.model_config("memory")
    params = params_of(config)
    roles = model.param_roles(config)
    assert roles["head"]["kernel"] == "head" and roles["embed"]["embedding"] == ""
    block = roles["blocks"]["0"]
    assert block["mixer"]["qkv"] == {"tables": "tables", "bias": ""}
    dense = model.param_roles(toy.model_config("dense"))["blocks"]["1"]
    assert dense["ffn"]["up"] == {"kernel": "dense", "bias": ""}
    gaussian = cells.Gaussian(sigma=0.1)
    noisy = cim.perturb(config, params, gaussian, 0.0, 1)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, noisy)
    assert changed == jax.tree.map(bool, roles)
    only = dataclasses.replace(gaussian, roles=("tables",))
    tables = cim.perturb(config, params, only, 0.0, 1)
    assert tables["head"]["kernel"] is params["head"]["kernel"]
    names = ("blocks", "1", "ffn", "up", "tables")
    first, second = noisy, tables
    for name in names:
        first, second = first[name], second[name]
    np.testing.assert_array_equal(first, second)
    # Layers of one shape draw apart.
    difference = [
        noisy["blocks"][i]["ffn"]["up"]["tables"]
        - params["blocks"][i]["ffn"]["up"]["tables"]
        for i in "01"
    ]
    correlation = np.corrcoef(difference[0].ravel(), difference[1].ravel())[0, 1]
    assert abs(correlation) < 0.2
    again = cim.perturb(config, params, gaussian, 0.0, 1)
    other = cim.perturb(config, params, gaussian, 0.0, 2)
    assert jax.tree.all(jax.tree.map(np.array_equal, noisy, again))
    assert np.any(other["head"]["kernel"] != noisy["head"]["kernel"])


@pytest.mark.parametrize("r", [0.0, 0.004, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seconds", [0.0, 1.0, DAY, 31_536_000.0])
def test_moments_of_pcm(r, seconds):
    """Programming, drift and reading, at 1e5 cells. Mutations: `seconds` for `seconds + START`
    under the root; the clip of mu at .0495; q of `r` and not of what was programmed."""
    shares = np.full(CELLS, r)
    rng = np.random.default_rng(5)
    ours = devices.Pcm().cells(shares.astype(np.float32), seconds, rng)
    theirs = oracle_cells.pcm(shares, seconds, np.random.default_rng(6))
    close(ours, theirs, (r, seconds))


@pytest.mark.parametrize("seconds", devices.ReRam.TIMES)
def test_moments_of_reram(seconds):
    """Mutation: two coefficients of a day swapped."""
    for r in (0.0, 0.2, 0.6, 1.0):
        shares = np.full(CELLS, r)
        rng = np.random.default_rng(5)
        ours = devices.ReRam().cells(shares.astype(np.float32), seconds, rng)
        theirs = oracle_cells.reram(shares, seconds, np.random.default_rng(6))
        close(ours, theirs, r)


def test_moments_of_the_other_formulas():
    """Weights of a matrix, relative to the largest of their column. Mutations: the border at
    52.5 crossed the other way; sigma of the largest of the whole matrix; the read noise of
    reram left out."""
    for w in (0.0, 0.001, 0.1, 0.29, 0.6, 2.0):
        weights = np.full((CELLS, 2), w, np.float32) * np.float32([1, -1])
        largest = np.float32([[2.0, 4.0]])
        for column, sign in enumerate((1, -1)):
            top = float(largest[0, column])
            normal = np.random.default_rng(6).standard_normal(CELLS)
            rng = np.random.default_rng(5)
            ours = devices.AfmPcm().held(weights, largest, 0.0, rng)
            theirs = oracle_cells.afm_pcm(
                weights[:, column].astype(float), top, np.random.default_rng(6)
            )
            close(ours[:, column], theirs, ("afm_pcm", w))
            ours = cells.Gaussian(sigma=0.05).held(weights, largest, 0.0, rng)
            close(ours[:, column], sign * w + 0.05 * top * normal, ("gaussian", w))
            ours = devices.ReRam().held(weights, largest, 1.0, rng)[:, column]
            full = oracle_cells.reram(
                np.full(CELLS, w / top), 1, np.random.default_rng(7)
            )
            zeros = oracle_cells.reram(np.zeros(CELLS), 1, np.random.default_rng(8))
            theirs = sign * top * (full - zeros) + 0.01 * top * normal
            close(ours, theirs, ("reram", w))


def test_drift_is_compensated_as_a_whole():
    """The factor is the sum of magnitudes at first over that at t; without it a year costs
    two fifths of every weight. Mutations: the factor upside down; of signed sums."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((400, 250), np.float32)
    largest = np.abs(weights).max(0, keepdims=True)
    year = 31_536_000.0
    plain = devices.Pcm(compensate=False).held(
        weights, largest, year, np.random.default_rng(1)
    )
    scaled = devices.Pcm().held(weights, largest, year, np.random.default_rng(1))
    factors = scaled[np.abs(plain) > 1e-3] / plain[np.abs(plain) > 1e-3]
    assert np.ptp(factors) < 1e-4  # one for all
    plus, minus = np.maximum(weights / largest, 0), np.maximum(-weights / largest, 0)
    oracle = np.random.default_rng(2)
    at = [
        np.abs(
            oracle_cells.pcm(plus.astype(float), t, oracle)
            - oracle_cells.pcm(minus.astype(float), t, oracle)
        ).sum()
        for t in (0.0, year)
    ]
    assert factors.mean() == pytest.approx(at[0] / at[1], rel=0.01)
    slope = [np.vdot(w, weights) / np.vdot(weights, weights) for w in (plain, scaled)]
    assert slope[0] < 0.65 and 0.9 < slope[1] < 1.1


def test_stuck_cells_and_flipped_bits():
    """How many, and where they end. Mutations: all of them stuck at 0; bits of one byte of
    eight; bits of a copy of the weights (`ascontiguousarray` left out)."""
    config = toy.model_config("memory", embed_dim=64, code_bits=8)
    params = params_of(config)
    before = params["blocks"]["0"]["mixer"]["qkv"]["tables"]
    stuck = cim.perturb(config, params, devices.Stuck(share=0.01), 0.0, 1)
    after = stuck["blocks"]["0"]["mixer"]["qkv"]["tables"]
    share = (before != after).mean()
    # Of two cells: the one in use at 0 or full, the other full; stuck at 0 it changes nothing.
    assert share == pytest.approx(0.015, rel=0.05)
    tops = np.abs(before).max(axis=(1, 2, 3))[:, None, None, None]
    full = (before != after) & (after != 0)
    ratio = np.abs(after / tops)[full]
    assert np.mean(ratio > 0.99999) == pytest.approx(0.5, abs=0.06)
    none = cim.perturb(config, params, devices.Flips(rate=0.0), 0.0, 1)
    int8 = narrow.WeightKinds("int8", "int8", "int8")
    rounded = narrow.round_weights(config, params, int8)
    assert jax.tree.all(jax.tree.map(np.array_equal, none, rounded))
    flipped = cim.perturb(config, params, devices.Flips(rate=1e-3), 0.0, 1)
    rows = np.abs(before).reshape(*before.shape[:2], -1).max(-1) / 127
    qkv = [p["blocks"]["0"]["mixer"]["qkv"]["tables"] for p in (flipped, rounded)]
    check_single_bits(qkv[0] - np.asarray(qkv[1]), rows[..., None, None])
    wide = toy.model_config("dense", embed_dim=64, vocab_size=2048)
    params = params_of(wide)
    rounded = narrow.round_weights(wide, params, int8)["head"]["kernel"]
    flipped = cim.perturb(wide, params, devices.Flips(rate=1e-3), 0.0, 1)
    columns = np.abs(params["head"]["kernel"]).max(0, keepdims=True) / 127
    check_single_bits(flipped["head"]["kernel"] - np.asarray(rounded), columns)


def check_single_bits(difference, step):
    """One weight in a thousand has moved by each power of two, in steps."""
    steps = difference / step
    moved = np.rint(np.abs(steps[np.abs(steps) > 0.5])).astype(int)
    sizes, counts = np.unique(moved, return_counts=True)
    single = dict(zip(sizes.tolist(), counts.tolist(), strict=True))
    expected = difference.size * 1e-3
    for bit in range(8):
        assert single.get(1 << bit, 0) == pytest.approx(expected, rel=0.35), bit


def test_scales_of_tables_are_those_of_a_table_or_of_a_column():
    """Mutation: axes (0, 1) for 'table'."""
    config = toy.model_config("memory")
    params = params_of(config)
    tables = params["blocks"]["0"]["ffn"]["up"]["tables"]
    tables *= np.arange(1, 5, dtype=np.float32)[:, None, None]
    spread = {}
    for scale in cells.TABLE_SCALES:
        device = cells.Gaussian(sigma=0.1, table_scale=scale)
        noisy = cim.perturb(config, params, device, 0.0, 0)
        difference = noisy["blocks"]["0"]["ffn"]["up"]["tables"] - tables
        spread[scale] = difference.std(axis=(1, 2))
    largest = np.abs(tables).max(axis=(1, 2))
    np.testing.assert_allclose(spread["table"], 0.1 * largest, rtol=0.15)
    columns = np.abs(tables).max(axis=(0, 1))
    np.testing.assert_allclose(
        spread["column"], 0.1 * np.sqrt(np.mean(columns**2)), rtol=0.15
    )


def test_what_cannot_be_is_refused():
    """One line each. Mutation: `reram` held at its last time for a year."""
    config = toy.model_config()
    params = toy.numpy_params(config)
    for device, seconds, message in (
        ("pmc", 0.0, "did you mean 'pcm'"),
        ("pcm", -1.0, "--seconds=-1.0"),
        ("pcm", float("nan"), "--seconds=nan"),
        ("reram", 31_536_000.0, "1 s to 2 days"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            noise.perturb(config, params, device, seconds)
    for cls, fields in (
        (cells.Gaussian, {"sigma": -0.1}),
        (devices.Stuck, {"share": 2.0}),
        (devices.Flips, {"rate": float("nan")}),
        (devices.Pcm, {"roles": ("norms",)}),
        (devices.Pcm, {"table_scale": "row"}),
    ):
        with pytest.raises(errors.ConfigError):
            cls(**fields)
