"""GPT-NeoX's tensors: the files that hold them, and which parameter of ours each one is.

Their fused projection interleaves q, k and v per head: weight [H, 3, E, D] against our kernel
[D, 3, H E]. Start at `entries`.
"""

import pathlib

import numpy as np

from memoryformer import model
from memoryformer.convert import folders, safetensors_file, torch_file, trees
from memoryformer.errors import DataError

# Buffers that older files carry; all are functions of the config.
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def _read_qkv(config: model.ModelConfig, weight: np.ndarray) -> np.ndarray:
    """Bring [H 3 E, ..] to [.., 3, H E]."""
    shape = (config.num_heads, 3, config.head_dim, *weight.shape[1:])
    weight = np.moveaxis(weight.reshape(shape), (1, 0, 2), (-3, -2, -1))
    return weight.reshape(*weight.shape[:-2], config.embed_dim)


def _write_qkv(config: model.ModelConfig, kernel: np.ndarray) -> tuple[np.ndarray]:
    """Bring [.., 3, H E] to [H 3 E, ..]."""
    shape = (*kernel.shape[:-1], config.num_heads, config.head_dim)
    kernel = np.moveaxis(kernel.reshape(shape), (-3, -2, -1), (1, 0, 2))
    return (kernel.reshape(3 * config.embed_dim, *kernel.shape[3:]),)


def zero_biases(config: model.ModelConfig) -> dict[str, np.ndarray]:
    """Stand in for the biases of attention_bias=false."""
    widths = {"query_key_value": 3 * config.embed_dim, "dense": config.embed_dim}
    return {
        f"gpt_neox.layers.{i}.attention.{name}.bias": np.zeros(width, np.float32)
        for i in range(config.num_layers)
        for name, width in widths.items()
    }


def _norm(ours: str, theirs: str) -> list[trees.Entry]:
    return [
        trees.Entry(f"{ours}.scale", (f"{theirs}.weight",)),
        trees.Entry(f"{ours}.bias", (f"{theirs}.bias",)),
    ]


def _dense(ours: str, theirs: str) -> list[trees.Entry]:
    return [
        trees.linear(f"{ours}.kernel", f"{theirs}.weight"),
        trees.Entry(f"{ours}.bias", (f"{theirs}.bias",)),
    ]


_QKV = "attention.query_key_value"
_BLOCK = (
    *_norm("norm1", "input_layernorm"),
    *_norm("norm2", "post_attention_layernorm"),
    trees.Entry("mixer.qkv.kernel", (f"{_QKV}.weight",), _read_qkv, _write_qkv),
    trees.Entry("mixer.qkv.bias", (f"{_QKV}.bias",), _read_qkv, _write_qkv),
    *_dense("mixer.out", "attention.dense"),
    *_dense("ffn.up", "mlp.dense_h_to_4h"),
    *_dense("ffn.down", "mlp.dense_4h_to_h"),
)


def entries(config: model.ModelConfig) -> list[trees.Entry]:
    """Return the correspondence of our parameters and their tensors."""
    table = [
        trees.Entry("embed.embedding", ("gpt_neox.embed_in.weight",)),
        *_norm("final_norm", "gpt_neox.final_layer_norm"),
    ]
    for i in range(config.num_layers):
        table += trees.in_block(_BLOCK, f"blocks.{i}.", f"gpt_neox.layers.{i}.")
    if not config.tie_embeddings:
        table.append(trees.linear("head.kernel", "embed_out.weight"))
    return table


def read_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Read their tensors by name, of whichever files hold them, without buffers.

    Raises `DataError` where no file does, and for a damaged one.
    """
    return {  # a state_dict() of transformers 5 names the head otherwise
        name.replace("lm_head.", "embed_out."): tensor
        for name, tensor in _read_files(directory).items()
        if not name.endswith(_BUFFERS)
    }


def _read_files(directory: pathlib.Path) -> dict[str, np.ndarray]:
    readers = {
        "model.safetensors": lambda path: safetensors_file.read(path)[0],
        "pytorch_model.bin": torch_file.read,
    }
    for name, reader in readers.items():
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            parts = [name]
        elif index.is_file():
            weight_map = folders.read_fields(index).section("weight_map")
            names = weight_map.values.values()
            parts = sorted({folders.plain_name(n, weight_map.source) for n in names})
            if not parts:
                raise DataError(f"{weight_map.source}: names no file.")
        else:
            continue
        tensors: dict[str, np.ndarray] = {}
        for part in parts:
            tensors |= trees.named_arrays(reader(directory / part), directory / part)
        return tensors
    raise DataError(f"{directory}: holds neither {' nor '.join(readers)}.")
