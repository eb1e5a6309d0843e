"""RMT, Memformer and PMI around a whole trunk in float64, numpy only, nothing of ours.

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


def _attend(q, k, v, seen, top_k=0):
    """Of one row and head: the k largest weights of each query, as they are."""
    out = np.zeros((len(q), v.shape[1]))
    for i, query in enumerate(q):
        weights = softmax(k @ query / np.sqrt(len(query)), seen)
        if 0 < top_k < len(weights):
            weights[np.argsort(weights)[:-top_k]] = 0
        out[i] = weights @ v
    return out


def _by_head(config, q, kv, seen, top_k=0):
    parts = [_heads(config, a) for a in (q, kv[:, :, 0], kv[:, :, 1])]
    return np.stack(
        [
            np.concatenate(
                [
                    _attend(*(part[b, :, h] for part in parts), seen[b], top_k)
                    for h in range(config.num_heads)
                ],
                axis=-1,
            )
            for b in range(len(q))
        ]
    )


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pmi(config, params, memory, x, real):
    own, options = params["recurrence"], config.recurrence_options
    n, top_k, share = options.num_slots, options.top_k, options.working_share
    working, long_term = memory[:, :n], memory[:, n:]
    long_term = long_term.reshape(len(x), options.num_fragments, n, -1)
    every_slot = np.ones((len(x), n), bool)

    def slots_read(slots):
        normed = norm(config, own["slot_norm"], slots)
        return project(config, own["key_value"], normed)

    def read(i, x):
        q = project(config, own["query"], norm(config, own["token_norm"], x))
        u_w = _by_head(config, q, slots_read(working), every_slot)
        recalled = slots_read(long_term.mean(axis=1))
        u_l = _by_head(config, q, recalled, every_slot, top_k)
        return x + share * u_w + (1 - share) * u_l

    y = trunk(config, params, x, real, read)
    normed = norm(config, own["slot_norm"], working)
    q, kv = project(config, own["query"], normed), project(config, own["key_value"], y)
    update = working + _by_head(config, q, kv, real, top_k)
    update = norm(config, own["written_norm"], update)
    hidden = np.maximum(project(config, own["hidden"], update), 0)
    update = norm(config, own["hidden_norm"], update + hidden)
    learned = np.zeros_like(long_term)
    for b, c, i in np.ndindex(long_term.shape[:3]):
        agreement = long_term[b, c, i] @ update[b, i] / x.shape[-1]
        learned[b, c, i] = long_term[b, c, i] + agreement * update[b, i]
    learned = norm(config, own["long_term_norm"], learned)
    count = np.maximum(real.sum(axis=1), 1)[:, None, None]
    mean = (y * real[..., None]).sum(axis=1, keepdims=True) / count
    gates = project(config, own["gate_slots"], normed)
    mean = norm(config, own["chunk_norm"], mean)
    gates = gates + project(config, own["gate_chunk"], mean)
    kept = _sigmoid(gates[:, :, 1] + own["forget_bias"]) * working
    new = _sigmoid(gates[:, :, 0] + own["input_bias"]) * np.tanh(update) + kept
    return y, np.concatenate([new, learned.reshape(len(x), -1, x.shape[-1])], axis=1)


def _first(config, own):
    if config.recurrence == "rmt":
        return own["memory"]
    if config.recurrence == "memformer":
        return _normalised(own["bias"])
    flat = own["long_term"].reshape(-1, config.embed_dim)
    return np.concatenate([own["working"], flat])


STEPS = {"rmt": rmt, "memformer": memformer, "pmi": pmi}


def features(config, params, tokens, positions, segment_ids, held=None):
    """[B, L] -> normed [B, L, D] and the memory that each chunk was handed."""
    x = params["embed"]["embedding"][tokens]
    own, size = params["recurrence"], config.recurrence_options.chunk_size
    first = _first(config, own)
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
        y, written = STEPS[config.recurrence](config, params, memory, x[part], real)
        memory = np.where(real.any(axis=1)[:, None, None], written, memory)
        outputs.append(y)
    return np.concatenate(outputs, axis=1), memories
