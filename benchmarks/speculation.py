"""One stream with drafts from its own text beside plain decoding, in turns, on the same tokens.

    python -m benchmarks.speculation --workdir=runs/mine --head=int8,int8-screened
    python -m benchmarks.speculation --size=base     # random weights: what a step costs
    python -m benchmarks.speculation --size=toy --temperature=1   # no draft is right

Prompts are pieces of the run's validation text, continued greedily. A round continues each prompt
by all, in another order each round, and its figure is the ratio of their times to plain decoding
with the first head; every text is compared. Printed of each: tokens per second and the ratio, as
quartiles; with drafts, the tokens of a pass, those of a step (a token and its draft, if there is
one) and what a step costs, in tokens read one at a time, and the share of tokens that passes
read. `--always` never goes back to plain decoding.
"""

import itertools
import json
import os

from benchmarks import arguments, timing

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("--workdir", help="a trained run")
FLAGS.add_argument("--size", choices=("toy", "small", "base"), default="base")
FLAGS.add_argument("--tables", default="int8")
FLAGS.names("head", default="int8", help="kinds of the head")
FLAGS.number("prompts", 6)
FLAGS.number("prompt_tokens", 96)
FLAGS.number("tokens", 128)
FLAGS.number("drafts", 0, low=0, help="of a pass; 0: as many as there may be")
FLAGS.real("temperature", 0.0)
FLAGS.number("rounds", 5, low=2)
FLAGS.add_argument("--always", action="store_true")
FLAGS.clock()
FLAGS.output("output", "speculation.json")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

import numpy as np

from memoryformer.generation import sampler, speculation
from memoryformer.generation import text as text_lib
from memoryformer.model import narrow


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and write."""
    args = FLAGS.parse_args(argv)
    clock = timing.CLOCKS[args.clock]
    peers = make(args, clock)
    seconds = measure(peers, args, clock)
    count = args.tokens * args.prompts
    first = next(iter(seconds.values()))
    result = {
        "processor": timing.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "clock": args.clock,
        "peers": {
            name: {
                "tokens_per_second": timing.quartiles(
                    sorted(count / s for s in series)
                ),
                "faster": timing.ratio(first, series),
            }
            | of_drafts(peers[name][0])
            for name, series in seconds.items()
        },
    }
    print(json.dumps(result, indent=2))
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def make(args, clock) -> dict:
    """(who continues, prompts) by name: of each head plain decoding, and with drafts."""
    peers = {}
    drafts = args.drafts or speculation.MAX_DRAFT
    for head in FLAGS.chosen("head", args.head, narrow.HEAD_KINDS):
        kinds = narrow.WeightKinds(tables=args.tables, head=head)
        generator, prompts = (trained if args.workdir else untrained)(args, kinds)
        peers[f"plain {head}"] = generator, prompts
        peers[f"drafts {head}"] = (
            speculation.Speculator(generator, drafts, always=args.always, clock=clock),
            prompts,
        )
    return peers


def of_drafts(streams) -> dict[str, float]:
    """What a `Speculator` has read how; {} of a `Generator`."""
    if not isinstance(streams, speculation.Speculator):
        return {}
    report = streams.report
    return {
        "tokens_a_pass": 1 + report.accepted / max(report.passes, 1),
        "tokens_a_step": report.reads,
        "cost_of_a_step": report.cost,
        "share_of_tokens": (report.passes + report.accepted) / report.tokens,
    }


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


def measure(peers, args, clock) -> dict[str, list[float]]:
    """Seconds of each for all prompts, in each round; texts must be equal."""
    sampling = sampler.SamplingConfig(args.tokens, args.temperature)
    texts: dict[int, list] = {}

    def continues(name, number):
        streams, prompts = peers[name]

        def run(_):
            text = list(streams.stream_batch([prompts[number]], sampling))
            if texts.setdefault(number, text) != text:
                raise AssertionError(f"prompt {number}: {name} has other tokens")

        return run

    turns = [
        timing.turns({name: continues(name, number) for name in peers}, clock)
        for number in range(args.prompts)
    ]
    prompts = next(itertools.islice(zip(*turns, strict=True), args.rounds, None))
    return {
        name: [sum(times) for times in zip(*(p[name] for p in prompts), strict=True)]
        for name in peers
    }


if __name__ == "__main__":
    arguments.run(main)
