"""Whole-model decoding on CPU: MemoryFormer beside transformers and our own dense twin.

    python -m benchmarks.decode --size=base                    # every peer, one stream
    python -m benchmarks.decode --size=small --batch_size=16
    python -m benchmarks.decode --cores=1 --clock=cpu          # on a busy machine
    python -m benchmarks.decode --size=base --peers=memoryformer-bfloat16,transformers-float32
    python -m benchmarks.decode --plot=docs/images/decode.png a.json b.json   # from files

`small` and `base` are MemoryFormer's shapes beside Pythia-160M's and -410M's, with random
weights; torch, transformers and our dense twin hold the same ones. A figure is --tokens
greedy tokens after a prompt of one, sampling and Python included, and all peers take turns
in one process, in another order each round. `transformers-int8` is torch's dynamic
quantisation, which rounds activations too; ours rounds weights only. Before anything is
timed, our dense twin's logits are held against transformers', and the tokens of every one of
our models against its full forward pass.

Memory: 7 GiB for base with int8 tables, 14 with bfloat16, and 5 for its peers. Run with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 and THP_MEM_ALLOC_ENABLE=1, so that torch's weights
lie in huge pages too. Limits and predictions: docs/performance.md.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from memoryformer import convert, model, presets
from memoryformer.generation import sampler
from memoryformer.model import narrow
from memoryformer.ops.lookup import narrow as narrow_rows

SIZES = {"small": "160m", "base": "410m"}
PEERS = (
    "memoryformer-int8",
    "memoryformer-bfloat16",
    "dense-float32",
    "dense-int8",
    "dense-int4",
    "transformers-float32",
    "transformers-bfloat16",
    "transformers-int8",
)
DEFAULT_PEERS = ",".join(p for p in PEERS if p != "memoryformer-bfloat16")

Peer = Callable[[int], np.ndarray]  # number of tokens -> int [tokens, batch]


def main(argv: list[str] | None = None) -> dict | None:
    """Measure the peers asked for, or plot files of earlier measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    parser.add_argument("--size", choices=(*SIZES, "toy"), default="base")
    parser.add_argument("--peers", default=DEFAULT_PEERS, help="comma-separated")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cores", type=int, default=0, help="0: all")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall")
    parser.add_argument("--output", type=pathlib.Path, default="decode.json")
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args(argv)
    if args.files:
        plot([json.loads(path.read_text()) for path in args.files], args.plot)
        return None
    cores = sorted(os.sched_getaffinity(0))[: args.cores or None]
    os.sched_setaffinity(0, cores)  # before any thread pool starts
    names = args.peers.split(",")
    peers = make_peers(args.size, names, args.batch_size)
    seconds = measure(peers, args.tokens, args.rounds, timing.CLOCKS[args.clock])
    rates = {
        name: sorted(args.batch_size * (args.tokens + 1) / s for s in series)
        for name, series in seconds.items()
    }
    first = names[0]
    result = {
        "size": args.size,
        "batch_size": args.batch_size,
        "tokens": args.tokens,
        "cores": len(cores),
        "clock": args.clock,
        "load": os.getloadavg()[0],
        "tokens_per_second": {n: timing.quartiles(r) for n, r in rates.items()},
        "times_slower_than_" + first: {
            name: timing.quartiles(
                [t / f for t, f in zip(series, seconds[first], strict=True)]
            )
            for name, series in seconds.items()
        },
    }
    print_table(result, first)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot([result], args.plot)
    return result


def measure(
    peers: dict[str, Peer], tokens: int, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each peer in each round, after one that is not counted."""
    seconds = {name: [] for name in peers}
    shuffled = random.Random(0)
    for i in range(rounds + 1):
        for name in shuffled.sample(list(peers), len(peers)):
            start = clock()
            peers[name](tokens)
            if i:
                seconds[name].append(clock() - start)
    return seconds


def print_table(result: dict, first: str) -> None:
    """Tokens per second, and how many times slower than the first."""
    print(
        f"\n{result['size']}, batch {result['batch_size']}, load {result['load']:.1f}"
    )
    print(f"{'':24} {'tokens/s':>10} {'quartiles':>18}   times slower")
    for name, (low, median, high) in result["tokens_per_second"].items():
        ratio = result["times_slower_than_" + first][name]
        spread = f"{low:.1f}..{high:.1f}"
        print(
            f"  {name:22} {median:10.1f} {spread:>18}   "
            f"{ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}]",
            flush=True,
        )


# --- Peers. --------------------------------------------------------------------------


def make_peers(size: str, names: list[str], batch_size: int) -> dict[str, Peer]:
    """Build every peer of `names`, checked against another way to compute the same."""
    peers: dict[str, Peer] = {}
    theirs = dense = None
    if any(not name.startswith("memoryformer") for name in names):
        theirs = their_model(size)
    if any(name.startswith("dense") for name in names):
        dense = same_weights(theirs)
        check_same_logits(theirs, *dense)
    if not any(name.startswith("transformers") for name in names):
        theirs = None  # base must fit into memory beside its peers
    for name in names:
        family, kind = name.split("-")
        print(f"making {name}", flush=True)
        if family == "transformers":
            peers[name] = their_peer(theirs, kind, batch_size)
            continue
        if family == "dense":
            kinds = narrow.WeightKinds(head=kind, dense=kind)
            config, params = dense
        else:
            kinds = narrow.WeightKinds(tables=kind, head=kind)
            config = memoryformer_config(size)
            params = random_params(config, kinds)
        peers[name] = our_peer(config, params, kinds, batch_size)
    return peers


def memoryformer_config(size: str) -> model.ModelConfig:
    """The preset's shape, computing in float32, with room for a short context."""
    if size == "toy":
        return model.ModelConfig(
            vocab_size=512, embed_dim=64, num_layers=2, num_heads=2, seq_len=256
        )
    config = model.ModelConfig.from_config(presets.memoryformer(size).model)
    return dataclasses.replace(config, dtype="float32")


def random_params(config: model.ModelConfig, kinds: narrow.WeightKinds) -> dict:
    """Draw parameters, tables already packed: float32 ones of base would take 27 GB."""
    random_numbers = np.random.default_rng(0)
    block = random_numbers.standard_normal(1 << 22, np.float32)

    def tables(shape):
        if kinds.tables == "int8":
            values = random_numbers.integers(-127, 128, shape, np.int8)
            scales = np.full(shape[:2], 0.02 / 64, np.float32)
            return narrow_rows.PackedTables(
                narrow_rows.in_huge_pages(values), jnp.asarray(scales)
            )
        values = np.resize((0.02 * block).astype(jnp.dtype(kinds.tables)), shape)
        return narrow_rows.PackedTables(narrow_rows.in_huge_pages(values), None)

    def leaf(path, x):
        name = path[-1].key
        if name == "tables":
            return tables(x.shape)
        if name in ("scale", "bias"):
            return np.full(x.shape, name == "scale", np.float32)
        return np.resize(0.02 * block, x.shape)

    shapes = jax.eval_shape(lambda: model.init(config))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def our_peer(config, params, kinds, batch_size: int) -> Peer:
    """Our generator, checked on its first two blocks.

    Not on all of memory layers: a sign that rounding flips reads another row, and the next
    layers' signs follow, so that two exact computations part within a few random layers.
    """
    first = dataclasses.replace(config, num_layers=2)
    blocks = {name: params["blocks"][name] for name in ("0", "1")}
    check_tokens(first, params | {"blocks": blocks}, kinds, batch_size)
    return decoder(sampler.Generator(config, params, kinds), batch_size)


def decoder(generator: sampler.Generator, batch_size: int) -> Peer:
    """Greedy tokens after prompts of one token."""

    def run(tokens):
        sampling = sampler.SamplingConfig(max_tokens=tokens, temperature=0.0)
        prompts = [[1 + i] for i in range(batch_size)]
        return np.array(list(generator.stream_batch(prompts, sampling)))

    return run


def check_tokens(config, params, kinds, batch_size: int) -> None:
    """The tokens are the argmax of the full forward pass over all of them."""
    tokens = decoder(sampler.Generator(config, params, kinds), batch_size)(12)
    prepared = narrow.prepare(config, params, kinds)
    inputs = np.concatenate([1 + np.arange(batch_size)[None], tokens[:-1]]).T
    logits = np.asarray(model.forward(config, prepared, jnp.asarray(inputs)))
    chosen = np.take_along_axis(logits, tokens.T[..., None], axis=-1)[..., 0]
    gap = (logits.max(axis=-1) - chosen).max() / np.abs(logits).max()
    if not gap < 1e-4:
        raise AssertionError(f"decoding leaves the argmax of the forward pass by {gap}")


def their_model(size: str):
    """A GPT-NeoX of transformers with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if size == "toy":
        shape = (64, 2, 2)
    else:
        shape = presets.PYTHIA[SIZES[size]][:3]
    width, layers, heads = shape
    config = transformers.GPTNeoXConfig(
        vocab_size=512 if size == "toy" else presets.VOCAB_SIZE,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    )
    return transformers.GPTNeoXForCausalLM(config).eval()


def same_weights(theirs):
    """The same as our dense twin: (config, params)."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        config, params = convert.load_gpt_neox(folder)
        return config, jax.tree.map(np.array, params)  # copied out of the mapped file


def their_peer(theirs, kind: str, batch_size: int) -> Peer:
    """transformers' cached decoding without `generate`, whose own work would be added."""
    import copy

    import torch
    import transformers

    if kind == "int8":
        theirs = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(theirs), {torch.nn.Linear}, dtype=torch.qint8
        )
    elif kind != "float32":
        theirs = copy.deepcopy(theirs).to(getattr(torch, kind))

    @torch.inference_mode()
    def run(tokens):
        cache = transformers.DynamicCache()
        token = 1 + torch.arange(batch_size)[:, None]
        chosen = []
        for _ in range(
            tokens + 1
        ):  # the prompt's token, and those it is continued with
            output = theirs(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(dim=-1)
            chosen.append(token[:, 0].numpy())
        return np.array(chosen)

    return run


def check_same_logits(theirs, config, params) -> None:
    """Our dense twin computes what transformers computes."""
    import torch

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    ours = np.asarray(model.forward(config, params, jnp.asarray(tokens, jnp.int32)))
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    if not error < 1e-4:
        raise AssertionError(f"the dense twin differs from transformers by {error}")


def plot(results: list[dict], path: pathlib.Path) -> None:
    """Bars of tokens per second, one panel a measurement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(4.5 * len(results), 3.4), layout="constrained"
    )
    for axis, result in zip(np.atleast_1d(axes), results, strict=True):
        names = [n for n in PEERS if n in result["tokens_per_second"]]
        low, middle, high = zip(
            *(result["tokens_per_second"][name] for name in names), strict=True
        )
        middle = np.array(middle)
        colours = [f"C{('memoryformer', 'dense', 'transformers').index(n.split('-')[0])}"
                   for n in names]  # fmt: skip
        axis.barh(names, middle, color=colours, xerr=[middle - low, high - middle])
        axis.invert_yaxis()
        axis.set_xlabel("tokens per second")
        axis.set_title(f"{result['size']}, batch {result['batch_size']}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
