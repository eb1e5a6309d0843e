"""HashHop: names followed through chains of definitions, after Magic's benchmark.

    python -m memoryformer.tasks hashhop --config=configs/hashhop.py:softmax --workdir=runs/hashhop
    ... --config.task.hops=1 --config.task.chain_of_thought=True

The argument is a mixer, `softmax` unless given. Cost: about 0.1 s of a core a step; not
trained to the end here.
"""

import ml_collections

from memoryformer import presets
from memoryformer.tasks import experiment


def get_config(mixer: str = "softmax") -> ml_collections.ConfigDict:
    """Return the experiment of one mixer, a name of `presets.mixer_settings`."""
    config = experiment.default_config("hashhop")

    presets.set_recall_trunk(config.model)
    config.model.vocab_size = 72
    config.model.seq_len = 64

    task = config.task
    task.num_steps = 2000
    task.batch_size = 64
    task.learning_rate = 3e-3
    task.eval_every = 200

    config.metrics.trackers = ""
    return presets.with_mixer(config, mixer)
