"""Every sequence mixer as a dense formula in float64, numpy only, nothing of ours.

    y = ORACLES[name](config, params, x, positions, segment_ids)

`config` is any object with the model's fields, `params` the mixer's parameters by name.
"""

import numpy as np


def project(config, params, x):
    """A projection's definition: dense, or a sum of scored table rows."""
    if "kernel" in params:
        return np.tensordot(x, params["kernel"], axes=1) + params["bias"]
    tables = params["tables"]
    num_tables, num_buckets = tables.shape[:2]
    bits = num_buckets.bit_length() - 1
    z = x.reshape(*x.shape[:-1], num_tables, bits)
    codes = ((z >= 0) * 2 ** np.arange(bits)[::-1]).sum(axis=-1)
    beta = 2 / config.projection_options.temperature
    scores = np.prod(1 / (1 + np.exp(-beta * np.abs(z))), axis=-1)
    rows = tables[np.arange(num_tables), codes]  # [B, L, K, ...]
    return np.einsum("blk,blk...->bl...", scores, rows)


def split(config, params, x):
    """Three of [B, L, H, E]."""
    qkv = project(config, params["qkv"], x)
    qkv = qkv.reshape(*x.shape[:2], 3, config.num_heads, -1)
    return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]


def join(config, params, y):
    y = y.reshape(*y.shape[:2], -1)
    return project(config, params["out"], y) if "out" in params else y


def rotate(config, x, positions):
    """Complex multiplication of the pairs (i, i + R/2) of the rotary part."""
    half = int(x.shape[-1] * config.rotary_fraction / 2)
    frequency = config.rotary_base ** (-np.arange(half) / max(half, 1))
    turn = np.exp(1j * positions[..., None, None] * frequency)
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)


def visible(segment_ids, causal=True):
    """[B, t, s]: may t look at s?"""
    index = np.arange(segment_ids.shape[1])
    past = (index[:, None] >= index[None]) | (not causal)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return past & same & (segment_ids != 0)[:, None, :]


def softmax(logits, where=True):
    logits = np.where(where, logits, -np.inf)
    highest = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def normal_attention(config, params, x, positions, segment_ids):
    q, k, v = split(config, params, x)
    q, k = rotate(config, q, positions), rotate(config, k, positions)
    logits = np.einsum("bthe,bshe->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = softmax(logits, visible(segment_ids, config.causal)[:, None])
    return join(config, params, np.einsum("bhts,bshe->bthe", weights, v))


def dape_v2(config, params, x, positions, segment_ids):
    """Each query apart, over the keys that it sees."""
    q, k, v = split(config, params, x)
    q, k = rotate(config, q, positions), rotate(config, k, positions)
    slopes = 2.0 ** (-8 * np.arange(1, config.num_heads + 1) / config.num_heads)
    see, y = visible(segment_ids), np.zeros(q.shape)
    kernels = params["transform"]

    def over_keys(x, name):  # [M, C] -> [M, F]
        x = np.pad(x, [(1, 1), (0, 0)])
        windows = np.stack([x[:-2], x[1:-1], x[2:]])
        return np.einsum("imc,icf->mf", windows, kernels[name])

    for row, t in np.ndindex(*segment_ids.shape):
        keys = np.flatnonzero(see[row, t])
        if len(keys):
            logits = np.einsum("he,she->sh", q[row, t], k[row, keys])
            logits = logits / np.sqrt(q.shape[-1])
            alibi = -np.arange(len(keys))[::-1, None] * slopes
            hidden = over_keys(np.concatenate([logits, alibi], axis=1), "first")
            hidden = hidden + kernels["first_bias"]
            hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
            logits = logits + alibi + over_keys(hidden, "second")
            y[row, t] = np.einsum("hs,she->he", softmax(logits.T), v[row, keys])
    return join(config, params, y)


def _kernel(config, params, scores, v, segment_ids, guard):
    """Divide by the sum of the visible scores [B, H, t, s]."""
    scores = scores * visible(segment_ids)[:, None]
    total = scores.sum(axis=-1, keepdims=True)
    weights = scores / guard(total)
    return join(config, params, np.einsum("bhts,bshe->bthe", weights, v))


def _unguarded(z):
    return np.where(z == 0, 1, z)


def linear(config, params, x, positions, segment_ids):
    q, k, v = split(config, params, x)
    q, k = rotate(config, q, positions), rotate(config, k, positions)
    q, k = (np.where(a > 0, a + 1, np.exp(np.minimum(a, 0))) for a in (q, k))
    scores = np.einsum("bthe,bshe->bhts", q, k)
    return _kernel(config, params, scores, v, segment_ids, lambda z: z + 1e-6)


def linear_identity(config, params, x, positions, segment_ids):
    q, k, v = split(config, params, x)
    q, k = rotate(config, q, positions), rotate(config, k, positions)
    scores = np.einsum("bthe,bshe->bhts", q, k)
    return _kernel(config, params, scores, v, segment_ids, np.ones_like)


def cosformer(config, params, x, positions, segment_ids):
    q, k, v = split(config, params, x)
    max_len = config.mixer_options.max_len or config.seq_len
    gap = positions[:, :, None] - positions[:, None, :]
    scores = np.einsum("bthe,bshe->bhts", np.maximum(q, 0), np.maximum(k, 0))
    scores = scores * np.cos(np.pi / 2 * gap / max_len)[:, None]
    return _kernel(
        config, params, scores, v, segment_ids, lambda z: np.maximum(z, 1e-6)
    )


def trained_kernel(config, params, x, positions, segment_ids):
    def phi(x):
        for i in range(len(params["w"])):
            w, a, b = (params[name][i] for name in ("w", "a", "b"))
            value = np.einsum("blhe,efh->blhf", x, w)
            gate = np.einsum("blhe,erh,rfh->blhf", x, a, b)
            if i == len(params["w"]) - 1:
                value = np.logaddexp(value, 0)
            x = value / (1 + np.exp(-gate))
        return x

    q, k, v = split(config, params, x)
    q, k = phi(rotate(config, q, positions)), phi(rotate(config, k, positions))
    scores = np.einsum("bthe,bshe->bhts", q, k)
    return _kernel(config, params, scores, v, segment_ids, _unguarded)


def performer(config, params, x, positions, segment_ids):
    """`params['random_rows']` are the random features."""

    def phi(x):
        x = x / x.shape[-1] ** 0.25
        norm = (x**2).sum(axis=-1, keepdims=True)
        return np.exp(np.einsum("blhe,me->blhm", x, params["random_rows"]) - norm / 2)

    q, k, v = split(config, params, x)
    q, k = phi(rotate(config, q, positions)), phi(rotate(config, k, positions))
    scores = np.einsum("bthe,bshe->bhts", q, k)
    return _kernel(config, params, scores, v, segment_ids, _unguarded)


def linformer(config, params, x, positions, segment_ids):
    q, k, v = split(config, params, x)
    see = visible(segment_ids, config.causal).astype(float)
    write_k = params["write_keys"][positions]  # [B, L, m]
    write_v = params["write_values"][positions]
    slots = np.einsum("bts,bsm,bshe->bthme", see, write_k, k)
    weights = softmax(np.einsum("bthe,bthme->bthm", q, slots) / np.sqrt(q.shape[-1]))
    values = np.einsum("bts,bsm,bshe->bthme", see, write_v, v)
    return join(config, params, np.einsum("bthm,bthme->bthe", weights, values))


def luna_inputs(config, params, x):
    """q, c and pack: c is x itself without values."""
    if config.mixer_options.values:
        return split(config, params, x)
    parts = project(config, params["qkv"], x)
    parts = parts.reshape(*x.shape[:2], 2, config.num_heads, -1)
    return parts[:, :, 0], x.reshape(parts[:, :, 0].shape), parts[:, :, 1]


def luna_taus(config, params, width):
    """tau of reading and of writing."""
    if config.mixer_options.temperature == "learn":
        return np.exp(params["log_tau"]), np.exp(params["log_tau_pack"])
    tau = {"sqrt": np.sqrt(width), "unit": 1.0}[config.mixer_options.temperature]
    return tau, tau


def luna_stream(config, layers, inputs, segment_ids):
    """Luna layers with one memory through depth: (y of each, P after each).

    layers, inputs: parameters and normed x of each. Rows hold one document, whose tokens have
    an id that is not 0.
    """
    heads = (config.num_heads, config.embed_dim // config.num_heads)
    memory = layers[0]["memory"].reshape(-1, *heads)
    memory, ys, after = np.broadcast_to(memory, (len(inputs[0]), *memory.shape)), [], []
    for params, x in zip(layers, inputs, strict=True):
        q, c, pack = luna_inputs(config, params, x)
        tau, tau_pack = luna_taus(config, params, heads[1])
        y, packed = np.zeros(q.shape), np.zeros(memory.shape)
        for b, h in np.ndindex(len(x), heads[0]):
            real = segment_ids[b] != 0
            logits = memory[b, :, h] @ pack[b, real, h].T / tau_pack
            packed[b, :, h] = softmax(logits) @ c[b, real, h]
            reading = softmax(q[b, :, h] @ packed[b, :, h].T / tau)
            y[b, :, h] = reading @ packed[b, :, h]
        total = memory + packed
        memory = total / np.sqrt((total**2).mean(axis=-1, keepdims=True) + 1e-8)
        ys.append(join(config, params, y))
        after.append(memory)
    return ys, after


def _luna(config, params, q, c, pack, taus, positions, segment_ids):
    heads = (-1, config.num_heads, q.shape[-1])
    omega = np.einsum("bshe,mhe->bshm", pack, params["memory"].reshape(heads))
    omega = omega / taus[1]
    if not config.causal:
        see = visible(segment_ids, causal=False)[:, None, None]  # [B, 1, 1, t, s]
        logits = np.moveaxis(omega, 1, 3)[:, :, :, None]  # [B, H, m, 1, s]
        packed = np.einsum("bhmts,bshe->bthem", softmax(logits, see), c)
        weights = softmax(np.einsum("bthe,bthem->bthm", q, packed) / taus[0])
        return join(config, params, np.einsum("bthm,bthem->bthe", weights, packed))
    omega = np.where(omega > 0, omega + 1, np.exp(np.minimum(omega, 0)))
    mean = visible(segment_ids) / (positions + 1)[..., None]
    memory = np.einsum("bts,bshe,bshm->bthem", mean, c, omega)
    weights = softmax(np.einsum("bthe,bthem->bthm", q, memory) / taus[0])
    return join(config, params, np.einsum("bthm,bthem->bthe", weights, memory))


def luna(config, params, x, positions, segment_ids):
    q, c, pack = luna_inputs(config, params, x)
    taus = luna_taus(config, params, q.shape[-1])
    return _luna(config, params, q, c, pack, taus, positions, segment_ids)


def conv_luna(config, params, x, positions, segment_ids):
    q, c, pack = luna_inputs(config, params, x)
    width = config.mixer_options.width
    ahead = 0 if config.causal else width // 2

    def filtered(x):
        y = np.zeros_like(x)
        for row in range(x.shape[0]):
            for t in range(x.shape[1]):
                inside = [
                    i
                    for i in range(t + ahead - width + 1, t + ahead + 1)
                    if 0 <= i < x.shape[1]
                    and segment_ids[row, i] == segment_ids[row, t]
                ]
                if config.mixer_options.filter == "pool":
                    y[row, t] = x[row, inside].max(axis=0)
                else:
                    for i in inside:
                        weight = params["kernel"][width - 1 - (t + ahead - i)]
                        y[row, t] += weight[:, None] * x[row, i]
        return y

    taus = luna_taus(config, params, q.shape[-1])
    rest = (positions, segment_ids)
    return _luna(config, params, q, filtered(c), filtered(pack), taus, *rest)


def short_filter(params, names, x, segment_ids):
    """silu of the filter [W, C] over the document: [B, L, C]."""
    kernel, bias = (
        np.concatenate([params[name] for name in pair], axis=-1) for pair in names
    )
    y = np.zeros_like(x)
    for row, t in np.ndindex(*segment_ids.shape):
        y[row, t] = bias
        inside = np.flatnonzero(segment_ids[row, : t + 1] == segment_ids[row, t])
        for back, i in enumerate(inside[::-1][: len(kernel)]):
            y[row, t] += kernel[len(kernel) - 1 - back] * x[row, i]
    return y / (1 + np.exp(-y))


def state_space(params, x, b, c, dt, segment_ids):
    """S_t = a_t S_{t-1} + dt_t b_t (x) x_t, token by token: [B, L, H, P]."""
    y = np.zeros_like(x)
    dt = np.log1p(np.exp(dt + params["dt_bias"]))
    a = np.exp(-dt * np.exp(params["a_log"]))
    for row in range(x.shape[0]):
        document = 0
        for t in np.flatnonzero(segment_ids[row]):
            if segment_ids[row, t] != document:
                document = segment_ids[row, t]
                state = np.zeros((*b.shape[2:], x.shape[-1]))
            new = (dt[row, t, :, None] * b[row, t])[..., None] * x[row, t, :, None]
            state = a[row, t, :, None, None] * state + new
            y[row, t] = np.einsum("hn,hnp->hp", c[row, t], state)
            y[row, t] += params["skip"][:, None] * x[row, t]
    return y


def mamba2(config, params, x, positions, segment_ids):
    heads, size = config.num_heads, config.mixer_options.state_size
    inner = project(config, params["inner"], x)
    z, value = inner[:, :, 0], inner[:, :, 1]
    steps = project(config, params["steps"], x)
    rows = np.concatenate([value, steps[..., : 2 * size]], axis=-1)
    names = (("kernel", "shared_kernel"), ("bias", "shared_bias"))
    rows = short_filter(params, names, rows, segment_ids)
    value, b, c = np.split(rows, [z.shape[-1], z.shape[-1] + size], axis=-1)
    value = value.reshape(*x.shape[:2], heads, -1)
    b, c = (np.repeat(v[:, :, None], heads, axis=2) for v in (b, c))
    y = state_space(params["ssd"], value, b, c, steps[..., 2 * size :], segment_ids)
    y = y.reshape(z.shape) * z / (1 + np.exp(-z))
    y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-5) * params["scale"]
    return project(config, params["out"], y)


def recurformer(config, params, x, positions, segment_ids):
    """One layer: its kept heads, then its recurrent ones, each put in its place."""
    heads, width = config.num_heads, config.embed_dim // config.num_heads
    options = config.mixer_options
    [count] = options.recurrent_heads
    kept = project(config, params["qkv"], x)
    q, k, v = np.moveaxis(kept.reshape(*x.shape[:2], 3, -1, width), 2, 0)
    q, k = rotate(config, q, positions), rotate(config, k, positions)
    logits = np.einsum("bthe,bshe->bhts", q, k) / np.sqrt(width)
    weights = softmax(logits, visible(segment_ids)[:, None])
    stored = np.zeros((*x.shape[:2], heads, width), x.dtype)
    stored[:, :, : heads - count] = np.einsum("bhts,bshe->bthe", weights, v)
    own = params["recurrent"]
    inputs = project(config, own["inputs"], x).reshape(*x.shape[:2], count, -1)
    names = (("kernel",), ("bias",))
    rows = inputs[..., : 3 * width].reshape(*x.shape[:2], count, 3, width)
    rows = np.moveaxis(rows, 2, 3).reshape(*x.shape[:2], 3, -1)
    rows = short_filter(own, names, rows, segment_ids)
    c, b, value = np.moveaxis(rows.reshape(*x.shape[:2], 3, count, width), 2, 0)
    y = state_space(own["ssd"], value, b, c, inputs[..., -1], segment_ids)
    z = inputs[..., 3 * width : 4 * width] + own["gate"].reshape(count, width)
    y = y * z / (1 + np.exp(-z))
    y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-5)
    stored[:, :, heads - count :] = y * own["scale"].reshape(count, width)
    placed = np.zeros_like(stored)
    for head, place in enumerate(options.head_order):
        placed[:, :, place] = stored[:, :, head]
    return join(config, params, placed)


ORACLES = {
    "softmax": normal_attention,
    "dape_v2": dape_v2,
    "linear": linear,
    "linear_identity": linear_identity,
    "cosformer": cosformer,
    "trained_kernel": trained_kernel,
    "performer": performer,
    "linformer": linformer,
    "luna": luna,
    "conv_luna": conv_luna,
    "mamba2": mamba2,
    "recurformer": recurformer,
}
