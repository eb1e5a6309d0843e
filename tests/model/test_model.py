"""The model: the released one's numbers, every block's equation, and what may be seen."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import toy

from memoryformer import model
from memoryformer.errors import ConfigError
from memoryformer.evaluation import buckets
from memoryformer.model import ModelConfig, mixers

DATA = pathlib.Path(__file__).parents[1] / "data"
both_projections = pytest.mark.parametrize("projection", ["memory", "dense"])

# --------------------------------------------------------------------------------------
# The released code's two-layer model.

RELEASED = ModelConfig(
    vocab_size=61,
    embed_dim=64,
    num_layers=2,
    num_heads=4,
    seq_len=24,
    code_bits=4,
    score="l1_softmax",
    projection_options={"memory_bias": True},
)


def released_tree(arrays, prefix):
    """The released arrays `prefix.*` under our names."""

    def get(name):
        return arrays[f"model.{prefix}.{name}"]

    def block(at):
        def memory(name):
            return {
                "tables": get(f"{at}.{name}.tables"),
                "bias": get(f"{at}.{name}.bias"),
            }

        qkv = [memory(name) for name in "qkv"]
        return {
            "norm1": {"scale": get(f"{at}.norm1.scale")},
            "norm2": {"scale": get(f"{at}.norm2.scale")},
            "mixer": {
                "qkv": {
                    "tables": np.stack([p["tables"] for p in qkv], axis=2),
                    "bias": np.stack([p["bias"] for p in qkv]),
                }
            },
            "ffn": {
                "up": memory("ffn1"),
                "norm": {
                    "scale": get(f"{at}.ffn_norm.weight"),
                    "bias": get(f"{at}.ffn_norm.bias"),
                },
                "down": memory("ffn2"),
            },
        }

    return {
        "embed": {"embedding": get("embed")},
        "blocks": {str(i): block(f"blocks.{i}") for i in range(2)},
        "final_norm": {"scale": get("final_norm.scale")},
        "head": {"kernel": get("head").T},
    }


@pytest.fixture(scope="module")
def released():
    """(arrays, params, hidden states, logits, loss, gradients) of one compilation."""
    arrays = np.load(DATA / "released_model.npz")
    params = released_tree(arrays, "param")
    tokens = jnp.asarray(arrays["model.tokens"], jnp.int32)

    def loss(params):
        module = model.merge(RELEASED, params)
        seq = mixers.SeqInfo.of_tokens(tokens[:, :-1])
        hidden = [module.embed(tokens[:, :-1])]
        for block in module.blocks:
            hidden.append(block(hidden[-1], seq)[0])
        logits = module.logits(module.final_norm(hidden[-1]))
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return nats.mean(), (hidden, logits)

    step = toy.quick_jit(jax.value_and_grad(loss, has_aux=True))
    (value, (hidden, logits)), gradients = step(params)
    return arrays, params, hidden, logits, value, gradients


def relative(got, expected):
    expected = np.asarray(expected, np.float64)
    return np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(expected).max()


def test_released_model_outputs(released):
    """Hidden states, logits and loss within 1e-5; `forward` gives those logits.

    Mutations: rotary on half a head; norm2 before the mixer's sum; no bias.
    """
    arrays, params, hidden, logits, loss, _ = released
    for i, x in enumerate(hidden):
        assert relative(x, arrays[f"model.hidden.{i}"]) < 1e-5, i
    assert relative(logits, arrays["model.logits"]) < 1e-5
    assert relative(loss, arrays["model.loss"]) < 1e-5
    tokens = jnp.asarray(arrays["model.tokens"][:, :-1], jnp.int32)
    forward = compiled(RELEASED)(params, tokens)
    assert forward.dtype == jnp.float32
    assert relative(forward, arrays["model.logits"]) < 1e-5


def test_released_model_gradients(released):
    """Every parameter's gradient within 1e-5 of its largest entry.

    Mutation: `stop_gradient` on the scores of the second feed-forward layer.
    """
    gradients = released[-1]
    expected = released_tree(np.load(DATA / "released_grads.npz"), "grad")
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    for path, theirs in jax.tree.leaves_with_path(expected):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, gradients)
        ours = ours[: len(theirs)]  # of tables, the first two are kept
        assert relative(ours, theirs) < 1e-5, jax.tree_util.keystr(path)


# --------------------------------------------------------------------------------------
# Every form of a block against numpy.

FORMS = {
    "memory": {},
    "memory_parallel": {"residual": "parallel", "norm": "layernorm"},
    "memory_eq13": {"residual": "eq13", "score": "learned"},
    "memory_out_gelu": {"output_projection": True, "ffn_activation": "gelu"},
    "tied": {
        "tie_embeddings": True,
        "projection_options": {"temperature": 0.5, "memory_bias": False},
    },
    "dense": {"projection": "dense"},
    "dense_sequential": {"projection": "dense", "residual": "sequential"},
}


def random_params(config, seed=0):
    """Random values for every parameter, also for what starts at 0 or 1."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        noise = rng.normal(size=x.shape)
        wide = path[-1].key in ("scale", "beta", "gamma")
        value = 1 + 0.1 * noise if wide else 0.4 * noise
        return jnp.asarray(value, jnp.float32)

    shapes = jax.eval_shape(lambda: model.init(config))
    return jax.tree.map_with_path(draw, shapes)


@functools.cache
def compiled(config):
    """One compilation of the forward pass for all tests of a config."""
    return toy.quick_jit(functools.partial(model.forward, config))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_against_numpy(form):
    """Packed rows with padding, against loops in float64.

    Mutations: `x + mixed` for `normed + mixed` in eq13; sequential for parallel; the
    untransposed embedding as the head; temperature not passed to the layers.
    """
    config = toy.model_config(**FORMS[form])
    params, batch = random_params(config), toy.batch(config, batch_size=3)
    got = compiled(config)(
        params, batch["inputs"], batch["segment_ids"], batch["positions"]
    )
    expected = oracle.transformer(
        config, params, batch["inputs"], batch["positions"], batch["segment_ids"]
    )
    assert relative(got, expected) < 1e-5


# --------------------------------------------------------------------------------------
# What may be seen.


@pytest.fixture(
    scope="module", params=["memory", pytest.param("dense", marks=pytest.mark.slow)]
)
def toy_model(request):
    """(config, params) of one projection; test_mixers has the battery for dense ones."""
    config = toy.model_config(request.param)
    return config, random_params(config)


def test_causality_through_gradients(toy_model):
    """d output_t / d embedding_s is 0 for s > t and nonzero for every s <= t.

    Mutations: `>=` for `<=` in the causal mask; no gradient through the scores.
    """
    config, params = toy_model
    module = model.merge(config, params)
    seq = mixers.SeqInfo.of_tokens(jnp.zeros((1, 8), jnp.int32))

    def outputs(x):
        for block in module.blocks:
            x, _ = block(x, seq)
        return module.logits(x)[0] @ jnp.cos(jnp.arange(13.0))  # [L]

    x = jax.random.normal(jax.random.key(0), (1, 8, 16))
    jacobian = np.abs(toy.quick_jit(jax.jacrev(outputs))(x)[:, 0]).max(
        axis=-1
    )  # [t, s]
    assert not np.triu(jacobian, 1).any()
    assert (jacobian[np.tril_indices(8)] > 0).all()


def test_the_future_changes_nothing(toy_model):
    """Other tokens from t on leave the logits before t as they are, bit for bit.

    Mutation: a mean over the sequence in a norm.
    """
    config, params = toy_model
    batch = toy.batch(config, batch_size=3)
    before = compiled(config)(
        params, batch["inputs"], batch["segment_ids"], batch["positions"]
    )
    changed = batch["inputs"].copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % config.vocab_size
    after = compiled(config)(params, changed, batch["segment_ids"], batch["positions"])
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.asarray(before[:, 5:]) != np.asarray(after[:, 5:])).any()


def test_packed_documents_are_separate(toy_model):
    """Two documents of one row give what each gives alone.

    Mutations: no comparison of segments in the mask; positions along the row.
    """
    config, params = toy_model
    tokens = np.random.default_rng(1).integers(0, 13, (3, 12), np.int32)
    segments = np.array([[1] * 5 + [2] * 7] * 3, np.int32)
    packed = compiled(config)(params, tokens, segments, toy.positions(segments))
    for part in (slice(0, 5), slice(5, 12)):
        alone = compiled(config)(params, tokens[:, part])
        assert relative(packed[:, part], alone) < 2e-6


def test_padding_is_irrelevant(toy_model):
    """Tokens of segment 0 change no logit of a document, bit for bit, wherever they are.

    Mutation: `key_segments != 0` and the comparison of segments left out of the mask.
    """
    config, params = toy_model
    tokens = np.random.default_rng(2).integers(0, 13, (3, 12), np.int32)
    segments = np.array([[0] * 3 + [1] * 5 + [0] * 4] * 3, np.int32)
    other = np.where(segments > 0, tokens, (tokens + 5) % 13).astype(np.int32)
    first, second = (
        compiled(config)(params, t, segments, toy.positions(segments))
        for t in (tokens, other)
    )
    np.testing.assert_array_equal(first[:, 3:8], second[:, 3:8])
    assert np.isfinite(first).all()


def test_prefill_and_decoding_equal_one_pass(toy_model):
    """Random splits of a packed row, fed through the state.

    Mutations: `start` 0 in the mask; keys stored before rotation.
    """
    config, params = toy_model
    batch = toy.batch(config, batch_size=3)
    expected = compiled(config)(
        params, batch["inputs"], batch["segment_ids"], batch["positions"]
    )

    @toy.quick_jit
    def step(tokens, seq, state):
        return model.merge(config, params)(tokens, seq, state)

    rng = np.random.default_rng(3)
    for split in range(2):
        state = model.merge(config, params).init_state(3, 15)
        pieces = [1] * 12 if split else [int(rng.integers(2, 8)), 3, 1, 1]
        start, outputs = 0, []
        while start < 12:
            size = min(pieces.pop(0) if pieces else 12, 12 - start)
            part = slice(start, start + size)
            seq = mixers.SeqInfo(
                batch["positions"][:, part], batch["segment_ids"][:, part]
            )
            logits, state = step(batch["inputs"][:, part], seq, state)
            outputs.append(logits)
            start += size
        real = batch["segment_ids"] > 0
        got = np.concatenate(outputs, axis=1)
        assert relative(got[real], np.asarray(expected)[real]) < 2e-6


# --------------------------------------------------------------------------------------
# Functions over the parameter tree.


@both_projections
def test_parameters(projection):
    """A nested dict with string keys, float32, reproducible, one spec for each.

    Mutations: integer keys for blocks; the seed ignored; a spec's name misspelt.
    """
    config = toy.model_config(projection)
    params, again, other = (model.init(config, seed) for seed in (0, 0, 1))
    for path, leaf in jax.tree.leaves_with_path(params):
        assert all(isinstance(key.key, str) for key in path)
        assert leaf.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert (params["head"]["kernel"] != other["head"]["kernel"]).any()
    qkv = params["blocks"]["0"]["mixer"]["qkv"]
    shapes = {name: leaf.shape for name, leaf in qkv.items()}
    if projection == "memory":
        assert shapes == {"tables": (4, 16, 3, 16), "bias": (3, 16)}
        assert params["blocks"]["1"]["ffn"]["down"]["tables"].shape == (4, 32, 16)
    else:
        assert shapes == {"kernel": (16, 3, 16), "bias": (3, 16)}
        assert params["blocks"]["1"]["ffn"]["up"]["kernel"].shape == (16, 64)
    specs = model.param_specs(config)
    assert jax.tree.structure(specs) == jax.tree.structure(params)


def test_blocks_keep_their_places():
    """Block i computes with blocks/i, also from ten blocks on.

    Mutation: parameters merged in the order of their names, where "10" is before "2".
    """
    config, rng = toy.model_config(num_layers=12), np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape), toy.numpy_params(config))
    for i, block in enumerate(model.merge(config, params).blocks):
        tables = params["blocks"][str(i)]["mixer"]["qkv"]["tables"]
        assert np.array_equal(block.mixer.qkv.tables[...], tables), i


def test_standard_deviations_at_the_start():
    """Each `*_std` reaches the parameters that it names.

    Mutation: `ffn_std` not passed to `down`.
    """
    stds = {
        "embed_std": 0.1,
        "head_std": 0.2,
        "mixer_std": 0.3,
        "ffn_std": 0.4,
    }
    options = {"memory_bias": True, "bias_std": 0.6}
    shape = {"vocab_size": 99, "embed_dim": 32, "num_layers": 1, "num_heads": 2}
    make = functools.partial(ModelConfig, seq_len=8, output_projection=True, **shape)
    memory = model.init(make(code_bits=4, projection_options=options, **stds))
    options = {"output_std": 0.5}
    stds |= {"ffn_activation": "gelu", "projection_options": options}
    dense = model.init(make(projection="dense", **stds))
    memory_block, dense_block = memory["blocks"]["0"], dense["blocks"]["0"]
    expected = [
        (memory["embed"]["embedding"], 0.1),
        (memory["head"]["kernel"], 0.2),
        (memory_block["mixer"]["qkv"]["tables"], 0.3),
        (memory_block["mixer"]["out"]["tables"], 0.3),
        (memory_block["ffn"]["up"]["tables"], 0.4),
        (memory_block["ffn"]["down"]["tables"], 0.4),
        (memory_block["mixer"]["qkv"]["bias"], 0.6),
        (dense_block["mixer"]["qkv"]["kernel"], 0.3),
        (dense_block["mixer"]["out"]["kernel"], 0.5),
        (dense_block["ffn"]["up"]["kernel"], 0.4),
        (dense_block["ffn"]["down"]["kernel"], 0.5),
    ]
    for i, (parameter, std) in enumerate(expected):
        assert abs(float(jnp.std(parameter)) / std - 1) < 0.15, i
    assert not dense_block["mixer"]["qkv"]["bias"].any()


def test_bfloat16_computes_what_float32_does():
    """To bfloat16's precision on dense blocks, with float32 logits.

    Memory layers are not compared: a sign that rounding flips is another row.
    Mutation: the head's product in bfloat16 without `preferred_element_type`.
    """
    config = toy.model_config("dense")
    half = toy.model_config("dense", dtype="bfloat16")
    params, batch = random_params(config), toy.batch(config, batch_size=3)
    rest = (batch["inputs"], batch["segment_ids"], batch["positions"])
    expected, got = compiled(config)(params, *rest), compiled(half)(params, *rest)
    assert got.dtype == jnp.float32
    assert relative(got, expected) < 0.03
    memory = toy.model_config(dtype="bfloat16")
    logits = compiled(memory)(random_params(memory), *rest)
    assert logits.dtype == jnp.float32 and jnp.isfinite(logits).all()


def test_codes_of_every_memory_layer():
    """Three per block, by path, as the oracle codes what enters the first.

    Mutation: codes of the last block only (recorded by class, not by layer).
    """
    config = toy.model_config()
    params, batch = random_params(config), toy.batch(config, batch_size=3)
    got = toy.quick_jit(functools.partial(buckets.codes, config))(params, batch)
    assert {name.split(".", 2)[2] for name in got} == {
        "mixer.qkv",
        "ffn.up",
        "ffn.down",
    }
    assert len(got) == 6
    assert all(c.shape == (3, 12, 4) and c.dtype == jnp.int32 for c in got.values())
    x = np.asarray(params["embed"]["embedding"], np.float64)[batch["inputs"]]
    x = oracle.rms_norm(x, np.asarray(params["blocks"]["0"]["norm1"]["scale"]), 1e-8)
    expected = oracle.codes(x.reshape(3, 12, 4, 4))
    np.testing.assert_array_equal(got["blocks.0.mixer.qkv"], expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"embed_dim": 30, "code_bits": 4}, "not a multiple of model.code_bits=4"),
        ({"num_heads": 3}, "model.num_heads=3 does not divide model.embed_dim=16"),
        ({"code_bits": 0}, "model.code_bits=0"),
        (
            {"code_bits": 16, "projection_options": {"extra_bits": 1}},
            "code_bits \\+ extra_bits <= 16",
        ),
        (
            {"projection_options": {"temperature": 0.0}},
            "model.projection_options.temperature=0.0: must be > 0",
        ),
        ({"score": "softmx"}, "did you mean 'softmax'"),
        ({"mixer": "sofmax"}, "did you mean 'softmax'"),
        ({"projection": "memry"}, "did you mean 'memory'"),
        ({"norm": "rms"}, "model.norm='rms'"),
        ({"residual": "sum"}, "model.residual='sum'"),
        ({"ffn_activation": "relu"}, "model.ffn_activation='relu'"),
        ({"dtype": "float16"}, "model.dtype='float16'"),
        ({"lookup": "xl"}, "model.lookup='xl'"),
        ({"num_layers": 0}, "model.num_layers=0: must be >= 1"),
    ],
)
def test_mistakes_are_one_line(fields, message):
    """Field, value and what would do. Mutation: any check of `__post_init__` left out."""
    with pytest.raises(ConfigError, match=message) as caught:
        toy.model_config(**fields)
    assert "\n" not in str(caught.value)


def test_tables_are_narrowed_as_they_are_read():
    """To a bfloat16 model's type and never wider; nothing else is touched.

    Mutations: `>=` for `<`; `or` for `and`.
    """
    config, half = toy.model_config(), toy.model_config(dtype="bfloat16")
    params = toy.numpy_params(config)
    groups = model.param_groups(config)
    narrow = model.with_tables_as_read(half, params)
    for group, before, after in zip(
        *map(jax.tree.leaves, (groups, params, narrow)), strict=True
    ):
        assert after.dtype == (jnp.bfloat16 if group == "tables" else jnp.float32)
        assert after is before or group == "tables"
    for kept, now in ((narrow, config), (narrow, half), (params, config)):
        same = jax.tree.map(
            lambda a, b: a is b, kept, model.with_tables_as_read(now, kept)
        )
        assert jax.tree.all(same)
