"""The screened head: the int8 head's largest logits, whatever they are, bit for bit."""

import jax
import numpy as np
import pytest

from memoryformer.ops.lookup import narrow, screened
from memoryformer.ops.lookup import native as lookup_native

needs_compiler = pytest.mark.skipif(
    not lookup_native.available(), reason="no C++ compiler"
)
V, D = 1500, 72


@pytest.fixture(autouse=True)
def default_settings():
    yield
    if lookup_native.available():
        lookup_native.configure()


def head(outputs=V, width=D, decay=0.85, seed=0):
    """Rows that lie mostly in a few directions, as those of trained heads do: [D, V]."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.standard_normal((width, width)))[0]
    spectrum = decay ** np.arange(width)
    rows = random.standard_normal((outputs, width)) * spectrum @ basis
    rows *= random.uniform(0.5, 2, (outputs, 1))
    return np.ascontiguousarray(rows.T, np.float32), basis


def states(count, basis, decay=0.85, seed=1):
    random = np.random.default_rng(seed)
    spectrum = decay ** np.arange(len(basis))
    x = random.standard_normal((count, len(basis))) * spectrum @ basis
    return (30 * x).astype(np.float32)


def largest(logits, k):
    """A stable sort: of equals the lower place."""
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(logits, order, axis=-1), order


def check(x, stored, k=1, **options):
    """`top` against all logits of the int8 head, and what it read."""
    y = np.asarray(narrow.product(x, stored.exact))
    before = screened.counts()
    values, places = screened.top(x, stored, k, **options)
    after = screened.counts()
    wanted = largest(y, k)
    np.testing.assert_array_equal(np.asarray(values), wanted[0])
    np.testing.assert_array_equal(np.asarray(places), wanted[1])
    if k == 1:
        np.testing.assert_array_equal(np.asarray(places)[:, 0], y.argmax(-1))
    return {name: getattr(after, name) - getattr(before, name) for name in vars(after)}


@needs_compiler
@pytest.mark.parametrize("instructions", lookup_native.INSTRUCTION_SETS)
def test_the_largest_logits_are_the_int8_heads(instructions):
    """1 to 17 vectors, the largest and the 12 largest, at every threshold; most rows stay unread.

    Mutations: half of any of the three parts of the bound (the next tests have the smallest);
    `>` for `>=` at the threshold; the last tile left out.
    """
    lookup_native.configure(instruction_set=instructions)
    matrix, basis = head()
    stored = screened.pack(matrix)
    x = states(17, basis)
    for k in (1, 12):
        read = check(x, stored, k)
        assert read["vectors"] == 17
        assert read["rows"] < 17 * 0.2 * V and read["whole"] < 3
    for share in (0.0, 0.01, 0.2, 1.0):
        read = check(x, stored, most_rows=share)
        assert read["whole"] == 17 or share > 0
    for count in (1, 2, 16):
        check(x[:count], stored)


@needs_compiler
def test_ragged_shapes():
    """Widths below a block and above a group, one row; and more vectors than are screened.

    Mutation: the columns after the last whole block, or the last group, left out.
    """
    for outputs, width in (
        (1217, 41),
        (1100, 300),
        (100, 16),
        (5, 3),
        (900, 4),
        (1, 1),
    ):
        matrix, basis = head(outputs, width)
        stored = screened.pack(matrix)
        check(states(5, basis), stored, min(2, outputs), most_rows=1.0)
    check(states(narrow.MAX_VECTORS + 1, basis), stored)


def unpacked(stored):
    """A [V, D] and n, a, e, c as the tiles hold them, in float64."""
    outputs, width = stored.exact.values.shape
    lead, tiles = stored.lead, np.asarray(stored.tiles)
    blocks = -(-(width - lead) // 16)
    sizes = np.cumsum([16 * lead, 64 * blocks, 16 * -(-blocks // 4) * 4])
    first, others, norms, floats = np.split(tiles, sizes, axis=1)

    def rows(part, bits=8):
        part = part.reshape(len(tiles), -1, 16, 4)
        part = np.stack([part >> m & 2**bits - 1 for m in range(0, 8, bits)], 2)
        part = part.reshape(len(tiles), -1, 16, 4).swapaxes(1, 2)
        return part.reshape(len(tiles) * 16, -1)[:outputs].astype(np.float64)

    floats = np.ascontiguousarray(floats).view(np.float32).reshape(-1, 6, 16)
    floats = floats.swapaxes(0, 1).reshape(6, -1)[:, :outputs].astype(np.float64)
    scale, step, norm_scale = floats[:3, :, None]
    kept = [(rows(first) - 128) * scale, (2 * rows(others, 2) - 3) * step]
    norms = (rows(norms) - 128)[:, :blocks] * norm_scale
    return np.concatenate(kept, axis=1)[:, :width], norms, *floats[3:]


def lengths(x, start=0, size=None):
    """|x| of each row; of each block of `size` columns from `start` on."""
    if size is None:
        return np.linalg.norm(x, axis=1)
    ends = range(start, x.shape[1], size)
    return np.stack([np.linalg.norm(x[:, i : i + size], axis=1) for i in ends], axis=1)


def exactly(matrix):
    """An int8 matrix as it is, by output, in float64."""
    values, scales = np.asarray(matrix.values), np.asarray(matrix.scales, np.float64)
    return values * scales[:, None]


def test_what_is_stored_bounds_every_product():
    """Each stored length is at least its own and hardly more; so |y - q . A| <= the bound, in
    float64, and a third of it would not do.

    Mutations: a norm rounded down; e_v left out; c_v halved; B's rounding not in W'.
    """
    matrix, basis = head()
    stored = screened.pack(matrix)
    wide, rotation = exactly(stored.exact), exactly(stored.rotation).T  # B
    rotated = np.linalg.solve(rotation, wide.T).T  # W'
    kept, norms, a, e, c = unpacked(stored)
    lead, left = stored.lead, rotated - kept
    exact = (kept[:, :lead], left[:, :lead], kept[:, lead:])
    for bound, part in zip((a, e, c), exact, strict=True):
        assert (bound >= lengths(part)).all()
        assert (bound <= 1.001 * lengths(part) + 1e-6).all()
    of_blocks = lengths(left, lead, 16)
    assert (norms >= of_blocks).all()
    assert (norms <= of_blocks + 1.01 * of_blocks.max(1, keepdims=True) / 127).all()

    x = states(200, basis)
    z = x.astype(np.float64) @ rotation
    q = np.zeros_like(z)
    groups = [*range(0, lead, 64), *range(lead, D, 64)]
    for start, end in zip(groups, [*groups[1:], D], strict=True):
        unit = np.abs(z[:, start:end]).max(1, keepdims=True) / 127
        q[:, start:end] = np.rint(z[:, start:end] / unit) * unit
    bound = lengths(z, lead, 16) @ norms.T + np.outer(lengths((z - q)[:, lead:]), c)
    bound += np.outer(lengths((z - q)[:, :lead]), a) + np.outer(lengths(z[:, :lead]), e)
    error = np.abs(x.astype(np.float64) @ wide.T - q @ kept.T)
    assert (error <= bound + 1e-9).all() and (error > bound / 3).any()


def aligned(stored):
    """States along what the lead leaves of some rows: the bound is met there."""
    rotation, wide = exactly(stored.rotation).T, exactly(stored.exact)
    rotated = wide @ np.linalg.inv(rotation).T
    rows = rotated[::50].copy()
    rows[:, : stored.lead] *= 0.2
    return (30 * rows @ np.linalg.inv(rotation)).astype(np.float32)


@needs_compiler
def test_states_that_meet_the_bound():
    """Of one block of columns too. Mutation: half the bound, in any of its places."""
    stored = screened.pack(head(decay=0.97)[0])
    x = aligned(stored)
    check(x, stored, most_rows=1.0)
    check(x, stored, k=3, most_rows=1.0)


@needs_compiler
def test_adversarial_logits():
    """Ties, one huge row, all equal, zeros, extremes and what is no number.

    Mutations: of equals the higher place; a vector of zeros screened; NaN below numbers.
    """
    matrix, basis = head()
    x = states(6, basis)
    x[1], x[2] = 0, x[2] * 1e-25
    x[3] *= 1e25
    twins = matrix.copy()
    twins[:, 700:1400] = twins[:, :700]
    check(x, screened.pack(twins), k=1)
    check(x, screened.pack(twins), k=4)
    huge = matrix.copy()
    huge[:, 901] *= 1e6
    check(x, screened.pack(huge), k=2)
    check(x, screened.pack(np.repeat(matrix[:, :1], V, axis=1)), k=2)
    check(x, screened.pack(np.zeros_like(matrix)), k=2)
    check(x, screened.pack(1e-30 * matrix), k=2)
    stored = screened.pack(matrix)
    for value in (np.nan, np.inf):
        x[0, 3] = value
        y = np.asarray(narrow.product(x, stored.exact))
        _, places = screened.top(x, stored)
        np.testing.assert_array_equal(np.asarray(places)[:, 0], y.argmax(-1))
    with pytest.raises(ValueError, match="has weights that are not finite"):
        screened.pack(np.full((D, 20), np.inf, np.float32))
    for k in (0, V + 1):
        with pytest.raises(ValueError, match=f"k={k}: must be in"):
            screened.top(x, stored, k)


@needs_compiler
def test_all_rows_are_read_where_nothing_is_gained():
    """Decided at a part of the rows, for each vector: bytes of all, and of a tenth of the tiles.

    Mutations: no decision before the end; all vectors leave with the first; those that stay
    are given the integers of those that left.
    """
    outputs = 16 * 64 * 12
    matrix, basis = head(outputs)
    stored = screened.pack(matrix)
    random = np.random.default_rng(0)
    x = states(5, basis)
    x[[1, 2, 4]] = (
        random.standard_normal((3, 30)) @ basis[-30:]
    )  # the lead says nothing
    read = check(x, stored)
    assert read["whole"] == 3 and read["rows"] < 3 * outputs + 100
    read = check(x[[1, 2, 4]], stored)
    assert read["whole"] == 3
    tiles, rows = np.asarray(stored.tiles).nbytes, outputs * (D + 4)
    assert rows < read["bytes"] < rows + 0.1 * tiles + 2 * D * D


@needs_compiler
def test_inside_jit_and_without_a_compiler(monkeypatch):
    """Leading axes are kept. Mutation: a sort that is not stable, in XLA."""
    matrix, basis = head(200)
    matrix[:, 100:] = matrix[:, :100]
    stored = screened.pack(matrix)
    x = states(6, basis).reshape(2, 3, D)
    native = jax.jit(screened.top, static_argnums=2)(x, stored, 3)
    for k in (1, 3):
        monkeypatch.setattr(lookup_native, "available", lambda: False)
        in_xla = screened.top(x, stored, k)
        for one, two in zip(native, in_xla, strict=True):
            assert two.shape == (2, 3, k)
            np.testing.assert_allclose(one[..., :k], two, rtol=1e-5)


def test_sizes_of_what_is_stored():
    """At 128 columns: sixteen in 8 bits, 112 in 2, seven norms of sixteen, six floats a row.

    Mutations: another share for the lead; norms that do not fill a quad.
    """
    stored = screened.pack(head(40, 128)[0])
    assert stored.lead == 16
    assert stored.tiles.shape == (3, 16 * (16 + 112 // 4 + 8 + 6 * 4))
    for width, lead in ((1, 4), (32, 4), (33, 8), (72, 12), (96, 12), (97, 16)):
        assert screened.pack(head(3, width)[0]).lead == lead


def test_two_bits_are_the_nearest_of_four_levels():
    """-3, -1, 1 and 3 steps, a step 0.4979 deviations; of a row of zeros the step is 0.

    Mutations: any number of `_two_bits`.
    """
    rows = np.random.default_rng(0).standard_normal((5, 200))
    rows[3] = 0
    bits, steps = screened._two_bits(rows, 150)
    wanted = 0.9957 / 2 * np.sqrt((rows**2).sum(axis=1) / 150)
    np.testing.assert_allclose(steps, wanted, rtol=1e-6)
    levels = np.array([-3, -1, 1, 3]) * steps[:, None].astype(np.float64)
    nearest = np.abs(rows[:, :, None] - levels[:, None]).argmin(axis=2)
    real = steps > 0
    np.testing.assert_array_equal(bits[real], nearest[real])
    assert steps[3] == 0 and real.sum() == 4


def test_what_rounding_of_floats_may_add():
    """The documented bound, in Python's numbers. Mutations: any number of `_slack`."""
    for width in (8, 72, 1000):
        terms = (width + 7) // 8 + 64
        gamma = terms * 2**-24 / (1 - terms * 2**-24)
        groups = 3 * (width / 64 + 18) * 2**-24 * width**0.5
        for longest in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 5)):
            rows, rotated, kept = longest
            wanted = gamma * (rows + width**0.5 * rotated) + groups * kept
            wanted += 1e-9 * width * (rows + rotated)
            slack = screened._slack(width, np.array(longest, float))
            assert wanted <= slack <= wanted * (1 + 2e-6)


def test_one_largest_unless_more_are_wanted():
    """Mutation: another default; `most_rows` left out."""
    matrix, basis = head(64, 16)
    stored = screened.pack(matrix)
    values, places = screened.top(states(3, basis), stored)
    assert values.shape == places.shape == (3, 1)
    assert places.dtype == np.int32 and values.dtype == np.float32
    assert screened.MOST_ROWS == 0.4  # measured; the page of narrow weights says why
