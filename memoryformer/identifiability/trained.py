"""The certificates of a trained run, on its validation text. Start at `of_run`.

Dense projections with mixer `linear`, feature_map='identity' and no rotary positions: the first
mixer. Its input ends in norm1 and its projections have biases, so that in the equation of
`linear_attention` z is [norm1(x); 1] and Z the document so far. Memory projections: the tables of
every layer, see `tables`.

What is certified: no other weights of that layer, of any number of heads, put out the same on this
text without being the same function of norm1(x). The embedding and the norm are taken as they are;
nothing is said of later layers, nor of whether training has found good weights.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from memoryformer import data
from memoryformer import model as model_lib
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError, DataError
from memoryformer.identifiability import linear_attention, moments, tables
from memoryformer.model import codes as codes_lib
from memoryformer.model import implementations, layers, mixers, parts, token_rows
from memoryformer.notation import Array, Float, Params
from memoryformer.runs import remote
from memoryformer.training import experiment

Batches = Iterable[Mapping[str, Any]]
Reads = tuple[tables.Codes, tables.Scores, int]  # codes, scores, C


def of_run(
    workdir: str | os.PathLike, step: int | None, max_tokens: int, max_unknowns: int
) -> dict[str, moments.Certificate | str]:
    """Return the certificate of each layer that has one, by its path, or why it was left out.

    max_tokens: of validation text; max_unknowns: limits time, M^3. Raises `ConfigError` for a
    model that has none, and as `experiment.load` and `data.find`.
    """
    workdir = remote.copied(workdir, step)
    run, params, facts = experiment.load(workdir, step)
    config = eager(run.model)
    check(config)
    corpus = run_tokenizer.dataset(workdir, run.data, facts, config.vocab_size)
    batches = _first(corpus, config.seq_len, run.eval.batch_size, max_tokens)
    return of_model(config, params, batches, max_unknowns)


def of_model(
    config: model_lib.ModelConfig, params: Params, batches: Batches, max_unknowns: int
) -> dict[str, moments.Certificate | str]:
    """The same of a model and batches; the config is one of `eager`."""
    if check(config) == "tables":
        return of_tables(config, params, batches, max_unknowns)
    unknowns = linear_attention.num_features(config.embed_dim + 1)
    if unknowns > max_unknowns:
        raise ConfigError(
            f"model.embed_dim={config.embed_dim}: the first layer has {unknowns} features, "
            f"more than --max_unknowns={max_unknowns}."
        )
    return {"blocks.0.mixer": of_first_mixer(config, params, batches)}


def eager(config: model_lib.ModelConfig) -> model_lib.ModelConfig:
    """Return the config to look at one layer after the other with."""
    config = implementations.readable(config)
    return dataclasses.replace(
        config, remat="none", scan_layers=False, sequence_chunk=0
    )


def check(config: model_lib.ModelConfig) -> str:
    """Return which certificate a model has, 'tables' or 'linear'; raises `ConfigError`."""
    if config.recurrence != "none":
        raise ConfigError(
            f"model.recurrence={config.recurrence!r}: layers that read a memory too have no "
            "certificate; only model.recurrence='none' has."
        )
    if config.projection == "memory":
        return "tables"
    if config.mixer != "linear":
        raise ConfigError(
            f"model.mixer={config.mixer!r}: has no certificate; memory projections have, and "
            "mixer='linear' with feature_map='identity'."
        )
    if config.mixer_options.feature_map != "identity":
        raise ConfigError(
            f"model.mixer_options.feature_map={config.mixer_options.feature_map!r}: a layer with "
            "a denominator is not linear in features; only 'identity' has a certificate."
        )
    token_rows.refuse(config, "the certificate of a mixer")
    if config.rotary_fraction:
        raise ConfigError(
            f"model.rotary_fraction={config.rotary_fraction}: Q and K that turn with positions "
            "are not one Q; the certificate needs rotary_fraction=0."
        )
    return "linear"


def of_first_mixer(
    config: model_lib.ModelConfig, params: Params, batches: Batches
) -> moments.Certificate:
    """Return the certificate of the first mixer, of dense `linear` attention.

    Unknowns are the psi features of [norm1(x); 1], and a bias if there is an output projection.
    Freedom is what the norm fixes whatever the text: see `_freedom`. Computed in float32 and
    then float64, in whatever type the run trains.
    """
    config = dataclasses.replace(config, dtype="float32")
    features = first_features(config, params, batches)
    eigenvalues, counted = linear_attention.eigenvalues(features)
    return moments.certificate(eigenvalues, counted, _freedom(config), np.float32)


def first_features(
    config: model_lib.ModelConfig, params: Params, batches: Batches
) -> Iterator[Float[np.ndarray, "n M"]]:
    """The features of every token of a document, a document at a time."""
    for x, segment_ids in _first_inputs(config, params, batches):
        for row, segments in zip(x, segment_ids, strict=True):
            for segment in np.unique(segments[segments > 0]):
                z = row[segments == segment]
                G = np.cumsum(z[:, :, None] * z[:, None, :], axis=0)
                H = linear_attention.features_of(G, z)
                bias = np.ones((len(H), int(config.output_projection)))
                yield np.concatenate([H, bias], axis=1)


def _first_inputs(config, params, batches):
    """[norm1(x); 1] in float64 [B, L, D + 1], and which document each token is of."""
    model = model_lib.merge(config, params)
    for batch in batches:
        seq = mixers.SeqInfo(batch["positions"], batch["segment_ids"])
        x = model.blocks[0].norm1(model.embedded(batch["inputs"], seq))
        x = np.asarray(x, np.float64)
        ones = np.ones((*x.shape[:2], 1))
        yield np.concatenate([x, ones], axis=-1), np.asarray(batch["segment_ids"])


def _freedom(config):
    """How many features of [norm1(x); 1] follow from the others.

    RMSNorm leaves sum_j (z_j / g_j)^2 = D: one sum of products z z^T follows from the rest, for
    each entry of the query. LayerNorm leaves sum_j (z_j - b_j) / g_j = 0 as well, so that z lies
    in D dimensions, in place of D + 1.
    """
    width = config.embed_dim + 1
    inside = width if config.norm == "rmsnorm" else width - 1
    independent = linear_attention.num_features(inside) - inside
    return linear_attention.num_features(width) - independent


def of_tables(
    config: model_lib.ModelConfig, params: Params, batches: Batches, max_unknowns: int
) -> dict[str, moments.Certificate | str]:
    """Return the certificate of the tables of every memory layer, by its path."""
    parts.check_one_row(config, "the certificate of tables")
    found: dict[str, moments.Certificate | str] = {}
    for name, (codes, scores, num_buckets) in reads(config, params, batches).items():
        if ".terms." in name:  # what it adds another of the sum may take away
            found[name] = "one of a sum of memory layers"
            continue
        _, _, visited = tables.features(codes, scores, num_buckets)
        if len(visited) > max_unknowns:
            found[name] = (
                f"{len(visited)} visited buckets, more than --max_unknowns={max_unknowns}"
            )
        else:
            found[name] = tables.certificate(
                codes, scores, num_buckets, bias=config.projection_options.memory_bias
            )
    return found


def reads(
    config: model_lib.ModelConfig, params: Params, batches: Batches
) -> dict[str, Reads]:
    """Return (codes [N, K], scores [N, K], C) of every memory layer, of all tokens."""
    kept: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for batch in batches:
        real = np.asarray(batch["segment_ids"]) > 0
        seq = mixers.SeqInfo(batch["positions"], batch["segment_ids"])
        for name, pair in _reader(config)(params, batch["inputs"], seq).items():
            codes, scores = (np.asarray(array)[real] for array in pair)
            kept.setdefault(name, []).append((codes, scores))
    found = {}
    for name, pieces in kept.items():
        codes, scores = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        found[name] = codes, scores, _num_buckets(params, name)
    return found


@functools.lru_cache(maxsize=4)
def _reader(config):
    """Compile (params, tokens, seq) -> {path: (codes, scores)}."""

    def read(params, tokens, seq):
        model = model_lib.merge(config, params)
        codes_lib.ask(model)
        kept: dict[str, list[tuple[Array, Array]]] = {}
        for path, layer in nnx.iter_modules(model, graph=False):
            if isinstance(layer, layers.MemoryLayer) and layer.keeps_codes:
                told: list[tuple[Array, Array]] = []
                kept[".".join(map(str, path))] = told
                layers.become(layer, _Watched)
                object.__setattr__(layer, "watch", told.append)
                layer.keeps_codes = False
        model.features(tokens, seq)
        return {name: told[0] for name, told in kept.items()}

    return jax.jit(read)


class _Watched(layers.MemoryLayer):
    """A `MemoryLayer` that tells what it reads."""

    watch: Callable[[tuple[Array, Array]], None]

    def __call__(self, x):
        self.watch(self.addresses(x))
        return super().__call__(x)


def _num_buckets(params, name):
    for key in name.split("."):
        params = params[key]
    return params["tables"].shape[1]


def table(found: Mapping[str, moments.Certificate | str]) -> str:
    """Return the certificates as a table, a layer a line."""
    lines = [
        f"{'layer':22s} {'tokens':>7s} {'unknowns':>8s} {'rank':>6s} {'freedom':>7s} "
        f"{'smallest':>9s} {'beyond':>9s} {'largest':>9s}  unique"
    ]
    for name, c in found.items():
        if isinstance(c, str):
            lines.append(f"{name:22s} left out: {c}")
            continue
        unique = "function" if c.function_is_unique else "neither"
        unique = "weights, function" if c.weights_are_unique else unique
        lines.append(
            f"{name:22s} {c.examples:7d} {c.unknowns:8d} {c.rank:6d} {c.freedom:7d} "
            f"{c.smallest:9.1e} {c.smallest_beyond:9.1e} {c.largest:9.1e}  {unique}"
        )
    return "\n".join(lines)


def _first(
    dataset: data.Dataset, seq_len: int, batch_size: int, max_tokens: int
) -> list[Mapping[str, Any]]:
    """The first batches of validation text, until they hold so many tokens."""
    batches = dataset.validation.eval_batches(seq_len, batch_size)
    taken, tokens = [], 0
    for index in range(len(batches)):
        if tokens >= max_tokens:
            break
        batch = jax.tree.map(np.asarray, batches[index])
        taken.append(batch)
        tokens += int((batch["segment_ids"] > 0).sum())
    if not tokens:
        raise DataError("identifiability: the run has no validation text.")
    return taken
