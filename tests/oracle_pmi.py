"""PMI's block line by line in float64, numpy only, nothing of ours.

    x, m_w, m_l = layer(config, params, x, real, m_w, m_l)       one row: [T, D], [n, D], [C, n, D]

`config` is any object with the fields of the model, `params` those of a block by name.
"""

import numpy as np


def norm(p, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return centred / deviation * p["scale"] + p["bias"]


def linear(p, x):
    return np.tensordot(x, p["kernel"], axes=1) + p["bias"]


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def att(p, kv, q, real, k=0, scale=1.0):
    """Row by row and head by head: the k largest weights, not renormalised."""
    queries, keys, values = (
        linear(p[name], x) for name, x in (("query", q), ("key", kv), ("value", kv))
    )
    rows = []
    for query in queries:  # [H, E]
        heads = []
        for h in range(len(query)):
            logits = keys[:, h] @ query[h] * scale
            weights = np.exp(logits - logits[real].max()) * real
            weights = weights / weights.sum()
            if 0 < k < len(weights):
                weights[np.argsort(weights)[:-k]] = 0
            heads.append(weights @ values[:, h])
        rows.append(np.concatenate(heads))
    return np.array(rows)


def write(config, p, a, real, m_w, m_l):
    m = norm(p["norm1"], m_w + att(p, a, m_w, real, config.top_k))
    hidden = m
    for _ in range(4):
        hidden = relu(linear(p["hidden"], hidden))
    m = norm(p["norm2"], m + hidden)
    if config.memory == "both":
        gain = np.zeros_like(m_l)
        for c, n in np.ndindex(m_l.shape[:2]):
            if config.association == "sum":
                gain[c, n] = m_l[c, n].sum() * m[n]
            else:
                gain[c, n] = np.outer(m[n], m[n]) @ m_l[c, n] / len(m[n])
        m_l = norm(p["norm3"], m_l + gain)
    active = np.mean([relu(p["gate_scale"] * token) for token in a[real]], axis=0)
    g = np.array(
        [
            np.tensordot(np.tanh(row), p["gate_slots"][n], axes=1)
            + p["gate_slots_bias"][n]
            + linear(p["gate_tokens"], active)
            for n, row in enumerate(m_w)
        ]
    )
    m_w = (
        sigmoid(g[:, 0] + p["input_bias"]) * np.tanh(m)
        + sigmoid(g[:, 1] + p["forget_bias"]) * m_w
    )
    return m_w, m_l


def read(config, p, a, real, m_w, m_l):
    every = np.ones(len(m_w), bool)
    u_w = att(p, m_w, a, every)
    if config.memory == "working":
        return u_w
    u_l = att(p, m_l.mean(axis=0), a, every, config.top_k)
    if config.ask_working:
        u_l = att(p, u_w, u_l, real)
    return config.working_share * u_w + (1 - config.working_share) * u_l


def layer(config, params, x, real, m_w, m_l):
    mixer, normed = params["mixer"], norm(params["norm1"], x)
    if config.memory == "none":
        kernel, bias = mixer["qkv"]["kernel"], mixer["qkv"]["bias"]
        names = ("query", "key", "value")
        parts = {
            name: {"kernel": kernel[:, i], "bias": bias[i]}
            for i, name in enumerate(names)
        }
        scale = kernel.shape[-1] ** -0.5
        x = x + linear(mixer["out"], att(parts, normed, normed, real, scale=scale))
    else:
        a = linear(mixer["enter"], normed)
        m_w, m_l = write(config, mixer, a, real, m_w, m_l)
        x = x + read(config, mixer, a, real, m_w, m_l)
    hidden = relu(linear(params["up"], norm(params["norm2"], x)))
    return x + linear(params["down"], hidden), m_w, m_l


def positions(length, width):
    out = np.zeros((length, width))
    for t, i in np.ndindex(length, width):
        angle = t / 10_000 ** (2 * (i // 2) / width)
        out[t, i] = np.cos(angle) if i % 2 else np.sin(angle)
    return out


def encoder(config, params, x, real, m_w, m_l):
    """One row [T, D] through all layers."""
    x = x + positions(*x.shape)
    first = m_w, m_l
    for i in range(config.num_layers):
        block = params["blocks"][f"{i * (not config.share_parameters):02d}"]
        x, m_w, m_l = layer(config, block, x, real, m_w, m_l)
        if not config.share_memory:
            m_w, m_l = first
    return norm(params["final_norm"], x)
