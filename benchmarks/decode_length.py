"""Decoding speed and state of every mixer against the length of the context.

    python -m benchmarks.decode_length                      # 1k to 1M, a minute or more each
    python -m benchmarks.decode_length --contexts=1024,4096 --mixers=softmax,linear
    python -m benchmarks.decode_length --plot=decode.png a.json b.json   # from files

A small model with dense projections decodes one sequence whose state says that `context`
tokens have been seen: the cache of softmax is of that length, with zeros in it, and the
other states do not depend on the length. So the prompt is not paid for. A figure is the
median of --rounds of --tokens steps each, dispatched one by one; the rounds of all contexts
of a mixer alternate. `--clock=cpu` counts the process's CPU time, for a machine that others
use. Writes decode_length.json, and the plot if asked.

Expected: flat for all but softmax, whose every token reads the whole cache.
"""

import json
import pathlib
import statistics

from benchmarks import arguments, timing

CONTEXTS = (1 << 10, 1 << 14, 1 << 18, 1 << 20)

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("files", nargs="*", type=pathlib.Path)
FLAGS.names("mixers")
FLAGS.numbers("contexts", CONTEXTS, high=1 << 26, help="tokens seen")
FLAGS.number("tokens", 32)
FLAGS.number("rounds", 7)
FLAGS.clock()
FLAGS.output("output", "decode_length.json")
FLAGS.output("plot", help="a .png to draw")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

import jax
import jax.numpy as jnp

from memoryformer import model, presets, sharding
from memoryformer.model import mixers, recurrence
from memoryformer.model.mixers import softmax

NAMES = tuple(name for name in presets.mixer_settings() if "matched" not in name)
CHUNK = 32  # tokens of a recurrence's chunk: every round opens and closes one
SHAPE = {"vocab_size": 256, "embed_dim": 128, "num_layers": 2, "num_heads": 2}


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure; print and write one row for each mixer and context; return them."""
    args = FLAGS.parse_args(argv)
    if args.files:
        if not args.plot:
            FLAGS.error("--plot=FILE.png is missing: files are only drawn")
        rows = [row for path in args.files for row in arguments.read_json(path)]
        plot(rows, args.plot)
        return rows
    names = FLAGS.chosen("mixers", args.mixers, NAMES)
    contexts, rows, clock = args.contexts, [], timing.CLOCKS[args.clock]
    print(f"{'mixer':<16}{'context':>10}{'tokens/s':>12}{'state bytes':>16}")
    for name in names:
        cases = {context: _case(name, context, args.tokens) for context in contexts}
        works = {
            context: lambda _, decode=decode: jax.block_until_ready(decode(args.tokens))
            for context, (decode, _) in cases.items()
        }
        seconds = timing.in_turns(works, args.rounds, clock, warm_up=0)
        for context, (_, num_bytes) in cases.items():
            rates = [args.tokens / taken for taken in seconds[context]]
            rate = statistics.median(rates)
            rows.append(
                {
                    "mixer": name,
                    "context": context,
                    "tokens_per_second": rate,
                    "range": [min(rates), max(rates)],
                    "clock": args.clock,
                    "state_bytes": num_bytes,
                    "platform": jax.devices()[0].device_kind,
                }
            )
            print(f"{name:<16}{context:>10}{rate:>12.0f}{num_bytes:>16,}", flush=True)
    args.output.write_text(json.dumps(rows, indent=2) + "\n")
    if args.plot:
        plot(rows, args.plot)
    return rows


def _case(name, context, tokens):
    """Return (function that decodes n tokens at the context, bytes of its state)."""
    max_len = context + tokens
    settings = presets.mixer_settings()[name]
    if "recurrence" in settings:  # the row is cut into chunks of one size
        max_len += -max_len % CHUNK
        options = settings["recurrence_options"] | {"chunk_size": CHUNK}
        settings = settings | {"recurrence_options": options}
    config = model.ModelConfig(
        **SHAPE, seq_len=max_len, projection="dense", ffn_activation="gelu", **settings
    )
    params = model.init(config)
    start = _seen(model.merge(config, params).init_state(1, max_len), context)

    def step(params, state, token, position):
        seq = mixers.SeqInfo(position, jnp.ones_like(position))
        logits, state = model.merge(config, params)(token, seq, state)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), state, position + 1

    # The state is updated in place, as in generation.
    step = jax.jit(step, donate_argnums=1)

    def decode(n):
        nonlocal start
        state, token = start, jnp.zeros((1, 1), jnp.int32)
        position = jnp.full((1, 1), context, jnp.int32)
        for _ in range(n):
            token, state, position = step(params, state, token, position)
        start = _seen(state, context)  # the next round writes over these tokens
        return token

    jax.block_until_ready(decode(2))  # compile
    return decode, sharding.num_bytes(start)


def _seen(state, context):
    """A state after `context` tokens of one document."""
    if isinstance(state, recurrence.RecurrentState):
        return state

    def filled(cache):
        if not isinstance(cache, softmax.KVCache):
            return cache
        return cache._replace(
            segment_ids=jnp.ones_like(cache.segment_ids),
            length=jnp.full_like(cache.length, context),
        )

    def is_cache(node):
        return isinstance(node, softmax.KVCache)

    # A cache may lie inside of a mixer's state, as the one of recurformer does.
    return jax.tree.map(filled, state, is_leaf=is_cache)


def plot(rows: list[dict], path: str) -> None:
    """Draw speed and state against context, one line a mixer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(
        axes,
        ("tokens_per_second", "state_bytes"),
        ("decoded tokens per second", "bytes of state"),
        strict=True,
    ):
        for i, name in enumerate(dict.fromkeys(row["mixer"] for row in rows)):
            mine = [row for row in rows if row["mixer"] == name]
            axis.loglog(
                [row["context"] for row in mine],
                [row[key] for row in mine],
                marker="o" if i < 10 else "s",  # there are ten colours
                label=name,
            )
        axis.set_xlabel("context, tokens")
        axis.set_ylabel(label)
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    arguments.run(main)
