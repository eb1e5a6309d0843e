"""The released code's tensors: the files that hold them, and which parameter each one is.

I counts the pieces: 0 embedding, 2 .. n + 1 blocks, n + 3 final norm, n + 4 head. Tables
are [K 2^tau, F], float16; the first value of a chunk is the high bit, as ours. Start at
`entries`.
"""

import pathlib
import re
from typing import Any

import numpy as np

from memoryformer import model
from memoryformer.convert import torch_file, trees
from memoryformer.errors import DataError

STATES = "mp_rank_00_model_states.pt"
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_IN_ONE_FILE = re.compile(r"sequential\.(\d+)\.(.+)")


def _split(config: model.ModelConfig, rows: np.ndarray) -> np.ndarray:
    """[K C, F] -> [K, C, F]."""
    return rows.reshape(config.num_tables, -1, rows.shape[-1])


def _tables(ours: str, theirs: str) -> trees.Entry:
    return trees.Entry(
        f"{ours}.tables",
        (f"{theirs}.tables",),
        _split,
        lambda _, tables: (tables.reshape(-1, tables.shape[-1]),),
    )


def _same(ours: str, theirs: str) -> trees.Entry:
    return trees.Entry(ours, (theirs,))


_PROJECTIONS = tuple(f"attention.{name}_proj" for name in ("query", "key", "value"))
_BLOCK = (
    _same("norm1.scale", "input_layernorm.scale"),
    _same("norm2.scale", "post_attention_layernorm.scale"),
    trees.Entry(
        "mixer.qkv.tables",
        tuple(f"{name}.tables" for name in _PROJECTIONS),
        lambda config, *qkv: np.stack([_split(config, rows) for rows in qkv], axis=2),
        lambda _, tables: tuple(
            tables[:, :, i].reshape(-1, tables.shape[-1]) for i in range(3)
        ),
    ),
    trees.Entry(
        "mixer.qkv.bias",
        tuple(f"{name}.bias" for name in _PROJECTIONS),
        lambda _, *qkv: np.stack(qkv),
        lambda _, bias: tuple(bias),
    ),
    _tables("ffn.up", "mlp.0"),
    _same("ffn.up.bias", "mlp.0.bias"),
    _same("ffn.norm.scale", "mlp.1.weight"),
    _same("ffn.norm.bias", "mlp.1.bias"),
    _tables("ffn.down", "mlp.2"),
    _same("ffn.down.bias", "mlp.2.bias"),
)


def entries(config: model.ModelConfig) -> list[trees.Entry]:
    """Return the correspondence of our parameters and their tensors, 'I.NAME'."""
    depth = config.num_layers
    table = [
        _same("embed.embedding", "0.word_embeddings.weight"),
        _same("final_norm.scale", f"{depth + 3}.norm.scale"),
        trees.linear("head.kernel", f"{depth + 4}.final_linear.weight"),
    ]
    for i in range(depth):
        table += trees.in_block(_BLOCK, f"blocks.{i}.", f"{i + 2}.")
    return table


def read_pieces(directory: pathlib.Path) -> dict[int, dict[str, np.ndarray]]:
    """Read the tensors of a `global_stepN`, {I: {NAME: tensor}}; raises `DataError`."""
    pieces: dict[int, dict[str, np.ndarray]] = {}
    ranks = {path.name for path in directory.glob("mp_rank_*_model_states.pt")}
    for path in sorted(directory.glob("layer_*.pt")):
        match = _LAYER_FILE.fullmatch(path.name)
        if match is None:
            raise DataError(f"{path}: not a name of a layer file.")
        ranks.add(f"mp_rank_{match[2]}_model_states.pt")
        piece = torch_file.read(path)
        if piece:
            pieces[int(match[1])] = trees.named_arrays(piece, path)
    if ranks - {STATES}:
        raise DataError(
            f"{directory}: was split over {len(ranks)} model-parallel ranks; merge "
            "them with the tools of GPT-NeoX first."
        )
    if not pieces and (directory / STATES).is_file():
        module = _states(directory).get("module") or {}
        for name, tensor in trees.named_arrays(module, directory / STATES).items():
            match = _IN_ONE_FILE.fullmatch(name)
            if match is None:
                raise DataError(f"{directory / STATES}: {name!r:.60}: unknown name.")
            pieces.setdefault(int(match[1]), {})[match[2]] = tensor
    if not pieces:
        raise DataError(
            f"{directory}: holds no layer_*-model_00-model_states.pt and no {STATES} "
            "with a module."
        )
    return pieces


def _states(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / STATES
    states = torch_file.read(path)
    if not isinstance(states, dict):
        raise DataError(f"{path}: holds no values by name.")
    return states
