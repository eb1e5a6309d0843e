"""The language model: its config, its modules, and functions over its parameters.

config = ModelConfig(...);  params = init(config);  logits = forward(config, params, tokens)
"""

from memoryformer.model.config import ModelConfig
from memoryformer.model.params import (
    fingerprint,
    forward,
    init,
    joined,
    merge,
    param_groups,
    param_roles,
    param_specs,
    partition_specs,
    split_groups,
    split_trained,
    with_tables_as_read,
)
from memoryformer.model.transformer import Block, Transformer

__all__ = [
    "Block",
    "ModelConfig",
    "Transformer",
    "fingerprint",
    "forward",
    "init",
    "joined",
    "merge",
    "param_groups",
    "param_roles",
    "param_specs",
    "partition_specs",
    "split_groups",
    "split_trained",
    "with_tables_as_read",
]
