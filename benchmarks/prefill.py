"""Reading a prompt on CPU: microseconds of a token and layer, for some layers of a model.

    python -m benchmarks.prefill --layers=6 --clock=cpu --rounds=5
    python -m benchmarks.prefill --lengths=128,512,2048 --tables=int8,bfloat16

A figure is one prompt read by `generation.sampler.Generator`, state and head included, over its
tokens and layers; weights are random. With a few layers the fixed costs weigh more than in the
whole model, whose layers are read from memory all the same. Beside other engines:
`python -m benchmarks.decode --prefill=512`. Results: docs/performance.md.
"""

import dataclasses
import json
import os

from benchmarks import arguments, timing

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("--size", choices=("small", "base", "toy"), default="base")
FLAGS.number("layers", 6, high=1000)
FLAGS.numbers("lengths", (512,), high=2048, help="tokens of a prompt")
FLAGS.names("tables", default="int8", help="kinds of rows")
FLAGS.number("rounds", 5, low=2)
FLAGS.cores()
FLAGS.clock()
FLAGS.output("output", "prefill.json")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

import numpy as np

from benchmarks.decode import ours, peers
from memoryformer.generation import sampler
from memoryformer.model import narrow
from memoryformer.ops.lookup import narrow as narrow_rows


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, write and return."""
    args = FLAGS.parse_args(argv)
    kinds = FLAGS.chosen("tables", args.tables, narrow_rows.TABLE_KINDS)
    cores = timing.use_cores(args.cores)
    works = {
        (kind, length): reader(args.size, args.layers, kind, length)
        for kind in kinds
        for length in args.lengths
    }
    seconds = timing.in_turns(works, args.rounds, timing.CLOCKS[args.clock])
    rows = [
        {
            "tables": kind,
            "length": length,
            "micros": timing.quartiles(1e6 * s / length / args.layers for s in series),
        }
        for (kind, length), series in seconds.items()
    ]
    facts = {"processor": timing.processor(), "cores": cores, "clock": args.clock}
    facts |= {"size": args.size, "layers": args.layers, "load": os.getloadavg()[0]}
    print(json.dumps(facts))
    for row in rows:
        low, median, high = row["micros"]
        print(
            f"  {row['tables']:9} {row['length']:5} tokens {median:8.1f} us a token and "
            f"layer [{low:.1f}, {high:.1f}]"
        )
    result = facts | {"works": rows}
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def reader(size: str, num_layers: int, kind: str, length: int):
    """Return a function, for `timing.turns`, that reads a prompt of so many tokens."""
    config = ours.memoryformer_config(size)
    config = dataclasses.replace(config, num_layers=num_layers)
    kinds = narrow.WeightKinds(tables=kind, head="int8")
    params = ours.random_params(config, kinds)
    generator = sampler.Generator(config, params, kinds)
    prompt = peers.long_prompt(2048, config.vocab_size).tolist()[:length]
    sampling = sampler.SamplingConfig(max_tokens=1, temperature=0.0)

    def read(_) -> np.ndarray:
        return np.asarray(generator.begin([prompt], sampling).logits)

    return read


if __name__ == "__main__":
    arguments.run(main)
