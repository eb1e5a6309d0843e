"""Heads that look at near tokens become recurrent: softmax -> `mixer='recurformer'`.

    ratio_h(w) = mean over queries t >= 2w of a document of  sum_{0 <= t - s < w} A_h[t, s]

is how much of a head's attention lies on the last w tokens; with `first_token` the document's first
one counts as near, too. After RecurFormer (2410.12850), which has no code: this definition, the
choice and the start of a recurrent head are ours.

    C, B, x = silu of the head's q, k, v (the filter passes the token itself)
    a_t = 1 - 1/w,  D = 0,  a gate that is open,  a scale that gives what the head put out (RMS)

Q, K and V of kept heads, tables or kernels, move as they are, and every head's output stays in its
place: a conversion that replaces no head changes no logit. Start at `convert_run`.
"""

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer import model as model_lib
from memoryformer.convert import folders, transfer
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError
from memoryformer.files import atomic
from memoryformer.model import mixers, token_rows
from memoryformer.model.mixers import mamba2
from memoryformer.notation import Array, Params
from memoryformer.ops import attention
from memoryformer.runs import remote
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment

REPORT = "recency.json"
STEP, OPEN_GATE = 0.1, 1.2785  # dt of a head at first; silu(1.2785) = 1


class Recency(NamedTuple):
    """Of each layer and head: float64 [layers, H]."""

    ratio: np.ndarray
    with_first: np.ndarray  # where the first token of a document counts as near
    rms: np.ndarray  # of what the head puts out


def convert_run(
    workdir: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    step: int | None = None,
    window: int = 16,
    share: float = 0.5,
    threshold: float | None = None,
    first_token: bool = False,
    batches: int = 8,
) -> str:
    """Measure the heads of a run's step (None: the newest); return the table of them.

    With `output`, a new folder, the run with some heads recurrent becomes step 0 of a run there: those
    of a ratio of at least `threshold`, else the highest `share` of all heads. Raises `ConfigError`.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"--share={share}: must be from 0 to 1.")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold={threshold}: must be from 0 to 1.")
    workdir = remote.copied(workdir, step)
    run, params, facts = experiment.load(workdir, step)
    check(run.model)
    if output is not None:
        transfer.check_target(workdir, output)
    dataset = run_tokenizer.dataset(workdir, run.data, facts, run.model.vocab_size)
    source = dataset.train.batches(
        run.model.seq_len, run.train.batch_size, run.train.seed
    )
    epoch = max(1, source.windows_per_epoch // run.train.batch_size)
    measured = map(source.batch, range(min(batches, epoch)))
    recency = measure(run.model, params, measured, window)
    ratio = recency.with_first if first_token else recency.ratio
    chosen = choose(ratio, share, threshold)
    if output is not None:
        model, params = convert(run.model, params, chosen, recency.rms, window)
        run = dataclasses.replace(run, model=model)
        report = {
            "step": facts["step"],
            "window": window,
            "first_token": first_token,
            "recurrent": chosen.tolist(),
            **{name: value.tolist() for name, value in recency._asdict().items()},
        }
        with folders.fill(output, last=run_steps.FOLDER) as folder:
            atomic.write_json(folder / REPORT, report, indent=2)
            about = (dataset.fingerprint, dataset.tokenizer)
            transfer.begin_run(folder, run, params, *about)
    return table(recency, chosen, window)


def check(config: model_lib.ModelConfig) -> None:
    """Raise `ConfigError` for a model whose heads are not those of plain causal softmax."""
    options = config.mixer_options
    plain = config.mixer == "softmax" and options.logit_transform == "none"
    if not plain or not config.causal:
        raise ConfigError(
            f"model.mixer={config.mixer!r}: only a causal softmax model without a "
            "logit_transform has heads that can become recurrent."
        )
    token_rows.refuse(config, "the measure of heads")
    if config.recurrence != "none":
        raise ConfigError(
            f"model.recurrence={config.recurrence!r}: its chunks share a memory; heads "
            "are measured over whole documents, of a model without one."
        )


def measure(
    config: model_lib.ModelConfig,
    params: Params,
    batches: Iterable[dict[str, Any]],
    window: int,
) -> Recency:
    """Return the recency of every head over batches of rows; raises `ConfigError`.

    All attention is formed, in float32: rows of some thousand tokens at most.
    """
    passed = jax.jit(lambda params, batch: _sums(config, params, batch, window))
    totals: Any = None
    for batch in batches:
        names = ("inputs", "positions", "segment_ids")
        sums = passed(params, {name: jnp.asarray(batch[name]) for name in names})
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    if totals is None or not totals["queries"]:
        raise ConfigError(
            f"--window={window}: no document of the calibration text has a token with "
            f"{2 * window} before it; take a smaller one."
        )
    square = totals["square"] / (totals["tokens"] * config.head_dim)
    near, first = totals["near"], totals["first"]
    return Recency(near / totals["queries"], first / totals["queries"], square**0.5)


def _sums(config, params, batch, window):
    """Sums over a batch of what `measure` divides."""
    transformer = model_lib.merge(config, params)
    seq = mixers.SeqInfo(batch["positions"], batch["segment_ids"])
    x = transformer.embedded(batch["inputs"], seq)
    rows = []
    for block in transformer.blocks:
        mixer: Any = block.mixer  # `Softmax`, by `check`
        q, k, v = mixer.split(block.norm1(x), seq)
        q, k = mixer.rotary(q, k, seq)
        rows.append(_of_heads(q, k, v, seq, window))
        x, _ = block(x, seq)
    sums = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    real = seq.segment_ids != 0
    counts = {"tokens": real, "queries": real & (seq.positions >= 2 * window)}
    return sums | {name: jnp.sum(mask) for name, mask in counts.items()}


def _of_heads(q: Array, k: Array, v: Array, seq: mixers.SeqInfo, window: int):
    """Sums of near attention, of that with the first token, and of squared outputs: [H]."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    index = jnp.broadcast_to(jnp.arange(q.shape[1])[None], seq.positions.shape)
    segments = seq.segment_ids
    mask = attention.causal_mask(index, segments, index, segments)[:, None]
    logits = jnp.einsum("bthe,bshe->bhts", q, k) * q.shape[-1] ** -0.5
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, -1e30), -1), 0)
    distance = (seq.positions[:, :, None] - seq.positions[:, None, :])[:, None]
    asked = ((segments != 0) & (seq.positions >= 2 * window))[:, None, :, None]
    near, first = distance < window, (seq.positions == 0)[:, None, None]
    y = jnp.einsum("bhts,bshe->bthe", weights, v)
    real = (segments != 0)[..., None, None]
    return {
        "near": jnp.sum(jnp.where(asked & near, weights, 0), axis=(0, 2, 3)),
        "first": jnp.sum(jnp.where(asked & (near | first), weights, 0), axis=(0, 2, 3)),
        "square": jnp.sum(jnp.where(real, y**2, 0), axis=(0, 1, 3)),
    }


def choose(ratio: np.ndarray, share: float, threshold: float | None) -> np.ndarray:
    """Return which heads become recurrent, bool [layers, H]; of equals, the first."""
    if threshold is not None:
        return ratio >= threshold
    count = round(share * ratio.size)
    highest = np.argsort(-ratio, axis=None, kind="stable")[:count]
    chosen = np.zeros(ratio.size, bool)
    chosen[highest] = True
    return chosen.reshape(ratio.shape)


def convert(
    config: model_lib.ModelConfig,
    params: Params,
    chosen: np.ndarray,
    rms: np.ndarray,
    window: int,
) -> tuple[model_lib.ModelConfig, Params]:
    """Return the model whose heads `chosen`, bool [layers, H], are recurrent, and its parameters.

    rms: of what each head puts out, [layers, H], which a recurrent one puts out at first.
    """
    check(config)
    orders = [(*np.flatnonzero(~row), *np.flatnonzero(row)) for row in chosen]
    options = {
        "recurrent_heads": tuple(int(row.sum()) for row in chosen),
        "head_order": tuple(int(head) for order in orders for head in order),
        "attention": config.mixer_options.attention,
    }
    converted = dataclasses.replace(config, mixer="recurformer", mixer_options=options)
    blocks = dict(params["blocks"])
    for i, row in enumerate(chosen):
        block = dict(blocks[str(i)])
        heads = (np.flatnonzero(~row), np.flatnonzero(row))
        block["mixer"] = _mixer(converted, block["mixer"], heads, rms[i], window)
        blocks[str(i)] = block
    return converted, params | {"blocks": blocks}


def _mixer(config, params, heads, rms, window):
    """The mixer's parameters; heads: those kept and those replaced."""
    (kept, replaced), width = heads, config.head_dim
    scalars = {k: v for k, v in params["qkv"].items() if not np.ndim(v)}
    arrays = {k: np.asarray(v) for k, v in params["qkv"].items() if np.ndim(v)}

    def columns(array, heads):  # [.., 3, D] -> [.., 3, heads, E]
        by_head = array.reshape(*array.shape[:-1], -1, width)
        return by_head[..., heads, :]

    made = {"out": params["out"]} if "out" in params else {}
    if len(kept):
        made["qkv"] = scalars | {
            name: (part := columns(array, kept)).reshape(*part.shape[:-2], -1)
            for name, array in arrays.items()
        }
    if not len(replaced):
        return made
    inputs = {}
    for name, array in arrays.items():
        qkv = np.moveaxis(columns(array, replaced), -3, -2)  # [.., heads, 3, E]
        qkv = qkv.reshape(*qkv.shape[:-2], 3 * width)
        rest = np.zeros((*qkv.shape[:-1], width + 1), array.dtype)  # z and dt
        qkv = np.concatenate([qkv, rest], axis=-1)
        inputs[name] = qkv.reshape(*qkv.shape[:-2], -1)
    count, filter_width = len(replaced), config.mixer_options.width
    kernel = np.zeros((filter_width, 3, count * width), np.float32)
    kernel[-1] = 1
    rate = -math.log1p(-1 / window) / STEP if window > 1 else mamba2.DECAYS[1]

    def full(value, size=count):
        return np.full(size, value, np.float32)

    made["recurrent"] = {
        "inputs": scalars | inputs,
        "kernel": kernel,
        "bias": np.zeros(kernel.shape[1:], np.float32),
        "ssd": {
            "a_log": full(math.log(rate)),
            "dt_bias": full(math.log(math.expm1(STEP))),
            "skip": full(0),
        },
        "gate": full(OPEN_GATE, count * width),
        "scale": np.repeat(rms[replaced].astype(np.float32), width),
    }
    return made


def table(recency: Recency, chosen: np.ndarray, window: int) -> str:
    """Return the heads as a Markdown table, those of the highest ratio first."""
    lines = [
        f"| layer | head | ratio, w = {window} | with the first token | becomes |",
        "|---|---|---|---|---|",
    ]
    for place in np.argsort(-recency.ratio, axis=None, kind="stable"):
        layer, head = np.unravel_index(place, recency.ratio.shape)
        ratios = (x[layer, head] for x in (recency.ratio, recency.with_first))
        kind = "recurrent" if chosen[layer, head] else "softmax"
        cells = (str(layer), str(head), *(f"{x:.3f}" for x in ratios), kind)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
