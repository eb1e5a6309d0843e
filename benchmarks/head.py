"""The head at base shape: today's int8, screened, and integer products, 1 to 16 vectors.

    python -m benchmarks.head --cores=1 --clock=cpu              # times, in turns
    python -m benchmarks.head --workdir=DIR                      # rows left on a trained model
    python -m benchmarks.head --outputs=4096 --width=128 --rounds=3

A time is one greedy choice for --streams vectors: product and argmax, or the screened search.
There is no trained model of base's size here, so heads and states are drawn. In `steep` they fall
off along the same directions, and the row of the answer stands 9 nats above the mean, as on
the quickstart: some ten rows are then left, as on trained models. In `flat` nothing falls off,
and screening gives up. Bytes are counted by the native code.

With --workdir, validation text of that run instead: how many rows are read whole for a token,
bytes, and what rounding activations costs in nats. Every choice is compared with the int8 head's
argmax before anything is timed. Writes head.json. Results: docs/performance.md.
"""

import functools
import json
import os
from typing import Any

from benchmarks import arguments, timing

KINDS = ("int8", "int8-screened", "w8a8", "int4", "w4a8")

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("--workdir", default="", help="a run with an untied head")
FLAGS.number("outputs", 50304, low=64)
FLAGS.number("width", 1024)
FLAGS.numbers("streams", (1, 16), high=64, help="vectors of a choice")
FLAGS.names("kinds", KINDS)
FLAGS.number("rounds", 9, low=2)
FLAGS.number("tokens", 1600, help="of --workdir")
FLAGS.cores()
FLAGS.clock()
FLAGS.output("output", "head.json")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer import model
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError
from memoryformer.model import mixers
from memoryformer.ops.lookup import integer, narrow, screened
from memoryformer.training import experiment


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write and return."""
    args = FLAGS.parse_args(argv)
    kinds = FLAGS.chosen("kinds", args.kinds, KINDS)
    if "int8" not in kinds and not args.workdir:
        FLAGS.error(
            f"--kinds={args.kinds}: is without int8, with which all are compared"
        )
    cores = timing.use_cores(args.cores)
    facts = {"cores": cores, "clock": args.clock, "load": os.getloadavg()[0]}
    result = facts | (trained(args, kinds) if args.workdir else times(args, kinds))
    print(json.dumps(facts))
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def pack(matrix: np.ndarray, kind: str) -> Any:
    """Store a head [D, V] as `kind`, in huge pages."""
    if kind == "int8-screened":
        stored: Any = screened.pack(matrix)
    elif kind in integer.KINDS:
        stored = integer.pack(matrix, kind)
    else:
        stored = narrow.pack_matrix(matrix, kind)
    return jax.tree.map(narrow.in_huge_pages, stored)


@jax.jit
def choose(x, stored):
    """The likeliest outputs: [N, D] -> [N]."""
    if isinstance(stored, screened.ScreenedMatrix):
        return screened.top(x, stored)[1][:, 0]
    return jnp.argmax(logits(x, stored), axis=-1)


def logits(x, stored):
    """[N, D] -> float32 [N, V]."""
    whole = integer if isinstance(stored, integer.IntegerMatrix) else narrow
    return whole.product(x, stored)


# --- Times. --------------------------------------------------------------------------


def drawn(name: str, outputs: int, width: int, count: int) -> tuple[Any, Any]:
    """A head [D, V] and states [count, D]: `steep` or `flat` (see above)."""
    random = np.random.default_rng(0)
    # Standard deviations along common directions, of rows and of states.
    fall = 0.0 if name == "flat" else 0.9
    of_rows = of_states = (1 + 127 * (np.arange(width) + 0.5) / width) ** -fall
    basis = np.linalg.qr(random.standard_normal((width, width)))[0].astype(np.float32)
    of_rows = (of_rows / np.linalg.norm(of_rows)).astype(np.float32)
    rows = random.standard_normal((outputs, width), np.float32) * of_rows
    z = random.standard_normal((count, width)) * of_states
    z *= np.sqrt(width) / np.linalg.norm(z, axis=1, keepdims=True)
    rows /= (rows[:1000] @ z.T).std() / 2.2  # logits' standard deviation, in nats
    if name == "steep":
        best = random.choice(outputs, count, replace=False)
        along = z * of_rows**2
        along *= (9.2 / np.sum(along * z, axis=1))[:, None]
        rows[best] = along + 0.3 * rows[best]
    return np.ascontiguousarray((rows @ basis).T), (z @ basis).astype(np.float32)


def times(args, kinds) -> dict[str, Any]:
    """Milliseconds of one choice, in turns, and their ratio to today's int8 head."""
    clock = timing.CLOCKS[args.clock]
    result: dict[str, Any] = {"outputs": args.outputs, "width": args.width}
    for name in ("steep", "flat"):
        matrix, states = drawn(name, args.outputs, args.width, 64)
        heads = {k: pack(matrix, k) for k in kinds if name == "steep" or "int8" in k}
        for count in args.streams:
            rows = result[f"{name}, {count}"] = _in_turns(
                heads, states, count, args.rounds, clock
            )
            for kind, row in rows.items():
                print(f"{name:6}{count:4} {kind:14}" + _shown(row), flush=True)
    return result


def _in_turns(heads, states, count, rounds, clock):
    parts = [states[i : i + count] for i in range(0, len(states) - count + 1, count)]
    parts = parts[: max(1, 16 // count)]
    expected = [np.asarray(choose(x, heads["int8"])) for x in parts]
    reads = {}
    for kind, head in heads.items():
        before = screened.counts()
        chosen = [np.asarray(choose(x, head)) for x in parts]
        after = screened.counts()
        if kind == "int8-screened":
            np.testing.assert_array_equal(chosen, expected)
            reads = {k: getattr(after, k) - getattr(before, k) for k in vars(after)}

    def chooses(head):
        return lambda _: [choose(x, head).block_until_ready() for x in parts]

    works = {kind: chooses(head) for kind, head in heads.items()}
    # What is chosen above has compiled.
    seconds = timing.in_turns(works, rounds, clock, warm_up=0)
    rows = {}
    for kind, series in seconds.items():
        leaves = jax.tree.leaves(heads[kind])
        num_bytes = sum(leaf.nbytes for leaf in leaves)
        rows[kind] = {
            "ms": timing.quartiles(1e3 * s / len(parts) for s in series),
            "times_as_fast_as_int8": timing.ratio(seconds["int8"], series),
            "megabytes": num_bytes / 1e6,
        }
        if kind == "int8-screened":
            rows[kind]["megabytes"] = reads["bytes"] / len(parts) / 1e6
            rows[kind] |= {"rows": reads["rows"] / reads["vectors"]}
            rows[kind] |= {"whole": reads["whole"] / reads["vectors"]}
    return rows


def _shown(row):
    low, middle, high = row["ms"]
    low_ratio, ratio, high_ratio = row["times_as_fast_as_int8"]
    text = f"{middle:8.2f} ms [{low:.2f}, {high:.2f}] {row['megabytes']:7.1f} MB "
    text += f"{ratio:6.2f} [{low_ratio:.2f}, {high_ratio:.2f}]"
    if "rows" in row:
        text += f" {row['rows']:8.0f} rows, all for {row['whole']:.0%}"
    return text


# --- A trained model. ----------------------------------------------------------------


def trained(args, kinds) -> dict[str, Any]:
    """Rows read for each token of a run's validation text, and nats of each kind."""
    run, params, facts = experiment.load(args.workdir)
    if run.model.tie_embeddings:
        raise ConfigError(f"--workdir={args.workdir}: its head is the embedding's.")
    x, targets = _read_text(args, run, params, facts)
    matrix = np.asarray(params["head"]["kernel"], np.float32)
    result: dict[str, Any] = {"outputs": matrix.shape[1], "width": matrix.shape[0]}
    result["tokens"] = len(x)
    entropy = functools.partial(_nats, targets=targets)
    float32 = result["nats float32"] = entropy(x @ matrix)
    for kind in kinds:
        if kind != "int8-screened":
            stored = pack(matrix, kind)
            parts = [logits(x[i : i + 16], stored) for i in range(0, len(x), 16)]
            result[f"nats {kind}"] = entropy(np.concatenate(parts)) - float32
    head = pack(matrix, "int8-screened")
    rows, sizes, start = [], [], screened.counts()
    before = start
    for vector in x:
        chosen = choose(vector[None], head)
        assert chosen == choose(vector[None], head.exact)
        now = screened.counts()
        rows.append(now.rows - before.rows)
        sizes.append(now.bytes - before.bytes)
        before = now
    levels = (50, 75, 90, 99, 100)
    result["rows"] = dict(
        zip(levels, np.percentile(rows, levels).tolist(), strict=True)
    )
    result["whole"] = (before.whole - start.whole) / len(x)
    result["bytes"] = np.mean(sizes).item()
    result["bytes of int8"] = matrix.shape[1] * (matrix.shape[0] + 4)
    for name, value in result.items():
        print(f"{name:16} {value}")
    return result


def _read_text(args, run, params, facts):
    dataset = run_tokenizer.dataset(args.workdir, run.data, facts, run.model.vocab_size)
    rows = 1 + args.tokens // run.model.seq_len
    batch = next(iter(dataset.validation.eval_batches(run.model.seq_len, rows)))
    seq = mixers.SeqInfo(*(jnp.asarray(batch[k]) for k in ("positions", "segment_ids")))
    merged = model.merge(run.model, params)
    x = merged.features(jnp.asarray(batch["inputs"]), seq)[0]
    kept = np.asarray(batch["weights"]).reshape(-1) > 0
    x = np.asarray(x, np.float32).reshape(len(kept), -1)[kept][: args.tokens]
    return x, np.asarray(batch["targets"]).reshape(-1)[kept][: args.tokens]


def _nats(values, targets):
    values = np.asarray(values, np.float64)
    largest = values.max(-1, keepdims=True)
    total = np.log(np.exp(values - largest).sum(-1)) + largest[:, 0]
    return float(np.mean(total - values[np.arange(len(targets)), targets]))


if __name__ == "__main__":
    arguments.run(main)
