"""MemoryFormer with random weights, and its dense twin of Pythia's shape."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode import peers
from memoryformer import model, presets
from memoryformer.generation import sampler
from memoryformer.model import narrow
from memoryformer.ops.lookup import narrow as narrow_rows

PYTHIA = {"small": "160m", "base": "410m"}  # the shapes of the twins


def memoryformer(size: str, kind: str) -> peers.Peer:
    """MemoryFormer with tables and head of a kind."""
    kinds = narrow.WeightKinds(tables=kind, head=kind)
    config = memoryformer_config(size)
    return our_peer(config, random_params(config, kinds), kinds)


def dense(config: model.ModelConfig, params: dict, kind: str) -> peers.Peer:
    """The twin with dense layers and head of a kind."""
    return our_peer(config, params, narrow.WeightKinds(head=kind, dense=kind))


def memoryformer_config(size: str) -> model.ModelConfig:
    """The preset's shape, computing in float32, with room for a short context."""
    if size == "toy":
        return model.ModelConfig(
            vocab_size=512, embed_dim=64, num_layers=2, num_heads=2, seq_len=256
        )
    config = model.ModelConfig.from_config(presets.memoryformer(size).model)
    return dataclasses.replace(config, dtype="float32")


def twin_shape(size: str) -> tuple[int, int, int, int]:
    """(width, layers, heads, vocabulary)."""
    if size == "toy":
        return 64, 2, 2, 512
    return *presets.PYTHIA[PYTHIA[size]][:3], presets.VOCAB_SIZE


def random_twin(size: str) -> tuple[model.ModelConfig, dict]:
    """(config, params) of Pythia's shape: every kernel s.d. 0.02, norms that are not 1."""
    width, layers, heads, vocab_size = twin_shape(size)
    config = model.ModelConfig(
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        seq_len=2048,
        projection="dense",
        norm="layernorm",
        norm_eps=1e-5,
        residual="parallel",
        ffn_activation="gelu",
        output_projection=True,
        rotary_fraction=0.25,
    )
    random_numbers = np.random.default_rng(0)

    def leaf(path, x):
        values = 0.02 * random_numbers.standard_normal(x.shape, np.float32)
        return values + np.float32(path[-1].key == "scale")

    shapes = jax.eval_shape(lambda: model.init(config))
    return config, jax.tree_util.tree_map_with_path(leaf, shapes)


def random_params(config: model.ModelConfig, kinds: narrow.WeightKinds) -> dict:
    """Draw parameters, tables already packed: float32 ones of base would take 27 GB."""
    random_numbers = np.random.default_rng(0)
    block = random_numbers.standard_normal(1 << 22, np.float32)

    def tables(shape):
        if kinds.tables == "int8":
            values = random_numbers.integers(-127, 128, shape, np.int8)
            scales = np.full(shape[:2], 0.02 / 64, np.float32)
            return narrow_rows.PackedTables(
                narrow_rows.in_huge_pages(values), jnp.asarray(scales)
            )
        values = np.resize((0.02 * block).astype(jnp.dtype(kinds.tables)), shape)
        return narrow_rows.PackedTables(narrow_rows.in_huge_pages(values), None)

    def leaf(path, x):
        name = path[-1].key
        if name == "tables":
            return tables(x.shape)
        if name in ("scale", "bias"):
            return np.full(x.shape, name == "scale", np.float32)
        return np.resize(0.02 * block, x.shape)

    shapes = jax.eval_shape(lambda: model.init(config))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def our_peer(config, params, kinds) -> peers.Peer:
    """Our generator, checked on its first two blocks.

    Not on all of memory layers: a sign that rounding flips reads another row, and the next
    layers' signs follow, so that two exact computations part within a few random layers.
    """
    check_tokens(*first_blocks(config, params), kinds)
    generator = sampler.Generator(config, params, kinds)
    weights = jax.tree.leaves(narrow.prepare(config, params, kinds))
    prompt = peers.long_prompt(2048, config.vocab_size).tolist()

    def prefill(length):
        sampling = sampler.SamplingConfig(max_tokens=1, temperature=0.0)
        return list(generator.stream_batch([prompt[:length]], sampling))

    return peers.Peer(decoder(generator), prefill, sum(x.nbytes for x in weights))


def first_blocks(config: model.ModelConfig, params: dict):
    """(config, params) of the same model with its first two blocks only."""
    blocks = {name: params["blocks"][name] for name in ("0", "1")}
    return dataclasses.replace(config, num_layers=2), params | {"blocks": blocks}


def decoder(generator: sampler.Generator):
    """Greedy tokens after prompts of one token."""

    def decode(streams, tokens):
        sampling = sampler.SamplingConfig(max_tokens=tokens, temperature=0.0)
        return np.array(list(generator.stream_batch(peers.prompts(streams), sampling)))

    return decode


def check_tokens(config, params, kinds) -> None:
    """The tokens are the argmax of the full forward pass over all of them."""
    tokens = decoder(sampler.Generator(config, params, kinds))(2, 12)
    prepared = narrow.prepare(config, params, kinds)
    inputs = np.concatenate([np.array(peers.prompts(2)).T, tokens[:-1]]).T
    logits = np.asarray(model.forward(config, prepared, jnp.asarray(inputs)))
    chosen = np.take_along_axis(logits, tokens.T[..., None], axis=-1)[..., 0]
    gap = (logits.max(axis=-1) - chosen).max() / np.abs(logits).max()
    if not gap < 1e-4:
        raise AssertionError(f"decoding leaves the argmax of the forward pass by {gap}")


def by_output(layer: dict) -> tuple[np.ndarray, np.ndarray]:
    """(weight [F, D], bias [F]) of a dense layer; of Q, K and V all rows of Q come first."""
    kernel = np.asarray(layer["kernel"])
    weight = np.array(kernel.reshape(kernel.shape[0], -1).T, order="C")  # a copy
    return weight, np.array(layer["bias"]).reshape(-1)


def twin_logits(config, params, tokens: np.ndarray, activation: str) -> np.ndarray:
    """Logits [L, V] of the twin after each of `tokens`, with another activation."""
    config = dataclasses.replace(config, ffn_activation=activation)
    return np.asarray(model.forward(config, params, jnp.asarray(tokens[None])))[0]


def check_logits(name: str, logits, expected, tolerance: float) -> None:
    """An engine's logits of unrounded weights are the twin's."""
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    print(f"  {name}: largest difference of a logit {error:.1e} of the largest logit")
    if not error < tolerance:
        raise AssertionError(f"the logits of {name} differ from the twin's by {error}")
