"""PMI and a universal transformer on relations, stories or triangles.

    python -m memoryformer.tasks relations --config=configs/pmi.py:relations --workdir=runs/pmi
    ... --config=configs/pmi.py:relations-none          # or sum, soft, working, no-asking, ...

The argument is TASK or TASK-VARIANT, and the variants are those of `VARIANTS`; without one the
long-term memory is as the paper's text means it. Width 64, three layers, four heads. Cost of
relations: 80 CPU-seconds, a third of that for `none`. docs/pmi.md has what came out.
"""

import ml_collections

from memoryformer import config as config_lib
from memoryformer.tasks import experiment

TASKS = {  # steps, peak of the learning rate
    "relations": (1500, 1e-3),
    "stories": (2000, 1e-3),
    "triangles": (1000, 1e-3),
}
VARIANTS = {
    "outer": {},
    "sum": {"association": "sum"},  # as coded
    "soft": {"top_k": 0},
    "working": {"memory": "working"},  # a shared workspace
    "none": {"memory": "none"},  # a universal transformer
    "no-asking": {"ask_working": False},
    "no-working": {"working_share": 0.0},
    "no-sharing": {"share_parameters": False, "share_memory": False},
}


def get_config(argument: str = "relations") -> ml_collections.ConfigDict:
    """Return the experiment of one task and one variant."""
    name, _, variant = argument.partition("-")
    config_lib.choose(name, TASKS, "--config: the task")
    config_lib.choose(variant or "outer", VARIANTS, "--config: the variant")
    config = experiment.default_config(name)
    config.model.update(VARIANTS[variant or "outer"])

    task = config.task
    task.num_steps, task.learning_rate = TASKS[name]
    task.batch_size = 64
    task.warmup_steps = 100
    task.eval_every = 500
    task.eval_batches = 32  # 2048 rows

    config.checkpoint.every_steps = 500
    config.metrics.trackers = ""
    return config
