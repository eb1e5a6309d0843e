"""MQAR: eight values to be recalled by their keys, after Arora et al. 2023.

    python -m memoryformer.tasks mqar --config=configs/mqar.py:softmax --workdir=runs/mqar
    ... --config=configs/mqar.py:linear --config.task.num_pairs=16

The argument is a mixer, `softmax` unless given. Cost: about 0.1 s of a core a step.
"""

import ml_collections

from memoryformer import presets
from memoryformer.tasks import experiment


def get_config(mixer: str = "softmax") -> ml_collections.ConfigDict:
    """Return the experiment of one mixer, a name of `presets.mixer_settings`."""
    config = experiment.default_config("mqar")

    model = config.model
    model.vocab_size = 128
    model.embed_dim = 64
    model.num_layers = 2
    model.num_heads = 4
    model.seq_len = 64
    model.projection = "dense"
    model.norm = "layernorm"
    model.norm_eps = 1e-5
    model.ffn_activation = "gelu"
    model.output_projection = True
    model.rotary_fraction = 1.0
    model.embed_std = 1.0
    model.mixer_std = model.ffn_std = model.output_std = 0.1

    task = config.task
    task.num_steps = 1000
    task.batch_size = 64
    task.learning_rate = 3e-3
    task.eval_every = 100

    config.metrics.tensorboard = False
    return presets.with_mixer(config, mixer)
