"""A recurrent attention network on scikit-learn's digits, to be made a table of.

    python -m memoryformer.tasks memorised --config=configs/memorised.py:64 --workdir=runs/mbi
    python -m memoryformer.tasks.memorised --workdir=runs/mbi

The argument is the number of values of the state, one bit each; published: 64. Cost: under a
minute on two CPU cores. Expected: nine in ten digits, and fewer with fewer values; see
docs/memorised.md.
"""

import ml_collections

from memoryformer.errors import ConfigError
from memoryformer.tasks import experiment


def get_config(state_size: str = "64") -> ml_collections.ConfigDict:
    """Return the run with so many values of the state."""
    if not state_size.isdecimal():
        raise ConfigError(f"configs/memorised.py:{state_size}: expected a number.")
    config = experiment.default_config("memorised")
    config.model.state_size = int(state_size)
    config.task.num_steps = 2000
    config.task.batch_size = 128
    config.task.learning_rate = 1e-3
    config.task.weight_decay = 0.0
    config.task.eval_every = 500
    return config
