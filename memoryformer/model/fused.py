"""Decoding by one native call for all blocks, where there is one for such a model.

`features` gives what `Transformer.features` gives, up to the rounding of norms and of attention;
what `why_not` objects to, and calls of many tokens, go through the blocks themselves. Those are
the definition; `model.lookup='xla'` keeps to them. Start at `features`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from memoryformer.model import layers, mixers, narrow_layers, transformer
from memoryformer.model.config import ModelConfig
from memoryformer.notation import Activations, Tokens
from memoryformer.ops import hashing, rotary
from memoryformer.ops.lookup import blocks as native_blocks
from memoryformer.ops.lookup import narrow as narrow_rows
from memoryformer.ops.lookup import native


def why_not(config: ModelConfig) -> str:
    """Say why no native call reads the blocks of such a model here; '' if one does."""
    if jax.default_backend() != "cpu" or not native.available():
        return "it needs a CPU and the native code"
    if config.lookup not in ("auto", "native"):
        return f"model.lookup={config.lookup!r} leaves blocks to XLA"
    if config.dtype != "float32":
        return f"model.dtype={config.dtype!r}: it computes in float32"
    if config.projection != "memory":
        return f"model.projection={config.projection!r}: it knows memory layers alone"
    if config.ffn_activation != "none":
        return f"model.ffn_activation={config.ffn_activation!r}: it has none"
    if config.mixer != "softmax" or not config.causal:
        return f"model.mixer={config.mixer!r}: it knows causal softmax attention"
    if config.mixer_options.logit_transform != "none":
        return "model.mixer_options.logit_transform: it has none"
    if config.recurrence != "none":
        return f"model.recurrence={config.recurrence!r} reads between blocks"
    if config.projection_options.ngram_rows:
        return "model.projection_options.ngram_rows: their state is another"
    if config.projection_options.token_rows:
        return "model.projection_options.token_rows: it reads none"
    if hashing.constants(config.score, 1.0, None)[0] not in native.POWERS:
        return f"model.score={config.score!r}: not in the native memory layer"
    return ""


def features(
    config: ModelConfig,
    model: transformer.Transformer,
    tokens: Tokens,
    seq: mixers.SeqInfo,
    state: mixers.State,
) -> tuple[Activations, mixers.State]:
    """What `model.features` returns: tokens [B, L] -> normed [B, L, D], and the state."""
    few = tokens.size <= native_blocks.MAX_TOKENS
    if not few or why_not(config) or not _is_packed(model):
        return model.features(tokens, seq, state)
    return _in_one_call(config, model, _embed(model, tokens), seq, state)


def _embed(model, tokens):
    """`model.embed`, a column at a time: XLA CPU wakes a second thread for two rows."""
    columns = range(tokens.shape[1])
    return jnp.concatenate([model.embed(tokens[:, i : i + 1]) for i in columns], 1)


def _in_one_call(config, model, x, seq, state):
    pairs = rotary.num_pairs(config.head_dim, config.rotary_fraction)
    rows = x.reshape(-1, x.shape[-1])
    if pairs:
        turned = rotary.turns(seq.positions, pairs, config.rotary_base)
        cos, sin = (turn.reshape(len(rows), pairs) for turn in turned)
    else:
        cos = sin = jnp.zeros((len(rows), 0), jnp.float32)
    first: Any = model.blocks[0]
    power, _, _ = hashing.constants(config.score, 1.0, None)
    form = native_blocks.Form(
        heads=config.num_heads,
        residual=config.residual,
        eps=config.norm_eps,
        middle_eps=first.ffn.norm.eps,
        power=power,
        rows_read=config.projection_options.rows_read,
    )
    y, caches = native_blocks.read(
        rows,
        (cos, sin),
        seq.segment_ids,
        [_block(block) for block in model.blocks],
        _norm(model.final_norm),
        state,
        form,
    )
    after = tuple(type(cache)(*c) for cache, c in zip(state, caches, strict=True))
    return y.reshape(x.shape), after


def _is_packed(model):
    """Whether tables lie as `narrow.prepare` stores them."""
    return isinstance(model.blocks[0].mixer.qkv, narrow_layers.NarrowMemoryLayer)


def _block(block):
    return native_blocks.Block(
        norm1=_norm(block.norm1),
        norm2=None if block.norm2 is None else _norm(block.norm2),
        qkv=_layer(block.mixer.qkv),
        out=None if block.mixer.out is None else _layer(block.mixer.out),
        up=_layer(block.ffn.up),
        middle=_norm(block.ffn.norm),
        down=_layer(block.ffn.down),
    )


def _norm(norm):
    bias = norm.bias[...] if isinstance(norm, layers.LayerNorm) else None
    return native_blocks.Norm(norm.scale[...], bias)


def _layer(layer):
    tables: narrow_rows.PackedTables = layer.tables.get_value()
    values = jnp.asarray(tables.values)
    _, beta, gamma = hashing.constants(layer.score, layer.temperature, layer.learned())
    bias = None if layer.bias is None else layer.bias[...].reshape(-1)
    flat = values.reshape(*values.shape[:2], -1)
    return native_blocks.Layer(flat, tables.scales, bias, beta, gamma)
