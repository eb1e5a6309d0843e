"""Run an exported MemoryFormer with numpy alone: one file, no other dependency.

    import reader
    model = reader.load(".")                 # the folder of config.json, model.safetensors
    logits = model.logits([[1, 2, 3]])       # int [B, L] -> float32 [B, L, V]
    tokens = model.greedy([1, 2, 3], 20)     # 20 more tokens

    python reader.py FOLDER 1,2,3 20

It is written to be read beside the equations and to check other implementations, not to be
fast: greedy text runs the whole model again for every token. Letters: B batch, L length,
D width, H heads, E head width, K tables, tau bits, C = 2^tau rows of a table, V vocabulary.
"""

import json
import math
import pathlib
import sys

import numpy as np

# --------------------------------------------------------------------------------------
# The file: 8 bytes n, n bytes of JSON {name: {dtype, shape, data_offsets}}, the arrays.

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1"}


def read_safetensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Return {name: array}; bfloat16 becomes float32."""
    data = pathlib.Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(data[start + begin : start + end], _DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            raw = (raw.astype("<u4") << 16).view("<f4")
        arrays[name] = raw.reshape(entry["shape"])
    return arrays


def load(folder: str | pathlib.Path) -> "Model":
    """Read config.json and model.safetensors of `folder`: a `Model`."""
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("format") != "memoryformer" or config["version"] != 1:
        raise ValueError(f"{folder}: not an export that this reader knows.")
    arrays = read_safetensors(folder / "model.safetensors")
    params = {}
    for name, array in arrays.items():
        if name.endswith(".scale_of_rows"):
            continue
        if array.dtype == np.int8:  # one scale per row
            array = array * arrays[name + ".scale_of_rows"][..., None]
        params[name] = np.asarray(array, np.float32)
    return Model(config["model"], params)


# --------------------------------------------------------------------------------------
# The model.


class Model:
    """A decoder-only language model; `config` as in config.json, `params` by path."""

    def __init__(self, config, params):
        plain = {"mixer": "softmax", "causal": True, "logit_transform": "none"}
        plain |= {"recurrence": "none"}
        config = config | config.get("projection_options", {})  # older exports: flat
        fields = config | config.get("mixer_options", {})
        for name, value in plain.items():
            if fields.get(name, value) != value:
                raise ValueError(
                    f"{name}={fields[name]!r}: this reader has only {value!r}."
                )
        has_tables = any(name.endswith(".tables") for name in params)
        if has_tables and config["score"] not in _SCORES:
            raise ValueError(
                f"score={config['score']!r}: this reader has only {', '.join(_SCORES)}."
            )
        self.config, self.params = config, params

    def logits(self, tokens: np.ndarray | list[list[int]]) -> np.ndarray:
        """Int [B, L] -> float32 [B, L, V]."""
        c, p = self.config, self.params
        tokens = np.asarray(tokens)
        x = p["embed.embedding"][tokens]  # [B, L, D]
        for n in range(2, c.get("ngram_order", 1) + 1) if c.get("ngram_rows") else ():
            rows = p["ngrams.rows"].reshape(-1, c["ngram_rows"], x.shape[-1])[n - 2]
            x[:, n - 1 :] += rows[ngram_buckets(tokens, n, len(rows))]
        for i in range(c["num_layers"]):
            block = f"blocks.{i}."
            normed = self._norm(block + "norm1", x)
            mixed = self._attention(block + "mixer", normed, tokens)
            if c["residual"] == "sequential":
                x = x + mixed
                x = x + self._feed_forward(block, self._norm(block + "norm2", x))
            elif c["residual"] == "parallel":
                second = self._norm(block + "norm2", x)
                x = x + mixed + self._feed_forward(block, second)
            else:  # Eq. 13 to the letter
                x = normed + mixed + self._feed_forward(block, normed)
        x = self._norm("final_norm", x)
        tied = c["tie_embeddings"]
        return x @ (p["embed.embedding"].T if tied else p["head.kernel"])

    def greedy(self, tokens: list[int], num_tokens: int) -> list[int]:
        """Return `num_tokens` more tokens, each the most likely one."""
        tokens = list(tokens)
        for _ in range(num_tokens):
            tokens.append(int(self.logits([tokens])[0, -1].argmax()))
        return tokens[len(tokens) - num_tokens :]

    def _norm(self, name, x):
        scale, eps = self.params[name + ".scale"], self.config["norm_eps"]
        if self.config["norm"] == "rmsnorm":
            rms = np.sqrt(np.mean(x * x, -1, keepdims=True))
            return x / (rms + np.float32(eps)) * scale
        return layer_norm(x, scale, self.params[name + ".bias"], eps)

    def _project(self, name, x):
        """Dense: x W + b. Memory layer: sum_k s(z_k) T_k[h(z_k)] + b."""
        p = self.params
        if name + ".terms.0.tables" in p:  # memory layers, added up
            count = 1
            while f"{name}.terms.{count}.tables" in p:
                count += 1
            return sum(self._project(f"{name}.terms.{i}", x) for i in range(count))
        if name + ".kernel" in p:
            y: np.ndarray | float = np.tensordot(x, p[name + ".kernel"], 1)
        else:
            code_bits = p[name + ".tables"].shape[1].bit_length() - 1  # C = 2^tau
            x = self._front(name + ".front", x)
            chunks = x.reshape(*x.shape[:-1], -1, code_bits)  # z: [B, L, K, tau]
            bit_weights = 1 << np.arange(code_bits)[::-1]  # first value: high bit
            codes = ((chunks >= 0) * bit_weights).sum(-1)  # h(z): [B, L, K]
            scores = self._scores(name, chunks)  # s(z): [B, L, K]
            y = self._read(p[name + ".tables"], codes, scores)
            if self.config.get("rows_read", 1) == 2:  # across the least certain bit
                least = np.abs(chunks).argmin(-1)
                beta, gamma = self._beta_and_gamma(name)
                second = np.exp(-gamma * beta * np.abs(chunks).min(-1))
                y = y + self._read(
                    p[name + ".tables"], codes ^ bit_weights[least], scores * second
                )
        return y + p[name + ".bias"] if name + ".bias" in p else y

    def _read(self, tables, codes, scores):
        """sum_k s_k T_k[h_k]: [B, L, K] twice -> [B, L, ..]."""
        y: np.ndarray | float = 0.0
        for k, table in enumerate(tables):  # [C, ..]
            shape = codes.shape[:2] + (1,) * (table.ndim - 1)
            y = y + scores[..., k].reshape(shape) * table[codes[..., k]]
        return y

    def _front(self, name, x):
        """mix(x) - t; the mix is whichever there is: signs and Hadamard, rotation, order."""
        p = self.params
        if name + ".signs" in p:
            x = hadamard(x * p[name + ".signs"])
        elif name + ".rotation" in p:
            x = x @ p[name + ".rotation"]
        elif name + ".order" in p:
            x = x[..., p[name + ".order"].astype(int)]
        return x - p[name + ".thresholds"] if name + ".thresholds" in p else x

    def _scores(self, name, chunks):
        """||z||^a exp(gamma sum_i log sigmoid(beta |z_i|))."""
        kind = self.config["score"]
        beta, gamma = self._beta_and_gamma(name)
        size = np.abs(chunks)
        confidence = np.exp(gamma * -np.log1p(np.exp(-beta * size)).sum(-1))
        length = size.sum(-1)
        return _SCORES[kind](length, confidence).astype(np.float32)

    def _beta_and_gamma(self, name):
        if self.config["score"] == "learned":
            return self.params[name + ".beta"], self.params[name + ".gamma"]
        return np.float32(2.0 / self.config["temperature"]), np.float32(1.0)

    def _attention(self, name, x, tokens):
        c = self.config
        heads, length = c["num_heads"], x.shape[1]
        qkv = self._project(name + ".qkv", x)  # [B, L, 3, D]
        if c.get("token_rows"):
            qkv = qkv + self.params[name + ".token_rows.rows"][tokens]
        qkv = qkv.reshape(*qkv.shape[:3], heads, -1)  # [B, L, 3, H, E]
        q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))  # [B, H, L, E]
        q, k = self._rotate(q), self._rotate(k)
        scores = q @ k.swapaxes(-1, -2) / np.float32(math.sqrt(q.shape[-1]))
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = (weights @ v).swapaxes(1, 2).reshape(x.shape)
        if c["output_projection"]:
            y = self._project(name + ".out", y)
        return y

    def _rotate(self, x):
        """Turn pair (i, i + R/2) of [B, H, L, E] by position * base^(-2i/R)."""
        c = self.config
        half = int(x.shape[-1] * c["rotary_fraction"] / 2)
        frequency = np.float32(c["rotary_base"]) ** (
            -np.arange(half, dtype=np.float32) / np.float32(max(half, 1))
        )
        angle = np.arange(x.shape[2], dtype=np.float32)[:, None] * frequency
        cos, sin = np.cos(angle), np.sin(angle)
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = [a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]]
        return np.concatenate(turned, -1)

    def _feed_forward(self, block, x):
        p, name = self.params, block + "ffn"
        if name + ".up.kernel" not in p and name + ".norm.scale" not in p:  # one layer
            return self._project(name, x)
        activation = _ACTIVATIONS[self.config["ffn_activation"]]
        hidden = activation(self._project(name + ".up", x))
        if name + ".norm.scale" in p:  # between two of them
            scale, bias = (p[f"{name}.norm.{s}"] for s in ("scale", "bias"))
            hidden = layer_norm(hidden, scale, bias, 1e-5)
        return self._project(name + ".down", hidden)


def layer_norm(
    x: np.ndarray, scale: np.ndarray, bias: np.ndarray, eps: float
) -> np.ndarray:
    """(x - mean) / sqrt(var + eps) * scale + bias."""
    x = x - x.mean(-1, keepdims=True)
    variance = np.mean(x * x, -1, keepdims=True)
    return x / np.sqrt(variance + np.float32(eps)) * scale + bias


def ngram_buckets(tokens: np.ndarray, order: int, num_rows: int) -> np.ndarray:
    """The row of each `order` tokens of [B, L]: [B, L - order + 1]; 32 bits, no sign."""
    length = max(tokens.shape[1] - order + 1, 0)
    h = np.full((len(tokens), length), 2_166_136_261 + order, np.uint32)
    for i in range(order):
        h = (h ^ tokens[:, i : i + length].astype(np.uint32)) * np.uint32(16_777_619)
    h = (h ^ h >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    h = (h ^ h >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return (h ^ h >> np.uint32(16)) % np.uint32(num_rows)


def hadamard(x: np.ndarray) -> np.ndarray:
    """Multiply blocks of n values by H_n / sqrt(n); n: the largest power of 2 in the width."""
    size = x.shape[-1] & -x.shape[-1]
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = x.reshape(*x.shape[:-1], -1, size) @ (matrix / np.float32(size**0.5))
    return blocks.reshape(x.shape)


def gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x)."""
    erf = np.vectorize(math.erf, otypes=[np.float32])
    return x * np.float32(0.5) * (1 + erf(x / np.float32(math.sqrt(2))))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of x Phi(x)."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    return x * np.float32(0.5) * (1 + np.tanh(inner))


_SCORES = {  # of ||z|| and the exponential
    "softmax": lambda length, confidence: confidence,
    "l1_softmax": lambda length, confidence: length * confidence,
    "learned": lambda length, confidence: length * confidence,
    "l1": lambda length, confidence: length,
    "constant": lambda length, confidence: np.ones_like(length),
}
_ACTIVATIONS = {"none": lambda x: x, "gelu": gelu, "gelu_tanh": gelu_tanh}


if __name__ == "__main__":
    prompt = [int(token) for token in sys.argv[2].split(",")]
    print(load(sys.argv[1]).greedy(prompt, int(sys.argv[3])))
