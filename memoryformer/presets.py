"""The paper's models and their baselines as configs: MemoryFormer and Pythia.

    presets.memoryformer("tiny")                  as the paper says (Table 1)
    presets.memoryformer("tiny", "released")      as the authors' repository trains it
    presets.pythia("70m")                         the dense baseline (arXiv 2304.01373)

docs/paper_differences.md lists every point where the first two differ. Both kinds share the
budget and the data of Pythia, in `_pretraining`.
"""

from typing import Any

import ml_collections

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.model import mixers, recurrence
from memoryformer.training import experiment

# size -> D, layers, heads, peak learning rate
PYTHIA = {
    "70m": (512, 6, 8, 1e-3),
    "160m": (768, 12, 12, 6e-4),
    "410m": (1024, 24, 16, 3e-4),
}
# size -> the Pythia it stands beside; its learning rate is three times that one's.
MEMORYFORMER = {"tiny": "70m", "small": "160m", "base": "410m"}
VOCAB_SIZE = 50_304  # GPT-NeoX's 50,277 tokens, padded to a multiple of 128


def memoryformer(size: str, variant: str = "") -> ml_collections.ConfigDict:
    """Return the paper's experiment of one size; variant 'released' for the repository's."""
    config_lib.choose(size, MEMORYFORMER, "preset")
    config_lib.choose(variant, ("", "released"), "variant")
    embed_dim, num_layers, num_heads, learning_rate = PYTHIA[MEMORYFORMER[size]]
    released = variant == "released"
    if released and size == "base":
        raise ConfigError("variant='released': the repository has no config for base.")
    if released and size == "small":
        num_layers, num_heads = 6, 8
    config = _pretraining(embed_dim, num_layers, num_heads)

    model = config.model
    model.projection = "memory"
    model.code_bits = 8
    model.projection_options.extra_bits = 2
    model.ffn_std = 0.02
    config.optimizer.learning_rate = 3 * learning_rate
    if not released:
        return config
    model.score = "l1_softmax"
    model.projection_options.memory_bias = True
    model.projection_options.bias_std = 0.001
    model.norm = "rmsnorm"
    model.norm_eps = 1e-8
    config.train.num_steps = 106_418
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule_options.end_fraction = 0.01
    config.optimizer.warmup_steps = 1064
    return config


def pythia(size: str) -> ml_collections.ConfigDict:
    """Return Pythia's experiment of one size: its architecture and its recipe."""
    config_lib.choose(size, PYTHIA, "preset")
    embed_dim, num_layers, num_heads, learning_rate = PYTHIA[size]
    config = _pretraining(embed_dim, num_layers, num_heads)

    model = config.model
    model.projection = "dense"
    model.residual = "parallel"
    model.ffn_activation = "gelu"
    model.output_projection = True
    model.ffn_std = model.mixer_std
    model.projection_options.output_std = model.head_std
    config.optimizer.learning_rate = learning_rate
    return config


def set_recall_trunk(model: ml_collections.ConfigDict) -> None:
    """Make a model the small dense trunk that tasks of recall are tried on.

    Weights are large enough that attention is not uniform at first.
    """
    model.embed_dim = 64
    model.num_layers = 2
    model.num_heads = 4
    model.projection = "dense"
    model.norm = "layernorm"
    model.norm_eps = 1e-5
    model.ffn_activation = "gelu"
    model.output_projection = True
    model.rotary_fraction = 1.0
    model.embed_std = 1.0
    model.mixer_std = model.ffn_std = 0.1
    model.projection_options.output_std = 0.1


def mixer_settings() -> dict[str, dict[str, Any]]:
    """Return what `with_mixer` knows by name: the examples of mixers and recurrences."""
    return mixers.settings() | recurrence.settings()


def with_mixer(
    config: ml_collections.ConfigDict, name: str
) -> ml_collections.ConfigDict:
    """Give an experiment one of `mixer_settings()`; raises `ConfigError` for another."""
    known = mixer_settings()
    config_lib.choose(name, known, "mixer")
    fields = config_lib.flatten({"model": known[name]})
    config_lib.override(config, {k: v for k, v in fields.items() if v != {}})
    if config.model.recurrence != "none":  # documents begin where chunks do
        config.data.align_documents = recurrence.chunk_size(config.model)
    return config


def _pretraining(
    embed_dim: int, num_layers: int, num_heads: int
) -> ml_collections.ConfigDict:
    """Return what all sizes share: 143,000 steps of 1024 sequences of 2048 tokens."""
    config = experiment.default_config()

    model = config.model
    model.vocab_size = VOCAB_SIZE
    model.embed_dim = embed_dim
    model.num_layers = num_layers
    model.num_heads = num_heads
    model.seq_len = 2048
    model.norm = "layernorm"  # the paper names none but wants a zero mean; Pythia's
    model.norm_eps = 1e-5
    model.rotary_fraction = 0.25
    model.embed_std = model.mixer_std = (2 / (5 * embed_dim)) ** 0.5  # "small init"
    model.head_std = 2 / num_layers / embed_dim**0.5  # "Wang init"
    model.dtype = "bfloat16"

    config.data.source = "c4"
    config.data.path = "data/pile"
    config.data.tokenizer = "hub:EleutherAI/gpt-neox-20b"

    config.train.num_steps = 143_000
    config.train.batch_size = 1024

    optimizer = config.optimizer
    optimizer.schedule_options.end_fraction = 0.1
    optimizer.warmup_steps = 1430
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0

    config.eval.every_steps = 1000
    config.eval.num_batches = 100
    config.checkpoint.every_steps = 1000
    config.mesh = "fsdp"
    return config
