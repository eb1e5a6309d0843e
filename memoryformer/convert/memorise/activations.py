"""What goes into the parts of a model and what comes out, block by block.

Blocks of the same parts are one program, whatever their number: a block is run as a model of one
layer. Nothing is kept between batches, so memory does not grow with tokens. Start at `observe`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer import model as model_lib
from memoryformer.model import losses, mixers, parts
from memoryformer.notation import Array, Float, Params


class Subject(NamedTuple):
    """A model and its parameters."""

    config: model_lib.ModelConfig
    params: Params


def observe(
    subject: Subject,
    layer: int,
    part: str,
    batch: Mapping[str, np.ndarray],
    reference: Subject | None = None,
) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N F"]]:
    """Return (inputs, wanted outputs) of a part for the real tokens of a batch.

    Wanted is what the part puts out now. With a `reference`, it is what would bring the residual
    stream to the reference's: then errors of the blocks before are made up for, as far as the
    inputs tell of them; of qkv, which writes to no stream, it is what the reference has there.
    """
    inputs, outputs, beside = _part(subject, layer, part, batch)
    if reference is not None:
        _, theirs, beside_theirs = _part(reference, layer, part, batch)
        outputs = theirs + beside_theirs - beside
    real = np.asarray(batch["segment_ids"]).ravel() > 0
    count = real.size
    inputs, outputs = (
        np.asarray(a).reshape(count, -1)[real] for a in (inputs, outputs)
    )
    return inputs, outputs


def nats(subject: Subject, batch: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Return (sum of nats, sum of weights) of a batch."""
    x, _ = _stream(subject, subject.config.num_layers, batch)
    total = _nats(*_one(subject, 0), x, batch["targets"], batch["weights"])
    return float(total), float(np.sum(batch["weights"], dtype=np.float64))


def _part(subject, layer, part, batch):
    x, seq = _stream(subject, layer, batch)
    config, params = _one(subject, layer)
    return _observe(config, part, params, x, seq)


def _stream(subject, layer, batch):
    """The residual stream before block `layer`."""
    seq = mixers.SeqInfo(*map(jnp.asarray, (batch["positions"], batch["segment_ids"])))
    x = _embed(*_one(subject, 0), batch["inputs"], seq)
    for i in range(layer):
        x = _advance(*_one(subject, i), x, seq)
    return x, seq


def _one(subject: Subject, layer: int) -> tuple[model_lib.ModelConfig, Params]:
    """Block `layer` as a model of one."""
    config, params = subject
    first = parts.mixed(config, {0: parts.of_layer(config, layer)})
    alone = dataclasses.replace(first, num_layers=1, scan_layers=False, remat="none")
    blocks: Any = params["blocks"]
    return alone, {**params, "blocks": {"0": blocks[str(layer)]}}


@functools.partial(jax.jit, static_argnums=0)
def _embed(config, params, tokens, seq):
    return model_lib.merge(config, params).embedded(tokens, seq)


@functools.partial(jax.jit, static_argnums=0)
def _advance(config, params, x, seq):
    return model_lib.merge(config, params).blocks[0](x, seq)[0]


@functools.partial(jax.jit, static_argnums=0)
def _nats(config, params, x, targets, weights):
    model = model_lib.merge(config, params)
    each = losses.token_nats(model.logits(model.final_norm(x)), targets)
    return jnp.sum(jnp.where(weights > 0, each * weights, 0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _observe(config, part, params, x, seq) -> tuple[Array, Array, Array]:
    """(inputs, outputs, what the stream holds beside these outputs)."""
    block: Any = model_lib.merge(config, params).blocks[0]
    normed = block.norm1(x)
    if part == "qkv":
        outputs = block.mixer.qkv(normed)
        return normed, outputs, jnp.zeros_like(outputs)
    stream = normed if config.residual == "eq13" else x
    if part == "output":
        project, block.mixer.out = block.mixer.out, None
        heads, _ = block.mixer(normed, seq, None)
        return heads, project(heads), stream
    stream = stream + block.mixer(normed, seq, None)[0]
    before = {"eq13": None, "parallel": x, "sequential": stream}[config.residual]
    inputs = normed if before is None else block.norm2(before)
    return inputs, block.ffn(inputs), stream
