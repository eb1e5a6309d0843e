"""EleutherAI's GPT-NeoX models (Pythia) as `save_pretrained` writes them <-> our dense twin.

A directory holds `config.json` and the weights: `model.safetensors`, `pytorch_model.bin`,
or either in parts with an index. Their fused projection interleaves q, k and v per head:
weight [H, 3, E, D] against our kernel [D, 3, H E]. Start at `load_gpt_neox`.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

from memoryformer import model
from memoryformer.convert import safetensors_file, torch_file, trees
from memoryformer.errors import ConfigError, DataError
from memoryformer.notation import Params

ACTIVATIONS = {  # theirs -> ours
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Buffers that older files carry; all are functions of the config.
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def load_gpt_neox(directory: str | os.PathLike) -> tuple[model.ModelConfig, Params]:
    """Read a GPT-NeoX checkpoint: (model_config, float32 params).

    Raises `ConfigError` for a variant that the dense twin cannot express, `DataError` for
    missing or damaged files.
    """
    directory = pathlib.Path(directory)
    fields = _read_json(directory / "config.json")
    config = model_config(fields, directory)
    tensors = {  # a state_dict() of transformers 5 names the head otherwise
        name.replace("lm_head.", "embed_out."): tensor
        for name, tensor in _read_weights(directory).items()
        if not name.endswith(_BUFFERS)
    }
    if config.tie_embeddings:  # some writers store the shared matrix twice
        tensors.pop("embed_out.weight", None)
    if not fields.get("attention_bias", True):
        tensors |= _zero_biases(config)
    return config, trees.read(_entries(config), tensors, config, directory)


def save_gpt_neox(
    directory: str | os.PathLike, config: model.ModelConfig, params: Params
) -> None:
    """Write the dense twin so that `GPTNeoXForCausalLM.from_pretrained` reads it."""
    fields = their_config(config)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    tensors = trees.write(_entries(config), params, config)
    safetensors_file.write(directory / "model.safetensors", tensors, {"format": "pt"})


def model_config(fields: dict[str, Any], source: Any) -> model.ModelConfig:
    """Translate their config.json; raises `ConfigError` for what we lack."""
    kind = fields.get("model_type")
    if kind != "gpt_neox":
        raise ConfigError(f"{source}: model_type={kind!r}: only 'gpt_neox' is read.")
    activation = fields.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"{source}: hidden_act={activation!r}: unsupported; known: "
            f"{', '.join(ACTIVATIONS)}."
        )
    fraction, base = _rotary(fields, source)
    width = fields["hidden_size"]
    hidden = fields.get("intermediate_size", 4 * width)
    if hidden % width:
        raise ConfigError(
            f"{source}: intermediate_size={hidden}: must be a multiple of "
            f"hidden_size={width}."
        )
    return model.ModelConfig(
        vocab_size=fields["vocab_size"],
        embed_dim=width,
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        seq_len=fields["max_position_embeddings"],
        projection="dense",
        norm="layernorm",
        norm_eps=float(fields.get("layer_norm_eps", 1e-5)),
        residual=(
            "parallel" if fields.get("use_parallel_residual", True) else "sequential"
        ),
        ffn_activation=ACTIVATIONS[activation],
        ffn_multiple=hidden // width,
        output_projection=True,
        rotary_fraction=float(fraction),
        rotary_base=float(base),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


def their_config(config: model.ModelConfig) -> dict[str, Any]:
    """Translate our config; raises `ConfigError` if it is no GPT-NeoX model."""
    wanted = {
        "mixer": "softmax",
        "projection": "dense",
        "causal": True,
        "logit_transform": "none",
        "recurrence": "none",
        "norm": "layernorm",
        "output_projection": True,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"model.{name}={getattr(config, name)!r}: a GPT-NeoX checkpoint holds "
                f"only {value!r}; export to safetensors instead."
            )
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if config.residual == "eq13" or config.ffn_activation not in activations:
        raise ConfigError(
            f"model.residual={config.residual!r}, model.ffn_activation="
            f"{config.ffn_activation!r}: a GPT-NeoX checkpoint cannot hold them."
        )
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.embed_dim * config.ffn_multiple,
        "max_position_embeddings": config.seq_len,
        "hidden_act": activations[config.ffn_activation],
        "layer_norm_eps": config.norm_eps,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        "use_parallel_residual": config.residual == "parallel",
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": True,
        "torch_dtype": "float32",
    }


def _rotary(fields: dict[str, Any], source: Any) -> tuple[float, float]:
    """(fraction, base): transformers has moved these twice."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ConfigError(
            f"{source}: rope_type={kind!r}: rescaled rotary positions are unsupported."
        )
    names = ("rotary_pct", "partial_rotary_factor")
    fraction = next((d[n] for d in (scaling, fields) for n in names if n in d), 0.25)
    names = ("rope_theta", "rotary_emb_base")
    base = next((d[n] for d in (scaling, fields) for n in names if n in d), 10_000)
    turned = int(fields["hidden_size"] // fields["num_attention_heads"] * fraction)
    if turned % 2:
        raise ConfigError(
            f"{source}: rotary_pct={fraction}: turns {turned} values of each head; "
            "only pairs are supported."
        )
    return fraction, base


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


def _zero_biases(config: model.ModelConfig) -> dict[str, np.ndarray]:
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


def _entries(config: model.ModelConfig) -> list[trees.Entry]:
    entries = [
        trees.Entry("embed.embedding", ("gpt_neox.embed_in.weight",)),
        *_norm("final_norm", "gpt_neox.final_layer_norm"),
    ]
    for i in range(config.num_layers):
        entries += trees.in_block(_BLOCK, f"blocks.{i}.", f"gpt_neox.layers.{i}.")
    if not config.tie_embeddings:
        entries.append(trees.linear("head.kernel", "embed_out.weight"))
    return entries


def _read_weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
    readers = {
        "model.safetensors": lambda path: safetensors_file.read(path)[0],
        "pytorch_model.bin": torch_file.read,
    }
    for name, reader in readers.items():
        if (directory / name).is_file():
            return dict(reader(directory / name))
        index = directory / f"{name}.index.json"
        if index.is_file():
            tensors: dict[str, np.ndarray] = {}
            for part in sorted(set(_read_json(index)["weight_map"].values())):
                tensors |= reader(directory / part)
            return tensors
    raise DataError(f"{directory}: holds neither {' nor '.join(readers)}.")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}).") from error
