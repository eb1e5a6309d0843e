"""ListOps with a two-sided trunk, to try what a shared memory costs (Long-Range-Arena style).

    python -m memoryformer.tasks listops --config=configs/listops.py:luna --workdir=runs/listops
    ... --config=configs/listops.py:conv_luna --config.model.mixer_options.num_slots=1

The argument is `softmax`, `linformer`, `luna` or `conv_luna`; every trunk gets learned positions,
for luna has none of its own. Short sequences by default; for LRA's,
`--config.model.seq_len=2000 --config.task.min_len=500`. Cost: minutes on two CPU cores.
"""

import ml_collections

from memoryformer.tasks import experiment


def get_config(mixer: str = "luna") -> ml_collections.ConfigDict:
    """Return the experiment of one mixer."""
    config = experiment.default_config("listops")

    model = config.model
    model.vocab_size = 16
    model.embed_dim = 128
    model.num_layers = 4
    model.num_heads = 4
    model.seq_len = 128
    model.mixer = mixer
    model.causal = False
    model.projection = "dense"
    model.output_projection = True
    model.ffn_activation = "gelu"
    model.rotary_fraction = 1.0
    if mixer in ("linformer", "luna", "conv_luna"):
        model.mixer_options.num_slots = 16

    task = config.task
    task.num_steps = 1000
    task.batch_size = 32
    task.learning_rate = 5e-4
    task.min_len = 20
    task.max_depth = 6
    task.eval_every = 100

    config.metrics.tensorboard = False
    return config
