"""One stream with drafts from its own text beside plain decoding, in turns, on the same tokens.

    python -m benchmarks.speculation --workdir=runs/mine --tables=int8 --head=int8
    python -m benchmarks.speculation --size=base     # random weights: what a pass costs

Prompts are pieces of the run's validation text, continued greedily. A round continues each prompt
by both, in another order each round, and its figure is the ratio of their times; every text is
compared. Printed: tokens per second of both, the ratio's quartiles, the tokens of a pass over a
draft and what a pass costs, in tokens read one at a time, and the share of tokens that passes read.
`--always` never goes back to plain decoding.
"""

import argparse
import json
import os
import pathlib
import random

import numpy as np

from benchmarks import timing
from memoryformer.generation import sampler, speculation
from memoryformer.generation import text as text_lib
from memoryformer.model import narrow


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", help="a trained run")
    parser.add_argument("--size", choices=("toy", "small", "base"), default="base")
    parser.add_argument("--tables", default="int8")
    parser.add_argument("--head", default="int8")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--prompt_tokens", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--drafts", type=int, default=speculation.MAX_DRAFT)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--always", action="store_true")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall")
    parser.add_argument("--output", type=pathlib.Path, default="speculation.json")
    args = parser.parse_args(argv)
    kinds = narrow.WeightKinds(tables=args.tables, head=args.head)
    if args.workdir:
        generator, prompts = trained(args, kinds)
    else:
        generator, prompts = untrained(args, kinds)
    clock = timing.CLOCKS[args.clock]
    speculator = speculation.Speculator(
        generator, args.drafts, always=args.always, clock=clock
    )
    peers = {"plain": generator, "speculation": speculator}
    seconds = measure(peers, prompts, args, clock)
    count = args.tokens * len(prompts)
    report = speculator.report
    result = {
        "processor": timing.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "clock": args.clock,
        "tokens_per_second": {
            name: timing.quartiles(sorted(count / s for s in series))
            for name, series in seconds.items()
        },
        "faster": timing.quartiles(
            p / s for p, s in zip(*seconds.values(), strict=True)
        ),
        "tokens_a_pass": 1 + report.accepted / max(report.passes, 1),
        "cost_of_a_pass": report.cost,
        "share_of_tokens": (report.passes + report.accepted) / report.tokens,
    }
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def trained(args, kinds):
    """(generator, prompts) of a run and its validation text."""
    from memoryformer import data

    generator, _, run = text_lib.open_run(args.workdir, None, kinds)
    tokens = data.load(run.data, run.model.vocab_size).validation.tokens
    starts = np.linspace(0, len(tokens) - args.prompt_tokens - 1, args.prompts)
    rows = [np.asarray(tokens[int(s) :][: args.prompt_tokens]) for s in starts]
    return generator, [row.astype(int).tolist() for row in rows]


def untrained(args, kinds):
    """(generator, prompts) of random weights and tokens."""
    from benchmarks.decode import ours

    config = ours.memoryformer_config(args.size)
    generator = sampler.Generator(config, ours.random_params(config, kinds), kinds)
    rng = np.random.default_rng(0)
    shape = (args.prompts, args.prompt_tokens)
    return generator, rng.integers(0, config.vocab_size, shape).tolist()


def measure(peers, prompts, args, clock) -> dict[str, list[float]]:
    """Seconds of each in each round, after one that is not counted; texts must be equal."""
    seconds: dict = {name: [] for name in peers}
    sampling = sampler.SamplingConfig(args.tokens, args.temperature)
    shuffled, texts = random.Random(0), {}
    for i in range(args.rounds + 1):
        spent = dict.fromkeys(peers, 0.0)
        for number, prompt in enumerate(prompts):
            for name in shuffled.sample(list(peers), len(peers)):
                start = clock()
                text = list(peers[name].stream_batch([prompt], sampling))
                spent[name] += clock() - start
                if texts.setdefault(number, text) != text:
                    raise AssertionError(f"prompt {number}: {name} has other tokens")
        for name in peers if i else ():
            seconds[name].append(spent[name])
    return seconds


if __name__ == "__main__":
    main()
