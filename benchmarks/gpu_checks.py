"""What a GPU computes, held against float64 and against the CPU; a part of `gpu_day`.

Every figure of `checks` is the largest difference over the largest entry. Start at `checks`
and `quickstart`; both return rows of (name, function that measures it).
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import train_step
from memoryformer import model
from memoryformer.generation import sampler
from memoryformer.ops import attention
from memoryformer.ops.lookup import gpu as lookup_gpu
from memoryformer.ops.lookup import xla as lookup_xla

ROOT = pathlib.Path(__file__).parent.parent
Row = dict[str, object]


def checks(toy: bool) -> list[tuple[str, Callable[[], Row]]]:
    """Every implementation and type of the lookup, attention, a model, its decoding."""
    rows = [
        (f"lookup {name} {dtype}", lambda n=name, d=dtype: check_lookup(n, d, toy))
        for name in ("gpu", "xla", "onehot")
        for dtype in ("float32", "bfloat16")
    ]
    rows.append(("attention cudnn", lambda: check_attention(toy)))
    rows += [
        (f"model {name}", lambda n=name: check_model(n, toy))
        for name in (("xla",) if toy else ("gpu", "xla"))
    ]
    return [*rows, ("decoding", lambda: check_decoding(toy))]


def check_lookup(name: str, dtype: str, toy: bool) -> Row:
    """y, dT and ds of ragged shapes and skewed codes, and the same bits twice."""
    widths = (130,) if toy else (400, 640, 768, 1536)  # one to twelve columns a thread
    rows = [lookup_differences(name, dtype, toy, F) for F in widths]
    worst = {what: max(row[what] for row in rows) for what in rows[0]}
    tolerance = {"dT": 4e-3 if dtype == "bfloat16" else 1e-5}  # dT is rounded to it
    require(worst, {"y": 1e-5, "dT": 1e-5, "ds": 1e-5} | tolerance)
    return worst


def lookup_differences(name: str, dtype: str, toy: bool, F: int) -> Row:
    """Differences from float64; raises `AssertionError` where two runs differ."""
    N, K, C = (3, 2, 4) if toy else (1000, 24, 256)
    random = np.random.default_rng(len(name + dtype))
    tables = jnp.asarray(random.standard_normal((K, C, F)), dtype)
    codes = (C * random.random((N, K)) ** 3).astype(np.int32)
    scores, dy = (
        random.standard_normal(s).astype(np.float32) for s in ((N, K), (N, F))
    )
    function = {
        "gpu": lambda t, c, s: lookup_gpu.gpu(t, c, s, jax.default_backend() != "gpu"),
        "xla": lookup_xla.scan_tables,
        "onehot": lookup_xla.onehot_products,
    }[name]

    @jax.jit
    def run(tables, codes, scores, dy):
        y, pullback = jax.vjp(lambda t, s: function(t, codes, s), tables, scores)
        return y, *pullback(dy)

    results = run(tables, codes, scores, dy)
    exact_rows = np.asarray(tables, np.float64)
    read = exact_rows[np.arange(K), codes]  # [N, K, F]
    dtables = np.zeros((K, C, F))
    for k in range(K):
        np.add.at(dtables[k], codes[:, k], scores[:, k, None].astype(np.float64) * dy)
    expected = {
        "y": np.einsum("nk,nkf->nf", scores, read),
        "dT": dtables,
        "ds": np.einsum("nf,nkf->nk", dy, read),
    }
    same = jax.tree.map(np.array_equal, results, run(tables, codes, scores, dy))
    if not all(same):
        raise AssertionError("two runs differ")
    return {
        what: difference(result, expected[what])
        for what, result in zip(expected, results, strict=True)
    }


def check_attention(toy: bool) -> Row:
    """Fused attention in bfloat16 with documents and padding, and its gradients."""
    if jax.default_backend() != "gpu":
        return {"left out": "cuDNN needs a GPU"}
    shape = (2, 64, 2, 16) if toy else (2, 512, 4, 64)
    B, L = shape[:2]
    q, k, v, dy = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 4)
    )
    segments = np.where(np.arange(L) < L // 3, 1, 2) * (np.arange(L) < L - 20)
    segments = jnp.asarray(np.broadcast_to(segments, (B, L)), jnp.int32)

    def fused(q, k, v):
        return attention.fused(q, k, v, segments, "cudnn")

    results = jax.jit(lambda *a: with_gradients(fused, a[:3], a[3]))(q, k, v, dy)
    with on_cpu_in_float64():
        operands = [jnp.asarray(np.asarray(a, np.float64)) for a in (q, k, v, dy)]
        index = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
        ids = jnp.asarray(np.asarray(segments))
        mask = attention.causal_mask(index, ids, index, ids)

        def plain(q, k, v):
            return attention.softmax(q, k, v, mask)

        expected = with_gradients(plain, operands[:3], operands[3])
        expected = [np.asarray(a) for a in expected]
    names = ("y", "dq", "dk", "dv")
    row = {
        n: difference(r, e) for n, r, e in zip(names, results, expected, strict=True)
    }
    require(row, dict.fromkeys(names, 2e-2))
    return row


def check_model(lookup: str, toy: bool) -> Row:
    """Loss and gradients of a float32 model here, and in float64 on the CPU."""
    config = toy_model(lookup if jax.default_backend() == "gpu" else "xla", "float32")
    params = jax.tree.map(np.asarray, model.init(config, 0))
    batch = train_step.make_batch(config, 2 if toy else 8, 0)

    def loss(config, params, batch):
        logits = model.forward(config, params, batch["inputs"])
        targets = jax.nn.one_hot(batch["targets"], logits.shape[-1], dtype=logits.dtype)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1))

    with jax.default_matmul_precision("highest"):
        value, gradients = jax.jit(
            jax.value_and_grad(lambda p: loss(config, p, batch))
        )(params)
    with on_cpu_in_float64():
        wide = dataclasses.replace(config, dtype="float64", lookup="reference")
        exact, exact_gradients = jax.value_and_grad(lambda p: loss(wide, p, batch))(
            jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        )
        exact_gradients = jax.tree.map(np.asarray, exact_gradients)
    row = {
        "loss": abs(float(value) - float(exact)),
        "gradient": max(
            difference(a, b)
            for a, b in zip(
                jax.tree.leaves(gradients),
                jax.tree.leaves(exact_gradients),
                strict=True,
            )
        ),
    }
    require(row, {"loss": 1e-5, "gradient": 1e-3})
    return row


def check_decoding(toy: bool) -> Row:
    """Greedy tokens are the argmax of the whole forward pass, at 1 and at 8 streams."""
    config = toy_model("xla", "float32")
    params = model.init(config, 0)
    generator = sampler.Generator(config, params)
    row = {}
    for streams in (1, 2 if toy else 8):
        prompts = [[1 + i, 7] for i in range(streams)]
        sampling = sampler.SamplingConfig(max_tokens=8, temperature=0.0)
        with jax.default_matmul_precision("highest"):
            tokens = np.array(list(generator.stream_batch(prompts, sampling))).T
            inputs = np.concatenate([np.array(prompts), tokens], axis=1)
            logits = np.asarray(model.forward(config, params, jnp.asarray(inputs)))
        logits = logits[:, 1:-1]
        picked = np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        gap = float((logits.max(axis=-1) - picked).max() / np.abs(logits).max())
        row[f"{streams} streams"] = gap
    require(row, dict.fromkeys(row, 1e-4))
    return row


def difference(result, expected: np.ndarray) -> float:
    """The largest difference over the largest entry; NaN stays."""
    result = np.asarray(result, np.float64)
    return float(np.abs(result - expected).max() / np.abs(expected).max())


def require(row: Row, tolerances: dict[str, float]) -> None:
    """Raise `AssertionError` for a difference that is not below its tolerance."""
    for name, limit in tolerances.items():
        if not row[name] < limit:
            raise AssertionError(f"{name} is off by {row[name]:.1e}, over {limit:.0e}")


def with_gradients(function: Callable, operands, dy) -> tuple:
    """(y, and the gradient of each operand)."""
    y, pullback = jax.vjp(function, *operands)
    return y, *pullback(dy.astype(y.dtype))


class on_cpu_in_float64:  # noqa: N801  reads as a clause
    """Compute on the CPU, in float64."""

    def __enter__(self):
        self._contexts = [
            jax.enable_x64(True),
            jax.default_device(jax.devices("cpu")[0]),
        ]
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in reversed(self._contexts):
            context.__exit__(*error)


# --- The quickstart, here and on the CPU. ----------------------------------------------


# A GPU multiplies float32 matrices in TF32, whose products have 10 bits, unless it is told not to.
PRECISIONS = {"float32 products": "highest", "TF32 products": "default"}


def quickstart(toy: bool) -> list[tuple[str, Callable[[], Row]]]:
    """Losses of the same run on two platforms; the text is this repository's own code."""
    here = jax.default_backend()
    steps = 4 if toy else 300
    reference: dict[int, float] = {}

    def on_cpu():
        reference.update(train("cpu", "default", steps, toy))
        return {"first": reference[1], "last": reference[steps]}

    def on_device(precision):
        losses = train(here, precision, steps, toy)
        gaps = {n: abs(loss - reference[n]) for n, loss in losses.items()}
        last = [n for n in gaps if n > steps - steps // 4]
        row = {
            "first": losses[1],
            "last": losses[steps],
            "first gap": gaps[1],
            "largest gap of the first 10": max(gaps[n] for n in gaps if n <= 10),
            "mean gap of the last quarter": statistics.mean(
                losses[n] - reference[n] for n in last
            ),
        }
        require(row, {"first gap": 1e-4 if precision == "highest" else 1e-2})
        return row

    rows = [
        (f"{here}, {name}", lambda p=precision: on_device(p))
        for name, precision in PRECISIONS.items()
    ]
    return [("cpu", on_cpu), *(rows[:1] if toy else rows)]


def train(platform: str, precision: str, steps: int, toy: bool) -> dict[int, float]:
    """Losses by step of train.py in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "train.py", "--config=configs/quickstart.py",
            f"--workdir={folder}/run", f"--config.data.data_dir={folder}/data",
            "--config.data.source=text", "--config.data.path=memoryformer",
            f"--config.train.num_steps={steps}", "--config.train.log_every=1",
            "--config.eval.every_steps=0", "--config.eval.num_batches=2",
            "--config.checkpoint.every_steps=0", "--config.mesh=single",
            *(TOY_RUN if toy else ()),
        ]  # fmt: skip
        environment = {
            **os.environ,
            "JAX_PLATFORMS": {"gpu": "cuda"}.get(platform, platform),
            "JAX_DEFAULT_MATMUL_PRECISION": precision,
        }
        ran = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if ran.returncode:
            reason = ran.stderr[-400:]
            raise RuntimeError(f"train.py ended with {ran.returncode}: {reason}")
        metrics = pathlib.Path(folder, "run", "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in metrics.splitlines()]
    return {r["step"]: r["train/loss"] for r in rows if "train/loss" in r}


TOY_RUN = (
    "--config.data.tokenizer=bytes", "--config.model.vocab_size=264",
    "--config.model.embed_dim=16", "--config.model.num_layers=1",
    "--config.model.seq_len=32", "--config.train.compilation_cache=off",
    "--config.data.path=configs", "--config.optimizer.warmup_steps=1",
)  # fmt: skip


def toy_model(lookup: str, dtype: str) -> model.ModelConfig:
    """A model of two memory blocks whose float64 gradients take a second."""
    return model.ModelConfig(
        vocab_size=300, embed_dim=128, num_layers=2, num_heads=2, seq_len=64,
        lookup=lookup, dtype=dtype, mixer_std=0.3, ffn_std=0.3, embed_std=1.0,
    )  # fmt: skip
