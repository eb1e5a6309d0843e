"""Models that are dense in some parts and have memory layers in others, and what they hash."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toy
from flax import nnx

from memoryformer import accounting, convert, errors, model
from memoryformer.convert import reference_reader
from memoryformer.evaluation import buckets
from memoryformer.model import front, narrow, parts
from memoryformer.ops import hadamard

MIXED = (
    "ffn@0=memory_block,bits=8,mix=none+hadamard,thresholds; qkv@1-2=memory,mix=orthogonal;"
    "output@0,2=memory,bits=6,mix=grouped; ffn@2=memory,thresholds; qkv@2=dense"
)


def mixed(**fields):
    sizes = {"embed_dim": 24, "num_heads": 3, "num_layers": 3, "code_bits": 4}
    options = {"memory_bias": True, "parts": fields.pop("parts", MIXED)}
    return toy.model_config("mixed", **sizes, projection_options=options, **fields)


def noisy(config, seed=0):
    """Parameters whose thresholds, biases and scales would show a mistake."""
    rng = np.random.default_rng(seed)

    def draw(path, array):
        array = np.asarray(array)
        if path[-1].key in ("signs", "rotation", "order"):
            return array
        return (array + 0.2 * rng.normal(size=array.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, model.init(config))


@pytest.fixture(scope="module")
def example():
    """A half-converted model, its parameters, a batch, its logits by the oracle."""
    config = mixed()
    params, batch = noisy(config), toy.batch(config)
    names = ("inputs", "positions", "segment_ids")
    expected = oracle.transformer(config, params, *(batch[name] for name in names))
    return config, params, batch, expected


def test_a_half_converted_model_is_the_oracles(example):
    """Every mix, a sum, one layer for two, more bits, thresholds. Mutations: thresholds added; signs
    after the transform; a rotation transposed; an order inverted; bits of another part; the first
    layer of a sum alone.
    """
    config, params, batch, expected = example
    found = toy.logits(config, params, batch)
    np.testing.assert_allclose(found, expected[batch["segment_ids"] > 0], atol=2e-5)
    kinds = [[p.kind for p in parts.of_layer(config, i)] for i in range(3)]
    assert kinds == [
        ["dense", "memory", "memory_block"],
        ["memory", "dense", "dense"],
        ["dense", "memory", "memory"],
    ]


def test_a_scan_goes_over_neighbours_that_are_alike(example):
    """Compiled once for each run of them. Mutation: the parts of the first block for all."""
    config, params, batch, expected = example
    for fields in ({"scan_layers": True}, {"remat": "full"}):
        other = dataclasses.replace(config, **fields)
        found = toy.logits(other, params, batch)
        np.testing.assert_allclose(found, expected[batch["segment_ids"] > 0], atol=2e-5)
    alike = mixed(parts="ffn@1-2=memory_block", scan_layers=True)
    loops = str(jax.make_jaxpr(lambda p: logits_of(alike, p))(model.init(alike)))
    assert loops.count("length=1") == 1 and loops.count("length=2") == 1


def logits_of(config, params):
    return model.forward(config, params, jnp.zeros((1, 5), jnp.int32))


def test_the_accounting_counts_it(example):
    """Parameters one by one, operations of a mix, rows of a sum. Mutations: the first block's layers
    for all; a rotation left out; thresholds left out; a bias for each layer of a sum.
    """
    config, params, _, _ = example
    counted = accounting.count(config)
    assert counted.parameters.total == sum(x.size for x in jax.tree.leaves(params))
    first = accounting.projections(config, 0)
    assert first["ffn"].hashing == 2 * 24 + 24 * 3  # n = 8
    assert first["ffn"].values_read == 2 * 3 * 24 and first["ffn"].biases == 4 * 24
    assert accounting.projections(config, 1)["mixer.qkv"].hashing == 24 + 24**2
    rows = 2 * 3 * 24 + 4 * 24 + 6 * 3 * 24 + 4 * 24 + 6 * (6 * 5) + 6 * 24
    assert counted.table_bytes_read_per_token == 2 * rows


def test_an_export_and_its_reader(example, tmp_path):
    """The same numbers, and the same file back. Mutations: any part of a front left out of the
    reader; bits of the config for those of the tables; the first layer of a sum alone.
    """
    config, params, _, _ = example
    convert.save_export(tmp_path, config, params)
    again, read = convert.load_export(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    tokens = np.arange(12)[None] % 13
    one = (np.arange(12)[None], np.ones((1, 12), int))
    expected = oracle.transformer(config, params, tokens, *one)
    reader = reference_reader.load(tmp_path)
    np.testing.assert_allclose(reader.logits(tokens), expected, atol=2e-5)


def test_packed_tables_are_read_alike(example):
    """By the native layer as by the other of rounded tables; and all tables are counted.

    Mutation: the front left out of `NarrowMemoryLayer`.
    """
    config, params, batch, _ = example
    config = dataclasses.replace(config, lookup="auto")
    kinds = narrow.WeightKinds("int8", "int8", "int8")
    stored = narrow.prepare(config, params, kinds)
    rounded = narrow.round_weights(config, params, kinds)
    expected = toy.logits(config, rounded, batch)
    np.testing.assert_allclose(toy.logits(config, stored, batch), expected, atol=2e-5)
    counts = buckets.collect(config, params, [batch])
    assert set(counts) == {
        *("blocks.0.ffn.terms.0", "blocks.0.ffn.terms.1"),
        *("blocks.0.mixer.out", "blocks.1.mixer.qkv"),
        *("blocks.2.mixer.out", "blocks.2.ffn.up", "blocks.2.ffn.down"),
    }


def test_what_is_trained():
    """Thresholds are, by the gradient of the scores; mixes are not. Mutation: `trained` left out."""
    config = mixed(parts="ffn=memory_block,mix=orthogonal,thresholds")
    groups = model.param_groups(config)["blocks"]["0"]["ffn"]
    fixed = {"rotation": "fixed", "thresholds": "undecayed"}
    assert groups == {"tables": "tables", "bias": "undecayed", "front": fixed}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)

    def total(thresholds):
        z = front.transform(x, "none", {"thresholds": thresholds})
        return jnp.sum(jnp.abs(z))

    gradient = jax.grad(total)(jnp.zeros(8))
    np.testing.assert_allclose(gradient, -np.sign(x).sum(0))


@pytest.mark.parametrize("width", [1, 6, 24, 64])
def test_the_hadamard_transform_is_a_rotation(width):
    """And the oracle's matrix. Mutations: not divided by the root; blocks of another size."""
    x = np.random.default_rng(0).normal(size=(2, 3, width)).astype(np.float32)
    y = hadamard.transform(jnp.asarray(x))
    signs = {"signs": np.ones(width)}
    np.testing.assert_allclose(y, oracle.front(signs, x), atol=1e-5)
    np.testing.assert_allclose(hadamard.transform(y), x, atol=1e-5)
    np.testing.assert_allclose(np.square(y).sum(), np.square(x).sum(), rtol=1e-5)


def test_text_and_back():
    """What a model's parts are, said in as few words. Mutation: a range that ends one early."""
    config = mixed()
    blocks = {i: parts.of_layer(config, i) for i in range(3)}
    text = parts.as_text(blocks, config)
    other = mixed(parts=text)
    assert {i: parts.of_layer(other, i) for i in range(3)} == blocks
    assert parts.as_text({i: blocks[0] for i in (0, 2, 3, 4)}, config).startswith(
        "output@0,2-4=memory,bits=6,mix=grouped; "
        "ffn@0,2-4=memory_block,bits=8,mix=none+hadamard"
    )
    assert parts.mixed(config, blocks) == other
    dense = toy.model_config("dense")
    assert parts.as_text({0: parts.of_layer(dense, 0)}, dense) == ""
    assert not parts.has_tables(dense) and parts.has_tables(config)
    memory = toy.model_config("memory", code_bits=4)
    assert parts.as_text({0: parts.of_layer(memory, 0)}, memory) == (
        "qkv@0=memory,bits=4; ffn@0=memory,bits=4"
    )
    assert not parts.has_tables(mixed(parts="output=memory; output=dense"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("ffn", "'ffn' is no PART=KIND"),
        ("head=memory", "part='head': unknown choice"),
        ("qkv=memory_block", "kind of qkv='memory_block': unknown choice"),
        ("ffn=memory,bits=x", "has the option 'bits=x'"),
        ("ffn=memory,mix=stirred", "mix='stirred': unknown choice"),
        ("ffn=memory,mix=none+", "mix='': unknown choice"),
        ("ffn=dense,bits=4", "is dense and has options"),
        ("ffn@=memory", "names no layers after the @"),
        ("ffn@2-1=memory", "names no layers after the @"),
        ("ffn@1-3=memory", "names layer 3, but model.num_layers=3"),
        ("ffn=memory,bits=5", "5 bits of ffn do not divide model.embed_dim=24"),
        ("ffn=memory_block,bits=17", "17 bits of ffn: must be from 1 to 16"),
        ("ffn=memory,bits=16", "16 bits of ffn: must be from 1 to 15"),
    ],
)
def test_mistakes_are_one_line(text, message):
    """Mutations: any of these checks left out."""
    with pytest.raises(errors.ConfigError, match=message) as caught:
        mixed(parts=text)
    assert "\n" not in str(caught.value)


def test_the_first_layers_of_a_model():
    """Clauses of the others are left out; more layers than there are, too.

    Mutation: the text as it is, which names layers that are no longer there.
    """
    config = mixed()
    for count in (1, 2, 4):
        few = parts.first_layers(config, count)
        assert few.num_layers == count
        for i in range(min(count, 3)):
            assert parts.of_layer(few, i) == parts.of_layer(config, i)
    assert parts.first_layers(toy.model_config(), 1).num_layers == 1


@pytest.mark.parametrize("bits", [1, 16])
def test_bits_at_the_bounds(bits):
    """Mutations: from 2; to 15."""
    options = {"parts": f"ffn=memory_block,bits={bits}"}
    sizes = {"embed_dim": 48, "num_heads": 3}
    config = toy.model_config("mixed", **sizes, projection_options=options)
    assert parts.of_layer(config, 0).ffn.code_bits == bits


def test_no_output_without_a_projection():
    with pytest.raises(errors.ConfigError, match="the model has no W_O"):
        mixed(parts="output=memory", output_projection=False)


def test_layers_by_number():
    """Below 65,536, in order and once each. Mutations: any bound of `layer_numbers`."""
    assert parts.layer_numbers("3,0-1,1-2, 7") == [0, 1, 2, 3, 7]
    assert parts.layer_numbers("65535") == [65535]
    for text in ("65536", "-1", "2-1", "", "1,", "a", "0-65536"):
        with pytest.raises(ValueError, match=r"no layers|invalid literal"):
            parts.layer_numbers(text)
    assert parts._ranges([0, 2, 3, 4, 6, 7]) == "0,2-4,6-7"


def test_bits_of_each_part_at_the_bounds():
    """Only the two layers of a feed-forward one need room for extra bits.

    Mutations: extra bits of every part; none; fewer than none.
    """
    sizes = {"embed_dim": 240, "num_heads": 3}

    def made(text, extra=2):
        options = {"parts": text, "extra_bits": extra}
        config = toy.model_config("mixed", **sizes, projection_options=options)
        return parts.of_layer(config, 1)

    assert made("qkv@1=memory,bits=16").qkv == parts.Part("memory", 16)
    assert made("ffn=memory,bits=12", 4).ffn.code_bits == 12
    assert made("ffn=memory,bits=16", 0).ffn.code_bits == 16
    for text, extra, most in (
        ("ffn=memory,bits=12", 5, 11),
        ("ffn=memory,bits=4", -1, 17),
        ("ffn=memory,bits=0", 2, 14),
        ("qkv=memory,bits=20", 2, 16),
    ):
        with pytest.raises(errors.ConfigError, match=f"must be from 1 to {most}"):
            made(text, extra)
    part = made("qkv@0=memory,bits=4").qkv  # of the other layer
    assert part == parts.Part("dense", 4, "none", False)
    assert not part.thresholds and part.mix == "none"


@pytest.mark.parametrize("mix", front.MIXES)
def test_a_front_by_hand(mix):
    """z = mix(x) - t, t zeros at first; what a mix is drawn as is fixed.

    Mutations: `trained` of any mix; thresholds that decay; a front where there is nothing to do.
    """
    made = front.make(12, mix, False, rngs=nnx.Rngs(0))
    assert (made is None) == (mix == "none")
    full = front.make(12, mix, True, rngs=nnx.Rngs(0))
    facts = {
        name: getattr(full, name).get_metadata()
        for name in front.PARAMETERS
        if getattr(full, name, None) is not None
    }
    own = {"hadamard": "signs", "orthogonal": "rotation", "grouped": "order"}
    assert set(facts) == {"thresholds", *([own[mix]] if mix in own else [])}
    for name, said in facts.items():
        assert said.get("trained", True) == (name == "thresholds")
        assert not said.get("decay")
    assert not np.any(full.thresholds[...])
    full.thresholds[...] = jnp.arange(12.0)
    x = np.random.default_rng(0).normal(size=(2, 3, 12)).astype(np.float32)
    if mix == "hadamard":
        assert set(np.asarray(full.signs[...]).tolist()) == {-1.0, 1.0}
        matrix = np.array(
            [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
        )
        turned = (x * np.asarray(full.signs[...])).reshape(2, 3, 3, 4) @ matrix / 2
        wanted = np.asarray(turned).reshape(2, 3, 12)
    elif mix == "orthogonal":
        rotation = np.asarray(full.rotation[...])
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(12), atol=1e-5)
        wanted = x @ rotation
    elif mix == "grouped":
        order = np.asarray(full.order[...]).astype(int)
        assert sorted(order) == list(range(12))
        wanted = x[..., order]
    else:
        wanted = x
    np.testing.assert_allclose(full(jnp.asarray(x)), wanted - np.arange(12), atol=1e-5)
    assert full(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32
