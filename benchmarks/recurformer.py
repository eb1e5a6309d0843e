"""Which heads can be recurrent: MQAR mixed with bytes, at half the cache.

    python -m benchmarks.recurformer                        # minutes on two cores; resumable
    python -m benchmarks.recurformer --seeds=1 --steps=200 --more=50

A small softmax model learns rows of two kinds, half of each batch: multi-query associative recall
(`memoryformer.tasks.mqar`), and bytes of the standard library's sources. The recency ratio of its heads
is measured on both (`memoryformer.convert.recency`), and half of the heads are replaced: those of
the highest ratio, of the lowest, random ones; and, as a control, those of the highest again by
softmax over a window. Each goes on for --more steps, as does the softmax model itself.

Writes recurformer.json into --folder and prints the table of docs/recurformer.md: accuracy at
MQAR, bits per byte, and bytes of cache per token. What is finished is only read.

Expected, if heads of high recency need no cache: the first keeps what softmax has, and the heads of
the lowest ratio lose it.
"""

import dataclasses
import json
import pathlib
import pickle
import statistics
from typing import ClassVar

from benchmarks import arguments

FLAGS = arguments.Parser(__doc__)
FLAGS.number("seeds", 3)
FLAGS.number("steps", 800, help="of softmax")
FLAGS.number("more", 200, help="of every variant")
FLAGS.add_argument("--folder", default="runs/recurformer")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer import model, presets
from memoryformer import sharding as sharding_lib
from memoryformer.config import field
from memoryformer.convert import recency
from memoryformer.files import atomic
from memoryformer.model import mixers
from memoryformer.model.mixers import softmax
from memoryformer.tasks import mqar
from memoryformer.training import experiment, programs
from memoryformer.training import step as step_lib

VOCAB, LENGTH, ROWS = 256, 16, 64  # half of the rows are MQAR's
PAIRS, SYMBOLS = (
    4,
    24,
)  # keys and values are among the first tokens: softmax learns them soon
WINDOW = 4  # of the ratio, and of the control


class Windowed(softmax.Softmax):
    """The control: softmax, of which some heads see the last tokens alone."""

    @dataclasses.dataclass(frozen=True)
    class Options(softmax.Softmax.Options):
        """And which heads."""

        near: tuple = field("numbers", (), doc="1 for a windowed head, layer by layer.")

    EXAMPLES: ClassVar = {}

    def __init__(self, config, project, *, rngs, layer):
        super().__init__(config, project, rngs=rngs, layer=layer)
        heads = config.num_heads
        self.near = config.mixer_options.near[layer * heads : (layer + 1) * heads]

    def read(self, q, k, v, seq, state):
        """Rows of one document each, without a state."""
        q, k = self.rotary(q, k, seq)
        place = jnp.arange(q.shape[1])
        distance = place[:, None] - place[None]  # [L, M]
        near = jnp.array(self.near, bool)[:, None, None]
        seen = (distance >= 0)[None] & (~near | (distance < WINDOW)[None])  # [H, L, M]
        logits = jnp.einsum("bthe,bshe->bhts", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen[None], logits, -1e30), axis=-1)
        return jnp.einsum("bhts,bshe->bthe", weights, v), None


def main(argv: list[str] | None = None) -> list[dict]:
    """Train and measure what is missing; print and write the table; return its rows."""
    args = FLAGS.parse_args(argv)
    folder = pathlib.Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    mixers.MIXERS["windowed"] = Windowed
    data, rows = text(), []
    for seed in range(args.seeds):
        rows += _of_seed(args, folder, data, seed)
    (folder / "recurformer.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    return rows


def _of_seed(args, folder, data, seed):
    """Rows of one seed; each is a file, and what is there is read."""
    run = experiment.resolve(config(args.steps, seed))
    trained = folder / f"softmax-{args.steps}-{seed}.pkl"
    if not trained.exists():
        print(f"--- softmax, seed {seed}", flush=True)
        params = train(run, None, data, 0)
        atomic.write_bytes(trained, pickle.dumps(params))
    params = pickle.loads(trained.read_bytes())
    parts = (batch(data, seed, step, "validation") for step in range(8))
    measured = recency.measure(run.model, params, parts, WINDOW)
    rows = []
    for name, chosen in _choices(measured.ratio, seed).items():
        file = folder / f"{name}-{args.steps}-{args.more}-{seed}.json"
        if not file.exists():
            print(f"--- {name}, seed {seed}", flush=True)
            found = _variant(args, run, params, data, seed, name, chosen, measured.rms)
            found |= {"variant": name, "seed": seed, "ratio": measured.ratio.tolist()}
            atomic.write_json(file, found)
        rows.append(json.loads(file.read_text()))
        print(rows[-1], flush=True)
    return rows


def _choices(ratio, seed):
    """Which heads each variant replaces: bool [layers, H]."""
    highest = recency.choose(ratio, 0.5, None)
    drawn = np.random.default_rng(seed).permutation(highest.reshape(-1))
    return {
        "softmax": np.zeros_like(highest),
        "highest": highest,
        "random": drawn.reshape(highest.shape),
        "lowest": recency.choose(-ratio, 0.5, None),
        "window": highest,
    }


def _variant(args, run, params, data, seed, name, chosen, rms):
    """Replace heads, train on, and score before and after."""
    plain = config(args.more, seed)
    if name == "window":
        plain.model.mixer = "windowed"
        with plain.unlocked():
            plain.model.mixer_options = {"near": tuple(map(int, chosen.reshape(-1)))}
        model_config = experiment.resolve(plain).model
    else:
        model_config, params = recency.convert(run.model, params, chosen, rms, WINDOW)
    go_on = dataclasses.replace(
        experiment.resolve(config(args.more, seed)), model=model_config
    )
    before = score(model_config, params, data)
    after = score(model_config, train(go_on, params, data, args.steps), data)
    kept = chosen.size - (0 if name == "softmax" else int(chosen.sum()))
    return {
        "before": before,
        "after": after,
        "cache_bytes_per_token": kept * 2 * model_config.head_dim * 4,
        "recurrent": chosen.tolist(),
    }


def config(steps, seed, **fields):
    """The experiment: a dense model of two blocks of four heads."""
    config = experiment.default_config()
    presets.set_recall_trunk(config.model)
    values = {
        "model.vocab_size": VOCAB,
        "model.seq_len": LENGTH,
        "train.num_steps": steps,
        "train.batch_size": ROWS,
        "train.seed": seed,
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": min(50, steps // 4),
        "data.source": "stdlib",
        "mesh": "single",
    }
    config.update_from_flattened_dict(values | fields)
    return config


def text() -> np.ndarray:
    """Bytes of the standard library's modules, the last twentieth held out."""
    files = sorted(pathlib.Path(json.__file__).parents[1].glob("*.py"))
    return np.frombuffer(b"\n\n".join(f.read_bytes() for f in files), np.uint8)


def batch(data, seed, step, split="train"):
    """Half MQAR, half bytes; MQAR's rows first."""
    tokens, targets, weights = mqar.batch(
        seed, step, ROWS // 2, LENGTH, PAIRS, SYMBOLS, split
    )
    rng = np.random.default_rng([seed, step, split == "train"])
    held_out = len(data) // 20
    low, high = (0, len(data) - held_out)
    if split != "train":
        low, high = high, len(data)
    first = rng.integers(low, high - LENGTH - 1, ROWS // 2)
    windows = data[first[:, None] + np.arange(LENGTH + 1)].astype(np.int32)
    inputs = np.concatenate([tokens, windows[:, :-1]])
    weights = weights * LENGTH / PAIRS  # both kinds of rows weigh the same
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), inputs.shape)
    return {
        "inputs": inputs,
        "targets": np.concatenate([targets, windows[:, 1:]]),
        "weights": np.concatenate([weights, np.ones_like(weights)]).astype(np.float32),
        "segment_ids": np.ones_like(inputs),
        "positions": np.ascontiguousarray(positions),
    }


def train(run, params, data, first):
    """Go on from these parameters, or begin, with batches from `first`; return parameters."""
    sharding = sharding_lib.make(run.mesh)
    made = programs.make(run, sharding)
    if params is None:
        state = made.draw(run.train.seed)
    else:
        state = step_lib.new_state(run, jax.tree.map(jnp.asarray, params))
    hyper = step_lib.hyperparams(run)
    for step in range(run.train.num_steps):
        numbers = sharding.put_batch(batch(data, run.train.seed, first + step))
        state, values = made.train_step(state, numbers, hyper)
        if step % 100 == 0:
            loss = float(values["nats"] / values["weight"])
            print(f"  step {step}: {loss:.3f} nats", flush=True)
    return jax.device_get(state.params)


def score(model_config, params, data, batches=16):
    """Accuracy at MQAR and bits per byte, on rows that training does not draw."""
    forward = jax.jit(
        lambda params, tokens: model.forward(model_config, params, tokens)
    )
    right = asked = nats = count = 0.0
    for step in range(batches):
        part = batch(data, 0, step, "validation")
        logits = np.asarray(forward(params, part["inputs"]), np.float64)
        half, weights = ROWS // 2, part["weights"]
        hit = logits.argmax(-1) == part["targets"]
        right += (hit * weights)[:half].sum()
        asked += weights[:half].sum()
        highest = logits.max(-1, keepdims=True)
        log_p = (
            logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))
        )
        chosen = np.take_along_axis(log_p, part["targets"][..., None], -1)[..., 0]
        nats -= chosen[half:].sum()
        count += chosen[half:].size
    accuracy, bits = float(right / asked), float(nats / count / np.log(2))
    return {"accuracy": accuracy, "bits_per_byte": bits}


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table: means over seeds, and their range."""
    lines = [
        "| heads replaced | MQAR at once | MQAR after | bits per byte after | cache, bytes a token |",
        "|---|---|---|---|---|",
    ]

    def cell(values, digits):
        text = f"{statistics.mean(values):.{digits}f}"
        low, high = min(values), max(values)
        return text if low == high else f"{text} ({low:.{digits}f}-{high:.{digits}f})"

    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        cells = [
            cell([row["before"]["accuracy"] for row in own], 2),
            cell([row["after"]["accuracy"] for row in own], 2),
            cell([row["after"]["bits_per_byte"] for row in own], 3),
            str(own[0]["cache_bytes_per_token"]),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments.run(main)
