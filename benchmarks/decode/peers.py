"""What `benchmarks.decode` times, by name. Start at `make`."""

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Callable

import numpy as np

NAMES = (
    "memoryformer-int8",
    "memoryformer-bfloat16",
    "llama.cpp-q4_0",
    "llama.cpp-q8_0",
    "ctranslate2-int8",
    "dense-float32",
    "dense-int8",
    "dense-int4",
    "transformers-float32",
    "transformers-bfloat16",
    "transformers-int8",
)
# {first part of a name: packages that it needs}, of the extras `decode` and `peers`.
PACKAGES = {
    "memoryformer": (),
    "dense": (),
    "llama.cpp": ("gguf", "llama_cpp"),
    "ctranslate2": ("ctranslate2",),
    "transformers": ("torch", "transformers"),
}


@dataclasses.dataclass(frozen=True)
class Peer:
    """One model in one engine.

    decode(streams, tokens): greedy int [tokens + 1, streams] after prompts of one token, made
        by tokens + 1 passes; ours return one less.
    prefill(length): read a prompt of so many tokens and choose the next.
    weight_bytes: of all weights as they are stored.
    """

    decode: Callable[[int, int], np.ndarray]
    prefill: Callable[[int], object]
    weight_bytes: int


def prompts(streams: int) -> list[list[int]]:
    """Prompts of one token, another for each stream."""
    return [[1 + i] for i in range(streams)]


def long_prompt(length: int, vocab_size: int) -> np.ndarray:
    """The first of 2048 random tokens: int32 [length]."""
    return np.random.default_rng(0).integers(0, vocab_size, 2048, np.int32)[:length]


def family(name: str) -> str:
    """The part of a peer's name that says whose it is."""
    return name.rpartition("-")[0]


def absent(name: str) -> list[str]:
    """The packages that a peer needs and that are not installed."""
    packages = PACKAGES[family(name)]
    return [p for p in packages if importlib.util.find_spec(p) is None]


def installed(names: list[str]) -> list[str]:
    """Leave out, with a line, the peers whose packages are not here."""
    for name in names:
        if packages := absent(name):
            print(f"without {name}: {', '.join(packages)} not installed", flush=True)
    return [name for name in names if not absent(name)]


def make(size: str, names: list[str], folder: pathlib.Path) -> dict[str, Peer]:
    """Build every peer of `names`, checked against another way to compute the same.

    folder: where the engines' files are kept. Those that lie there were checked when they were
    written, and are read as they are.
    """
    from benchmarks.decode import ours, their_torch

    made: dict[str, Peer] = {}
    theirs = None
    if any(family(name) == "transformers" for name in names):
        theirs = their_torch.random_model(size)
        folder = folder / f"{size}-of-transformers"
    else:
        folder = folder / size
    folder.mkdir(parents=True, exist_ok=True)

    @functools.cache
    def twin():
        if theirs is None:
            return ours.random_twin(size)
        config, params = their_torch.twin_of(theirs)
        their_torch.check_logits(theirs, config, params)
        return config, params

    for name in names:
        kind = name.rpartition("-")[2]
        print(f"making {name}", flush=True)
        match family(name):
            case "memoryformer":
                made[name] = ours.memoryformer(size, kind)
            case "transformers":
                twin()  # held against theirs
                made[name] = their_torch.make(theirs, kind)
            case _:
                made[name] = of_twin(name, twin, folder)
    return made


def of_twin(name: str, twin: Callable[[], tuple], folder: pathlib.Path) -> Peer:
    """A dense model, as twin() returns its (config, params), in the engine of a name."""
    from benchmarks.decode import ctranslate2_peer, llama_cpp_peer, ours

    kind = name.rpartition("-")[2]
    match family(name):
        case "dense":
            return ours.dense(*twin(), kind)
        case "llama.cpp":
            return llama_cpp_peer.make(twin, kind, folder)
        case "ctranslate2":
            return ctranslate2_peer.make(twin, kind, folder)
    raise ValueError(f"{name}: no engine of dense models")
