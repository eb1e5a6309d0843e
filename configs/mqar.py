"""MQAR: four values to be recalled by their keys, after Arora et al. 2023.

    python -m memoryformer.tasks mqar --config=configs/mqar.py:softmax --workdir=runs/mqar
    ... --config=configs/mqar.py:linear --config.task.num_pairs=8 --config.model.seq_len=64

The argument is a mixer, `softmax` unless given. Cost: 20 s of a core. Softmax
answers everything after 500 steps. Eight pairs of 128 tokens in 64 are another matter: after 2,000
steps it has 0.13, the values of a row but not which is whose.
"""

import ml_collections

from memoryformer import presets
from memoryformer.tasks import experiment


def get_config(mixer: str = "softmax") -> ml_collections.ConfigDict:
    """Return the experiment of one mixer, a name of `presets.mixer_settings`."""
    config = experiment.default_config("mqar")

    presets.set_recall_trunk(config.model)
    config.model.vocab_size = 24
    config.model.seq_len = 16

    task = config.task
    task.num_steps = 1000
    task.num_pairs = 4
    task.batch_size = 64
    task.learning_rate = 3e-3
    task.eval_every = 100

    config.metrics.trackers = ""
    return presets.with_mixer(config, mixer)
