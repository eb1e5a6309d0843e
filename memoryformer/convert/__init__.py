"""Checkpoints of other formats, in and out; `python -m memoryformer.convert --help`."""

from memoryformer.convert.export import load_export, save_export
from memoryformer.convert.gpt_neox import load_gpt_neox, save_gpt_neox
from memoryformer.convert.released import load_released, save_released

__all__ = [
    "load_export",
    "load_gpt_neox",
    "load_released",
    "save_export",
    "save_gpt_neox",
    "save_released",
]
