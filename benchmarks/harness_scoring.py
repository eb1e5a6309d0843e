"""Score short continuations as a harness does: ours beside transformers, in one run.

    python -m benchmarks.harness_scoring [--requests=2000] [--rounds=3]

The shape is Pythia-70M's, the weights are random and the same on both sides, the requests are
synthetic: contexts of 8 to 48 tokens, continuations of 1 to 12. Theirs is what the harness's own
adapter does: sort by length, pad each batch to its longest, log-softmax of all logits, gather.
`transformers_lean` is the same, but reads the head only where a continuation is, which the
adapter does not. Ours is `scoring`. Needs torch and transformers.
"""

import json
import os
import tempfile
import time

from benchmarks import arguments

FLAGS = arguments.Parser(__doc__)
FLAGS.number("requests", 2000, help="how many")
FLAGS.number("rounds", 3, help="of which the best of each side counts")
FLAGS.number("batch_size", 32, help="rows, on both sides")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

import numpy as np

from memoryformer import convert
from memoryformer.harness import scoring

SHAPE = dict(
    vocab_size=50_304,
    hidden_size=512,
    num_hidden_layers=6,
    num_attention_heads=8,
    intermediate_size=2048,
    max_position_embeddings=2048,
    rotary_pct=0.25,
)


def make_requests(count: int) -> list[scoring.Window]:
    """Draw windows of 9 to 60 tokens."""
    rng = np.random.default_rng(0)
    windows = []
    for _ in range(count):
        context, continuation = rng.integers(8, 49), rng.integers(1, 13)
        tokens = rng.integers(0, SHAPE["vocab_size"], context + continuation)
        windows.append(scoring.Window(tokens.tolist(), int(continuation)))
    return windows


def score_theirs(theirs, windows, batch_size: int, lean: bool) -> list[np.ndarray]:
    """Score with transformers: log-probabilities of each window's continuation."""
    import torch

    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].tokens))
    results = [None] * len(windows)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = max(len(windows[i].tokens) for i in batch) - 1
            tokens = torch.zeros((len(batch), longest), dtype=torch.long)
            for row, i in enumerate(batch):
                inputs = torch.tensor(windows[i].tokens[:-1])
                tokens[row, : len(inputs)] = inputs
            # Padding is on the right, and attention is causal: no mask is needed.
            if lean:
                hidden, head = (
                    theirs.base_model(tokens)[0],
                    theirs.get_output_embeddings(),
                )
            else:
                logprobs = torch.log_softmax(theirs(tokens).logits, dim=-1)
            for row, i in enumerate(batch):
                sequence, count = windows[i]
                last = len(sequence) - 1
                place = (row, slice(last - count, last))
                if lean:
                    picked = torch.log_softmax(head(hidden[place]), dim=-1)
                else:
                    picked = logprobs[place]
                wanted = torch.tensor(sequence[-count:])[:, None]
                results[i] = picked.gather(1, wanted)[:, 0].numpy()
    return results


def main(argv: list[str] | None = None) -> None:
    """Run both sides in turn and print JSON."""
    args = FLAGS.parse_args(argv)
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = transformers.GPTNeoXConfig(**SHAPE)
    theirs = transformers.GPTNeoXForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        size = args.batch_size
        scorer = scoring.Scorer(*convert.load_gpt_neox(folder), batch_size=size)
        windows = make_requests(args.requests)
        sides = {
            "transformers": lambda w: score_theirs(theirs, w, size, False),
            "transformers_lean": lambda w: score_theirs(theirs, w, size, True),
            "memoryformer": lambda w: [s.logprobs for s in scorer.score(w)],
        }
        seconds = {name: [] for name in sides}
        first = {}
        for name, score in sides.items():  # compile, and warm caches up
            started = time.perf_counter()
            score(windows[:200])
            first[name] = time.perf_counter() - started
        for _ in range(args.rounds):
            results = {}
            for name, score in sides.items():
                started = time.perf_counter()
                results[name] = score(windows)
                seconds[name].append(time.perf_counter() - started)
    best = {name: min(times) for name, times in seconds.items()}
    both = zip(results["transformers"], results["memoryformer"], strict=True)
    difference = max(float(np.abs(a - b).max()) for a, b in both)
    report = {
        "requests": len(windows),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "requests_per_second": {n: len(windows) / s for n, s in best.items()},
        "speedup": best["transformers"] / best["memoryformer"],
        "speedup_over_lean": best["transformers_lean"] / best["memoryformer"],
        "largest_difference": difference,
        "compilations": scorer._call._cache_size(),
        "seconds_of_200_with_compilation": first,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    arguments.run(main)
