"""RMT and Memformer around a whole trunk in float64, numpy only, nothing of ours.

    y, memories = features(config, params, tokens, positions, segment_ids, held)

`memories[c]` is what the chunk c was handed; `held` takes their place where gradients are cut.
"""

import math

import numpy as np
import oracle_mixers
from oracle_mixers import project, softmax

_erf = np.vectorize(math.erf)


def norm(config, params, x):
    if config.norm == "rmsnorm":
        root = np.sqrt((x**2).mean(axis=-1, keepdims=True)) + config.norm_eps
        return x / root * params["scale"]
    return layer_norm(params, x, config.norm_eps)


def layer_norm(params, x, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * params["scale"] + params["bias"]


def feed_forward(config, params, x):
    hidden = project(config, params["up"], x)
    if config.projection == "dense":
        hidden = hidden * 0.5 * (1 + _erf(hidden / np.sqrt(2)))
    else:
        hidden = layer_norm(params["norm"], hidden, 1e-5)
    return project(config, params["down"], hidden)


def trunk(config, params, x, real, read=lambda i, x: x):
    segments = real.astype(int)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    mixer = oracle_mixers.ORACLES[config.mixer]
    for i in range(config.num_layers):
        block = params["blocks"][str(i)]
        x = read(i, x)
        normed = norm(config, block["norm1"], x)
        mixed = mixer(config, block["mixer"], normed, positions, segments)
        if config.residual == "parallel":
            second = feed_forward(config, block["ffn"], norm(config, block["norm2"], x))
            x = x + mixed + second
        else:
            x = x + mixed
            x = x + feed_forward(config, block["ffn"], norm(config, block["norm2"], x))
    return norm(config, params["final_norm"], x)


def rmt(config, params, memory, x, real):
    ones = np.ones(memory.shape[:2], bool)
    m, size = memory.shape[1], x.shape[1]
    y = trunk(
        config,
        params,
        np.concatenate([memory, x, memory], axis=1),
        np.concatenate([ones, real, ones], axis=1),
    )
    return y[:, m : m + size], y[:, m + size :]


def _heads(config, x):
    return x.reshape(*x.shape[:-1], config.num_heads, -1)


def memformer(config, params, memory, x, real):
    own = params["recurrence"]

    def read(i, x):
        reader = own["readers"][str(i)]
        q = project(config, reader["query"], norm(config, reader["norm"], x))
        kv = project(
            config, reader["key_value"], norm(config, reader["memory_norm"], memory)
        )
        q, k, v = (_heads(config, a) for a in (q, kv[:, :, 0], kv[:, :, 1]))
        logits = np.einsum("blhe,bmhe->blhm", q, k) / np.sqrt(q.shape[-1])
        y = np.einsum("blhm,bmhe->blhe", softmax(logits), v).reshape(x.shape)
        return x + (project(config, reader["out"], y) if "out" in reader else y)

    y = trunk(config, params, x, real, read)
    normed = norm(config, own["norm"], memory)
    q = _heads(config, project(config, own["query"], normed))
    k_own = _heads(config, project(config, own["key_value"], normed)[:, :, 0])
    kv = project(config, own["key_value"], y)
    k, v = _heads(config, kv[:, :, 0]), _heads(config, kv[:, :, 1])
    written = np.zeros_like(_heads(config, memory))
    for i in range(memory.shape[1]):  # a slot attends to itself and to the tokens
        keys = np.concatenate([k_own[:, i : i + 1], k], axis=1)
        values = np.concatenate([_heads(config, memory)[:, i : i + 1], v], axis=1)
        where = np.concatenate([np.ones_like(real[:, :1]), real], axis=1)[:, None]
        logits = np.einsum("bhe,bshe->bhs", q[:, i], keys)
        logits = logits / np.sqrt(q.shape[-1]) / config.recurrence_options.temperature
        written[:, i] = np.einsum("bhs,bshe->bhe", softmax(logits, where), values)
    return y, _normalised(written.reshape(memory.shape) + own["bias"])


def _normalised(slots):
    return slots / np.linalg.norm(slots, axis=-1, keepdims=True)


def features(config, params, tokens, positions, segment_ids, held=None):
    """[B, L] -> normed [B, L, D] and the memory that each chunk was handed."""
    x = params["embed"]["embedding"][tokens]
    own, size = params["recurrence"], config.recurrence_options.chunk_size
    is_rmt = config.recurrence == "rmt"
    first = own["memory"] if is_rmt else _normalised(own["bias"])
    first = np.broadcast_to(first, (len(tokens), *first.shape))
    memory, memories, outputs = first, [], []
    for c, start in enumerate(range(0, tokens.shape[1], size)):
        part = np.s_[:, start : start + size]
        real = segment_ids[part] != 0
        if held is not None and c % config.recurrence_options.bptt_chunks == 0:
            memory = held[c]
        memories.append(memory)
        begins = (positions[:, start] == 0) & real[:, 0]
        memory = np.where(begins[:, None, None], first, memory)
        step = rmt if is_rmt else memformer
        y, written = step(config, params, memory, x[part], real)
        memory = np.where(real.any(axis=1)[:, None, None], written, memory)
        outputs.append(y)
    return np.concatenate(outputs, axis=1), memories
