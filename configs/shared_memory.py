"""What stands between a shared memory and its input: hypotheses after Yorsh et al. 2024, as a sweep.

    for task in texts pathfinder; do
      python -m memoryformer.sweep --config=configs/shared_memory.py:$task --sweep=seed,memory run --parallel=2
      python -m memoryformer.sweep --config=configs/shared_memory.py:$task --sweep=seed,memory collect
    done

The argument is a task: `texts` (which package of the standard library 64 bytes are from),
`pathfinder` (16 x 16 pixels) or `listops` (expressions of at most 64 tokens). Two-sided trunks of
two layers and width 32, one memory through depth, 2,048 held-out examples. Sweeps, to be
multiplied: `memory` (seven cells: softmax, luna and conv_luna of 1 and 16 slots, both at 16 slots
with temperatures that stay 1) and `seed` (three). 21 runs a task: 25 s of one core each for `texts`,
minutes for `pathfinder`. After a run was stopped or killed, the same command goes on.
docs/shared_memory.md has the hypotheses and what came out.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from memoryformer.tasks import experiment

# task: tokens, L, steps
TASKS = {
    "texts": (257, 64, 1500),
    "pathfinder": (4, 256, 800),
    "listops": (16, 64, 1000),
}


def get_config(task: str = "texts") -> ml_collections.ConfigDict:
    """Return the experiment of one task, with softmax."""
    config = experiment.default_config(task)
    vocab_size, seq_len, num_steps = TASKS[task]

    model = config.model
    model.vocab_size = vocab_size
    model.embed_dim = 32
    model.num_layers = 2
    model.num_heads = 2
    model.seq_len = seq_len
    model.causal = False
    model.projection = "dense"
    model.output_projection = True
    model.ffn_activation = "gelu"
    model.rotary_fraction = 1.0
    model.embed_std = 0.5
    model.mixer_std = model.ffn_std = 0.1
    model.projection_options.output_std = 0.1

    section = config.task
    section.num_steps = num_steps
    section.batch_size = 32
    section.learning_rate = 5e-3
    section.warmup_steps = 50
    section.eval_every = num_steps // 5
    section.eval_batches = 64  # of 32: 2,048 examples
    if task == "listops":
        section.max_depth = 6

    config.checkpoint.every_steps = num_steps // 5
    config.checkpoint.keep = 1
    config.metrics.trackers = ""
    return config


def metrics() -> tuple[str, ...]:
    """The columns of `sweep collect`: accuracy, the meter, and the temperatures."""
    layers = ("blocks.0.mixer", "blocks.1.mixer")
    figures = [
        f"degradation/{layer}/{figure}"
        for figure in ("cosine", "effective_rank")
        for layer in layers
    ]
    taus = [f"temperature/{layer}/tau{to}" for layer in layers for to in ("", "_pack")]
    return ("val/accuracy", "val/loss", *figures, *taus)


def sweep_memory() -> Iterator[dict[str, Any]]:
    """Softmax, and luna and conv_luna by slots and by temperature."""
    yield {"label": "softmax", "model.mixer": "softmax"}
    for slots, temperature in ((1, "learn"), (16, "learn"), (16, "unit")):
        for mixer in ("luna", "conv_luna"):
            yield {
                "label": f"{mixer} m={slots} {temperature}",
                "model.mixer": mixer,
                "model.mixer_options.num_slots": slots,
                "model.mixer_options.temperature": temperature,
                "model.mixer_options.stream": True,
            }


def sweep_seed() -> Iterator[dict[str, Any]]:
    """Three seeds, of the parameters and of the batches."""
    for seed in range(3):
        yield {"task.seed": seed}
