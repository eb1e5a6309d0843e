"""A small MemoryFormer on the Python standard library's own sources.

    make quickstart          # trains, evaluates, samples, draws
    make quickstart-dense    # the same with the dense twin (configs/quickstart.py:dense)

Two CPU cores, under eight minutes of training. docs/results.md has what it reaches. Its sweeps:
`table_state`, the bytes that a table entry costs in training, x `seed`; `longer` has three
times the tokens.

Target: v5e:1x1
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from memoryformer.training import experiment


def get_config(projection: str = "memory") -> ml_collections.ConfigDict:
    """The quickstart experiment with projection 'memory' or 'dense'."""
    config = experiment.default_config()

    model = config.model
    model.vocab_size = 4096
    model.embed_dim = 128
    model.num_layers = 3
    model.num_heads = 2
    model.seq_len = 256
    model.projection = projection
    model.rotary_fraction = 1.0
    if projection == "memory":
        model.projection_options.memory_bias = True
    if projection == "dense":
        model.output_projection = True
        model.ffn_activation = "gelu"
        model.projection_options.output_std = 0.02 / (2 * model.num_layers) ** 0.5

    config.data.source = "stdlib"
    config.data.tokenizer = "bpe:4096"

    train = config.train
    train.num_steps = 3000
    train.batch_size = 4

    optimizer = config.optimizer
    optimizer.learning_rate = 4e-3
    optimizer.schedule_options.end_fraction = 0.05
    optimizer.warmup_steps = 100

    config.eval.every_steps = 750
    config.eval.num_batches = 12  # eval.py reads the whole text
    config.checkpoint.every_steps = 750
    return config


def sweep_seed() -> Iterator[dict[str, Any]]:
    """Three seeds, of the parameters and of the order of the data."""
    for seed in range(3):
        yield {"train.seed": seed}


def sweep_table_state() -> Iterator[dict[str, Any]]:
    """Bytes a table entry costs in training: 12, 6, and 4 in two ways."""
    options = "optimizer.table_state_options"
    lean = {"optimizer.table_state": "lean"}
    narrow = {f"{options}.dtype": "bfloat16", f"{options}.rounding": "stochastic"}
    yield {"label": "12 bytes"}
    yield {"label": "6 bytes", **lean}
    yield {"label": "4 bytes, bfloat16 tables", **lean, **narrow}
    yield {
        "label": "4 bytes, no first moment",
        **lean,
        f"{options}.moment_dtype": "none",
    }


def sweep_longer() -> Iterator[dict[str, Any]]:
    """12 and 6 bytes a table entry after three times the tokens."""
    for label, state in (("12 bytes", "full"), ("6 bytes", "lean")):
        yield {
            "label": f"{label}, 9000 steps",
            "optimizer.table_state": state,
            "train.num_steps": 9000,
        }
