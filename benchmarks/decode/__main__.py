"""Whole-model decoding on CPU: MemoryFormer beside llama.cpp, CTranslate2 and transformers.

    python -m benchmarks.decode --size=base                    # every peer, one stream
    python -m benchmarks.decode --size=base --batch_size=1,4,16 --prefill=512
    python -m benchmarks.decode --size=small --batch_size=16
    python -m benchmarks.decode --cores=1 --clock=cpu          # on a busy machine
    python -m benchmarks.decode --size=base --peers=memoryformer-bfloat16,transformers-float32
    python -m benchmarks.decode --plot=docs/images/decode.png a.json b.json   # from files

`small` and `base` are MemoryFormer's shapes beside Pythia-160M's and -410M's, with random
weights; every dense peer holds the same ones. A figure is --tokens greedy tokens after a prompt
of one, or a prompt of --prefill tokens, choice and Python included. All peers take turns in one
process, in another order each round. Of ours only weights are rounded; llama.cpp, CTranslate2 and
`transformers-int8` (torch's dynamic quantisation) round activations too. Before anything is timed,
the logits of every engine's float32 form are held against our dense twin's (of llama.cpp and
CTranslate2 two blocks), and the tokens of every one of our models against its full forward pass. `--files=DIR` keeps what the engines read.

Peers of packages that are not installed are left out, with a line: `pip install -e
'.[decode,peers]'` has them all. pip compiles llama.cpp, a quarter of an hour on one core.
Memory: 7 GiB for base with int8 tables, 14 with bfloat16, and 5 for its peers. Run with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 and THP_MEM_ALLOC_ENABLE=1, so that torch's weights
lie in huge pages too. Limits and predictions: docs/performance.md.
"""

import contextlib
import itertools
import json
import os
import pathlib
import tempfile

from benchmarks import arguments, timing
from benchmarks.decode import peers as peers_lib
from benchmarks.decode import plots

LEFT_OUT = ("memoryformer-bfloat16",)  # of the default: it takes 14 GiB
DEFAULT_PEERS = ",".join(p for p in peers_lib.NAMES if p not in LEFT_OUT)

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("results", nargs="*", type=pathlib.Path)
FLAGS.add_argument("--size", choices=("small", "base", "toy"), default="base")
FLAGS.names("peers", peers_lib.NAMES, DEFAULT_PEERS)
FLAGS.numbers("batch_size", (1,), help="streams")
FLAGS.number("prefill", 0, low=0, high=2048, help="tokens; 0: none")
FLAGS.number("tokens", 64)
FLAGS.number("rounds", 7, low=2)
FLAGS.cores()
FLAGS.clock()
FLAGS.add_argument("--files", help="folder that keeps the engines' files")
FLAGS.output("output", "decode.json")
FLAGS.output("plot")

Work = tuple[str, int]  # ('decode', streams) or ('prefill', tokens)


def main(argv: list[str] | None = None) -> dict | None:
    """Measure the peers asked for, or plot files of earlier measurements."""
    args = FLAGS.parse_args(argv)
    names = FLAGS.chosen("peers", args.peers, peers_lib.NAMES)
    if args.results:
        if not args.plot:
            FLAGS.error("--plot=FILE is missing: files of results are only drawn")
        plots.plot([arguments.read_json(p) for p in args.results], args.plot)
        return None
    cores = timing.use_cores(args.cores)
    names = peers_lib.installed(names)
    works = [("decode", streams) for streams in args.batch_size]
    works += [("prefill", args.prefill)] if args.prefill else []
    with contextlib.ExitStack() as stack:
        folder = args.files or stack.enter_context(tempfile.TemporaryDirectory())
        peers = peers_lib.make(args.size, names, pathlib.Path(folder))
    facts = {
        "size": args.size,
        "tokens": args.tokens,
        "cores": cores,
        "clock": args.clock,
        "processor": timing.processor(),
        "weight_bytes": {name: peer.weight_bytes for name, peer in peers.items()},
    }
    clock = timing.CLOCKS[args.clock]
    turns = [timing.turns(doing(work, peers, args.tokens), clock) for work in works]
    rounds = itertools.islice(zip(*turns, strict=True), 2, args.rounds + 1)
    # The first round is not counted, and quartiles are of two.
    for i, seconds in enumerate(rounds, 2):
        series = [
            summary(w, args.tokens, s) for w, s in zip(works, seconds, strict=True)
        ]
        result = facts | {"load": os.getloadavg()[0], "rounds": i, "works": series}
        # After every round: a run that is cut short has measured what it has.
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)
    if args.plot:
        plots.plot([result], args.plot)
    return result


def doing(work: Work, peers: dict[str, peers_lib.Peer], tokens: int) -> dict:
    """{peer: function that does the work}."""
    kind, size = work
    if kind == "prefill":
        return {n: lambda _, peer=p: peer.prefill(size) for n, p in peers.items()}
    return {n: lambda _, peer=p: peer.decode(size, tokens) for n, p in peers.items()}


def summary(work: Work, tokens: int, seconds: dict[str, list[float]]) -> dict:
    """Quartiles of tokens per second, and of the time over the first peer's of that round."""
    kind, size = work
    first = next(iter(seconds))
    count = size if kind == "prefill" else size * (tokens + 1)
    return {
        "work": kind,
        "streams" if kind == "decode" else "length": size,
        "tokens_per_second": {
            name: timing.quartiles(sorted(count / s for s in series))
            for name, series in seconds.items()
        },
        "times_slower_than_" + first: {
            name: timing.ratio(series, seconds[first])
            for name, series in seconds.items()
        },
    }


def print_table(result: dict) -> None:
    """Tokens per second, how many times slower than the first, and bytes of weights."""
    print(
        f"\n{result['processor']}, {result['cores']} cores, load {result['load']:.1f}"
    )
    for work in result["works"]:
        title = f"{result['size']}, {plots.title(work)}"
        print(f"\n{title:24} {'tokens/s':>10} {'quartiles':>18}   times slower")
        (ratios,) = (v for k, v in work.items() if k.startswith("times_slower"))
        for name, (low, median, high) in work["tokens_per_second"].items():
            ratio, spread = ratios[name], f"{low:.1f}..{high:.1f}"
            print(
                f"  {name:22} {median:10.1f} {spread:>18}   "
                f"{ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}]"
            )
    print()
    for name, size in result["weight_bytes"].items():
        print(f"  {name:22} {size / 1e9:10.2f} GB of weights", flush=True)


if __name__ == "__main__":
    arguments.run(main)
