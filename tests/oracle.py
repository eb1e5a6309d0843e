"""The model's equations in numpy, float64, written out with loops; imports nothing of ours.

The probability of a bucket is a softmax over all 2^tau sign patterns (Eqs. 8-10), not the
product of sigmoids that the package computes. Start at `memory_layer` and `transformer`.
"""

import itertools
import math

import numpy as np


def patterns(code_bits):
    """Row c holds the signs (+1, -1) of bucket c, high bit first: [2^tau, tau]."""
    return np.array(list(itertools.product((-1.0, 1.0), repeat=code_bits)))


def codes(chunks):
    """[.., tau] -> [..]: the first value is the high bit, zero is a set bit."""
    code = np.zeros(chunks.shape[:-1], np.int64)
    for i in range(chunks.shape[-1]):
        code = 2 * code + (chunks[..., i] >= 0)
    return code


def probability(chunks, temperature=1.0):
    """Softmax over all buckets of <z, signs> / t, at the bucket of z: [.., tau] -> [..]."""
    logits = np.asarray(chunks, np.float64) @ patterns(chunks.shape[-1]).T / temperature
    logits -= logits.max(axis=-1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return np.take_along_axis(p, codes(chunks)[..., None], axis=-1)[..., 0]


def scores(chunks, kind, temperature=1.0, beta=2.0, gamma=1.0):
    """Every score by its definition: [.., tau] -> [..]."""
    chunks = np.asarray(chunks, np.float64)
    length = np.abs(chunks).sum(axis=-1)
    match kind:
        case "softmax":
            return probability(chunks, temperature)
        case "l1_softmax":
            return length * probability(chunks, temperature)
        case "l1":
            return length
        case "constant":
            return np.ones_like(length)
        case "learned":  # sigmoid(beta |z|) is the softmax's with t = 2 / beta
            return length * probability(chunks, 2 / beta) ** gamma
    raise ValueError(kind)


def second_bucket(chunk, kind, temperature=1.0, beta=2.0, gamma=1.0):
    """Of one chunk [tau]: the most probable bucket one bit away, and p' / p, to gamma.

    The learned score's probability is that of t = 2 / beta.
    """
    if kind == "learned":
        temperature = 2 / beta
    signs = patterns(len(chunk))
    p = np.exp(signs @ np.asarray(chunk, np.float64) / temperature)
    here = codes(chunk[None])[0]
    away = [c for c in range(len(p)) if (signs[c] != signs[here]).sum() == 1]
    code = max(away, key=lambda c: p[c])
    return code, (p[code] / p[here]) ** (gamma if kind == "learned" else 1)


def memory_layer(
    x, tables, bias, kind, temperature=1.0, beta=2.0, gamma=1.0, rows_read=1
):
    """y = sum_k s(z_k) * T_k[h(z_k)] + b: [N, K tau] -> [N, *features]."""
    num_tables, num_buckets, *features = tables.shape
    chunks = x.reshape(len(x), num_tables, -1)
    assert 2 ** chunks.shape[-1] == num_buckets
    knobs = kind, temperature, beta, gamma
    h, s = codes(chunks), scores(chunks, *knobs)
    y = np.zeros((len(x), *features))
    for n in range(len(x)):
        for k in range(num_tables):
            y[n] += s[n, k] * tables[k, h[n, k]]
            if rows_read == 2:
                code, ratio = second_bucket(chunks[n, k], *knobs)
                y[n] += s[n, k] * ratio * tables[k, code]
    return y if bias is None else y + bias


def central_differences(function, arguments, cotangent, indices, step=1e-6):
    """d <function(*arguments), cotangent> / d argument, at a few entries of each.

    `indices[i]` lists flat indices into `arguments[i]`; returns a list of arrays.
    """
    gradients = []
    for i, where in enumerate(indices):
        found = []
        for j in where:
            values = []
            for sign in (1, -1):
                moved = [np.array(a, np.float64) for a in arguments]
                moved[i].reshape(-1)[j] += sign * step
                values.append((np.asarray(function(*moved)) * cotangent).sum())
            found.append((values[0] - values[1]) / (2 * step))
        gradients.append(np.array(found))
    return gradients


# Block and model.


def rms_norm(x, scale, eps):
    return x / (np.sqrt((x**2).mean(axis=-1, keepdims=True)) + eps) * scale


def layer_norm(x, scale, bias, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale + bias


def rotary(x, positions, fraction, base=10_000.0):
    """Turn pairs (i, i + R/2) as complex numbers: [B, L, H, E]."""
    size = 2 * int(x.shape[-1] * fraction / 2)
    half = size // 2
    angle = positions[..., None] * base ** (-2.0 * np.arange(half) / max(size, 1))
    turn = np.exp(1j * angle)[:, :, None]
    pairs = (x[..., :half] + 1j * x[..., half:size]) * turn
    return np.concatenate([pairs.real, pairs.imag, x[..., size:]], axis=-1)


def attention(q, k, v, segments):
    """Causal, inside documents, nothing for padding: [B, L, H, E]."""
    out = np.zeros_like(v)
    for b, i, h in np.ndindex(*q.shape[:3]):
        seen = [
            j
            for j in range(i + 1)
            if segments[b, j] == segments[b, i] and segments[b, j]
        ]
        if seen:
            logits = k[b, seen, h] @ q[b, i, h] / math.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max())
            out[b, i, h] = weights @ v[b, seen, h] / weights.sum()
    return out


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def token_nats(logits, targets):
    top = logits.max(axis=-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def transformer(config, params, tokens, positions, segments):
    """[B, L] -> logits [B, L, V]; `config` has the fields of a model's config."""
    params = _float64(params)
    x = params["embed"]["embedding"][tokens]
    if "ngrams" in params:
        options = config.projection_options
        for n in range(2, options.ngram_order + 1):
            first = (n - 2) * options.ngram_rows
            for b, i in np.ndindex(*tokens.shape):
                if positions[b, i] >= n - 1 and i >= n - 1:
                    words = [int(t) for t in tokens[b, i - n + 1 : i + 1]]
                    row = first + ngram_bucket(words, options.ngram_rows)
                    x[b, i] += params["ngrams"]["rows"][row]
    for i in range(config.num_layers):
        x = block(config, params["blocks"][str(i)], x, positions, segments, tokens)
    x = norm(config, params["final_norm"], x)
    head = (
        params["embed"]["embedding"].T
        if config.tie_embeddings
        else params["head"]["kernel"]
    )
    return x @ head


def ngram_bucket(words, num_rows):
    """FNV-1a by words from 2166136261 + n, MurmurHash3's end, modulo: Python's whole numbers."""
    h = (2166136261 + len(words)) % 2**32
    for word in words:
        h = (h ^ word) * 16777619 % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return (h ^ h >> 16) % num_rows


def block(config, params, x, positions, segments, tokens=None):
    normed = norm(config, params["norm1"], x)
    mixed = mixer(config, params["mixer"], normed, positions, segments, tokens)
    if config.residual == "eq13":
        return normed + mixed + feed_forward(config, params["ffn"], normed)
    if config.residual == "parallel":
        ffn = feed_forward(config, params["ffn"], norm(config, params["norm2"], x))
        return x + mixed + ffn
    x = x + mixed
    return x + feed_forward(config, params["ffn"], norm(config, params["norm2"], x))


def norm(config, params, x):
    if config.norm == "rmsnorm":
        return rms_norm(x, params["scale"], config.norm_eps)
    return layer_norm(x, params["scale"], params["bias"], config.norm_eps)


def mixer(config, params, x, positions, segments, tokens=None):
    qkv = projection(config, params["qkv"], x)  # [B, L, 3, D]
    if "token_rows" in params:
        qkv = qkv + params["token_rows"]["rows"][tokens]
    heads = qkv.reshape(*x.shape[:2], 3, config.num_heads, -1)
    q, k, v = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
    q, k = (rotary(a, positions, config.rotary_fraction) for a in (q, k))
    y = attention(q, k, v, segments).reshape(x.shape)
    return projection(config, params["out"], y) if config.output_projection else y


def feed_forward(config, params, x):
    if "up" not in params:  # one layer
        return projection(config, params, x)
    hidden = projection(config, params["up"], x)
    hidden = gelu(hidden) if config.ffn_activation == "gelu" else hidden
    if "norm" in params:
        hidden = layer_norm(
            hidden, params["norm"]["scale"], params["norm"]["bias"], 1e-5
        )
    return projection(config, params["down"], hidden)


def projection(config, params, x):
    """A memory layer where there are tables, else x W + b."""
    if "terms" in params:  # each of them hashes x, and they are added up
        return sum(projection(config, p, x) for p in params["terms"].values())
    if "tables" not in params:
        return np.tensordot(x, params["kernel"], axes=1) + params["bias"]
    learned = {k: float(params[k]) for k in ("beta", "gamma") if k in params}
    x = front(params.get("front", {}), x)
    y = memory_layer(
        x.reshape(-1, x.shape[-1]),
        params["tables"],
        params.get("bias"),
        config.score,
        config.projection_options.temperature,
        rows_read=config.projection_options.rows_read,
        **learned,
    )
    return y.reshape(*x.shape[:-1], *y.shape[1:])


def front(params, x):
    """mix(x) - t, the mix as a matrix."""
    width = x.shape[-1]
    matrix = params.get("rotation", np.eye(width))
    if "order" in params:
        matrix = np.eye(width)[:, params["order"].astype(int)]
    if "signs" in params:
        size = max(2**i for i in range(20) if width % 2**i == 0)
        parity = [[bin(i & j).count("1") for j in range(size)] for i in range(size)]
        block = (-1.0) ** np.array(parity) / np.sqrt(size)
        matrix = params["signs"][:, None] * np.kron(np.eye(width // size), block)
    return x @ matrix - params.get("thresholds", 0)


def _float64(tree):
    if isinstance(tree, dict):
        return {key: _float64(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64)
