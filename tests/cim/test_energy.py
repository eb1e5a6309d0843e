"""Energy and time of a token: hand sums, the model's own shapes, where memory layers lose."""

import pytest

from memoryformer import accounting, errors, model
from memoryformer.cim import constants, energy, tables, technologies

# D = F = 1024, tau = 8: the layer that the hand sums are of.
WIDTH, TABLES, BUCKETS, BITS = 1024, 128, 256, 8


def nano(picojoules):
    return picojoules / 1e3


def config(projection="memory", **fields):
    sizes = {
        "vocab_size": 512,
        "embed_dim": 64,
        "num_layers": 2,
        "num_heads": 2,
        "seq_len": 32,
        "projection": projection,
        "ffn_activation": "gelu" if projection == "dense" else "none",
        "output_projection": projection == "dense",
    }
    return model.ModelConfig(**(sizes | fields))


def test_every_constant_has_a_source():
    """And a unit, a node and a positive value. Mutation: a source of ''."""
    for name, constant in constants.CONSTANTS.items():
        assert constant.value > 0, name
        for field in ("unit", "node", "source"):
            assert getattr(constant, field).strip(), (name, field)
        assert constant.node == "-" or "ours" not in constant.source, name
        if constant.node == "-":
            assert constant.source.startswith("ours"), name
    for name, technology in technologies.TECHNOLOGIES.items():
        assert set(technology.constants) <= constants.CONSTANTS.keys(), name
    text = tables.constants()
    assert text.count("\n") == len(constants.CONSTANTS) + 2


def test_a_digital_layer_is_the_hand_sum():
    """M1: 1.05 Mbit read and 131k multiply-adds a token; dense: all weights, once for a batch.

    Mutations: `read` without the bits of a value; int8 additions for int32; the batch shares
    rows; it does not share dense weights.
    """
    sizes = (TABLES, BUCKETS, WIDTH, BITS)
    for name, row_nj, dense_nj in (("edram", 83.9, 671.1), ("lpddr4", 8389, 67109)):
        memory = technologies.TECHNOLOGIES[name]
        rows = technologies.rows(memory, sizes, 1)
        assert nano(rows.read) == pytest.approx(row_nj, rel=1e-3)
        assert nano(rows.arithmetic) == pytest.approx(39.3, rel=1e-3)
        assert nano(rows.hashing) == pytest.approx(TABLES * BITS * 1.53 / 1e3)
        dense = memory.product(WIDTH, WIDTH, 1)
        assert nano(dense.read) == pytest.approx(dense_nj, rel=1e-4)
        assert nano(dense.arithmetic) == pytest.approx(314.6, rel=1e-3)
        # At batch 8 = tau both read as much: the advantage is gone.
        eight = technologies.rows(memory, sizes, 8)
        assert eight.read == rows.read == memory.product(WIDTH, WIDTH, 8).read
        # From C on a batch reads every table whole.
        many = technologies.rows(memory, sizes, 4 * BUCKETS)
        assert many.read == rows.read / 4 and many.arithmetic == rows.arithmetic


def test_an_analog_layer_is_the_hand_sum():
    """Chips by the multiply-add, ISAAC from its parts: .417 + .104 + .005 pJ.

    Mutations: one operation a multiply-add; columns without the 4 cells of a weight; a drive
    for each tile of rows.
    """
    for name, nj in (
        ("neurram_6_4", 131), ("neurram_10_8", 326), ("hermes_1phase", 215),
        ("hermes_4phase", 846), ("isaac", 552),
    ):  # fmt: skip
        work = technologies.TECHNOLOGIES[name].product(WIDTH, WIDTH, 1)
        assert nano(work.conversion) == pytest.approx(nj, rel=5e-3), name
    each = technologies.Crossbar().product(WIDTH, WIDTH, 1).conversion / WIDTH**2
    assert each == pytest.approx(0.25 * 1.667 + 0.25 * 0.41667 + 0.25 * 0.021, rel=1e-6)
    assert technologies.Crossbar().product(WIDTH, WIDTH, 1).ns == 800
    hermes = technologies.TECHNOLOGIES["hermes_1phase"].product(WIDTH, WIDTH, 1)
    assert hermes.ns == pytest.approx(2 * 64 * 256**2 / 63.1e3)


@pytest.mark.parametrize(("bits", "ratio"), [(4, 4), (8, 32)])
def test_tables_inside_crossbars_lose(bits, ratio):
    """2^tau / tau times the conversions of the dense layer: with 128 rows and D = 1024 to the
    digit. Mutation: conversions of the K driven rows only."""
    crossbar = technologies.Crossbar()
    num_tables = WIDTH // bits
    dense = crossbar._converted(WIDTH, WIDTH, driven=0)
    inside = crossbar._converted(num_tables * 2**bits, WIDTH, driven=0)
    assert inside.conversion / dense.conversion == ratio
    whole = crossbar.tables(num_tables, 2**bits, WIDTH)
    assert (
        whole.conversion > 0.75 * ratio * crossbar.product(WIDTH, WIDTH, 1).conversion
    )
    chip = technologies.TECHNOLOGIES["hermes_4phase"]
    lost = chip.tables(num_tables, 2**bits, WIDTH).conversion
    assert lost == ratio * chip.product(WIDTH, WIDTH, 1).conversion


@pytest.mark.parametrize("projection", ["memory", "dense"])
@pytest.mark.parametrize("mixer", ["softmax", "luna"])
def test_rows_are_those_of_the_model_and_of_the_accounting(projection, mixer):
    """Values read, products and stored weights agree with `accounting.count`, which counts
    them from formulas. Mutations: one block counted; mixing of one layer; the head left out."""
    this = config(projection, mixer=mixer)
    rows = {row.layer: row for row in energy.per_token(this, "edram", 1)}
    counted = accounting.count(this, value_bytes=1)
    layers = [row for row in rows.values() if row.kind != "digital"]
    read = sum(row.read_pj for row in layers) / 0.08 / 8
    expected = counted.table_bytes_read_per_token + counted.dense_bytes
    assert read == pytest.approx(expected)
    products = sum(row.arithmetic_pj for row in layers) / 0.3
    in_blocks = counted.block.projections_exact * this.num_layers
    head = counted.head_multiply_adds
    assert products == pytest.approx((in_blocks + head) / this.seq_len)
    stored = sum(row.stored_bits for row in layers) / 8
    weights = counted.parameters.tables + counted.parameters.dense
    assert stored == weights + counted.parameters.head
    mixing = rows["mixing and its state"]
    depth, length = this.num_layers, this.seq_len
    assert mixing.arithmetic_pj == pytest.approx(
        0.3 * depth * counted.block.mixing / length
    )
    assert mixing.read_pj == pytest.approx(8 * 0.08 * counted.decode_state_bytes)
    assert {row.batch for row in rows.values()} == {1}
    whole = energy.total(tuple(rows.values()))
    assert whole == pytest.approx(sum(row.total_pj for row in rows.values()))


def test_batches_are_where_memory_layers_lose():
    """On a memory off the chip a dense twin costs more than the tables at batch 1, and as much
    at batch tau: its products then decide. Every row prints its batch. Mutation: `batch` left
    out of `product`."""
    costs = {}
    for batch in (1, 8, 64):
        for projection in ("memory", "dense"):
            this = config(projection, embed_dim=512, num_heads=8, vocab_size=16)
            rows = energy.per_token(this, "lpddr4", batch)
            assert all(row.batch == batch for row in rows)
            text = tables.energy(rows).splitlines()
            column = [c.strip() for c in text[0].split("|")].index("batch")
            printed = {
                line.split("|")[column].strip() for line in text[2 : 3 + len(rows)]
            }
            assert printed == {str(batch)}
            layers = [row for row in rows if row.layer.startswith(("mixer.", "ffn."))]
            costs[projection, batch] = sum(row.read_pj for row in layers)
    assert costs["memory", 1] == costs["memory", 64]
    assert costs["dense", 1] > 8 * costs["memory", 1]
    assert costs["dense", 64] < costs["memory", 64]


def test_every_technology_gives_rows_with_sources():
    """Mutation: a technology without its memory's constants."""
    this = config("memory", tie_embeddings=True)
    for name, technology in technologies.TECHNOLOGIES.items():
        rows = energy.per_token(this, name, 2)
        assert all(row.sources and row.nodes and row.technology == name for row in rows)
        assert any(row.layer == "head" for row in rows)  # tied: a product all the same
        plain = isinstance(technology, technologies.Memory)
        if plain:
            with pytest.raises(errors.ConfigError, match="has no crossbars"):
                energy.per_token(this, name, 1, "crossbar")
        else:
            inside = energy.per_token(this, name, 1, "crossbar")
            assert energy.total(inside) > energy.total(energy.per_token(this, name))
    recurrent = config("memory", recurrence="rmt")
    assert any(
        row.layer == "recurrence" for row in energy.per_token(recurrent, "edram")
    )
    for arguments in (("edarm", 1), ("edram", 0), ("edram", 1, "row")):
        with pytest.raises(errors.ConfigError):
            energy.per_token(this, *arguments)
