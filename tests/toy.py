"""Toy models, batches and a toy run: text of a few kilobytes, one token per byte."""

import functools
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
from runner import QUICK

from memoryformer import model
from memoryformer.model import ModelConfig, mixers
from memoryformer.training import experiment, loop

VOCAB = 264  # bytes and the end of text, padded to divide over 8 devices
WORDS = "def return table hash code row score layer in for if else (x): self +=".split()

PYTHIA_BLOCK = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "residual": "parallel",
    "ffn_activation": "gelu",
    "output_projection": True,
}

# Compiling is what takes the time of small tests; also where all else is optimised.
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


def model_config(projection="memory", **fields):
    """A two-layer model of width 16; the dense one is Pythia's block."""
    sizes = {
        "vocab_size": 13,
        "embed_dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "seq_len": 12,
        "code_bits": 4,
        "lookup": "reference",
        "rotary_fraction": 0.5,
        "mixer_std": 0.5,
        "ffn_std": 0.3,
        "embed_std": 1.0,
        "head_std": 0.5,
    }
    options = {"extra_bits": 1, "memory_bias": True, "bias_std": 0.3}
    if projection == "dense":
        options = {}
    if projection != "memory":
        sizes |= PYTHIA_BLOCK
        options |= {"output_std": 0.3}
    options |= fields.pop("projection_options", {})
    sizes |= {"projection": projection, "projection_options": options}
    return ModelConfig(**(sizes | fields))


def numpy_params(config):
    """Parameters of a model, all ones: drawing them would compile."""
    shapes = jax.eval_shape(lambda: model.init(config))
    return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)


def batch(config, seed=0, batch_size=8, seq_len=12):
    """A packed batch with padding at the end of rows and uneven weights."""
    rng = np.random.default_rng(seed)
    shape = (batch_size, seq_len)
    starts = rng.random(shape) < 0.15
    segments = np.cumsum(starts, axis=1) + ~starts[:, :1]
    lengths = rng.integers(seq_len // 2, seq_len + 1, batch_size)
    real = np.arange(seq_len)[None] < lengths[:, None]
    segments = np.where(real, segments, 0).astype(np.int32)
    keep = rng.random(shape) < np.linspace(0.2, 1, batch_size)[:, None]
    return {
        "inputs": rng.integers(0, config.vocab_size, shape, np.int32),
        "targets": rng.integers(0, config.vocab_size, shape, np.int32),
        "positions": positions(segments),
        "segment_ids": segments,
        "weights": (keep & real).astype(np.float32),
    }


def logits(config, params, batch):
    """Of the real tokens of a packed batch."""
    seq = mixers.SeqInfo(*(jnp.asarray(batch[n]) for n in ("positions", "segment_ids")))
    forward = quick_jit(lambda p, t: model.merge(config, p)(t, seq)[0])
    return np.asarray(forward(params, batch["inputs"]))[batch["segment_ids"] > 0]


def forward(config, params, tokens):
    """Logits of whole rows, by one program: each operation's own take longer to compile."""
    one = quick_jit(lambda params, tokens: model.forward(config, params, tokens))
    return np.asarray(one(params, np.asarray(tokens, np.int32)))


def positions(segments):
    """Positions inside documents, 0 in padding: [B, L]."""
    index = np.arange(segments.shape[1])
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    inside = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return np.where(segments > 0, inside, 0).astype(np.int32)


def corpus(folder: pathlib.Path, documents=40, seed=0) -> pathlib.Path:
    """A folder of small text files."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for i in range(documents):
        lines = [" ".join(rng.choices(WORDS, k=6)) for _ in range(6)]
        text = f"# {i}\n" + "\n".join(lines) + "\n"
        (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def run_config(folder: pathlib.Path, **fields):
    """A whole config of a toy run on the corpus in `folder`; dotted fields override."""
    config = experiment.default_config()
    values = {
        "model.vocab_size": VOCAB,
        "model.embed_dim": 16,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.seq_len": 16,
        "model.code_bits": 4,
        "model.lookup": "xla",
        "data.source": "text",
        "data.path": str(folder / "corpus"),
        "data.data_dir": str(folder / "cache"),
        "data.tokenizer": "bytes",
        "data.source_options.validation_every": 8,
        "train.num_steps": 20,
        "train.batch_size": 8,
        "train.log_every": 5,
        "optimizer.learning_rate": 3e-3,
        "eval.every_steps": 10,
        "eval.batch_size": 8,
        "eval.num_batches": 2,
        "checkpoint.every_steps": 5,
        "metrics.trackers": "",
        "mesh": "single",
    }
    config.update_from_flattened_dict(values | fields)
    return config


CONFIG_FILE = '''"""A toy run, for the tests of the commands."""

import pathlib

import toy


def get_config(projection: str = "memory"):
    """The toy run; `projection` is memory or dense."""
    folder = pathlib.Path({folder!r})
    return toy.run_config(folder, **{{"model.projection": projection}})
'''

SWEEP = """

def sweep_seed():
    for seed in range(2):
        yield {"train.seed": seed}
"""


def sweep_file(folder: pathlib.Path) -> pathlib.Path:
    """Write the toy run as a config file that defines a sweep of two seeds."""
    path = folder / "toy_sweep.py"
    path.write_text(CONFIG_FILE.format(folder=str(folder)) + SWEEP, encoding="utf-8")
    return path


def config_file(folder: pathlib.Path) -> pathlib.Path:
    """Write the toy run as a config file that a command can read."""
    path = folder / "toy_config.py"
    path.write_text(CONFIG_FILE.format(folder=str(folder)), encoding="utf-8")
    return path


def trained(folder: pathlib.Path, name="run", **fields) -> pathlib.Path:
    """Train a toy run in `folder` and return its workdir."""
    if not (folder / "corpus").exists():
        corpus(folder / "corpus")
    workdir = folder / name
    loop.train(run_config(folder, **fields), workdir)
    return workdir
