"""Checkpoints of the authors' released code (GPT-NeoX with memory modules) <-> ours.

    DIR/latest                              the name of the newest global_stepN
    DIR/global_stepN/configs/*.yml          the run's configuration; or in a folder around
    DIR/global_stepN/mp_rank_00_model_states.pt      {'module': {'sequential.I.NAME': ..}}
    or, trained with pipeline stages, beside it
    DIR/global_stepN/layer_II-model_00-model_states.pt            {'NAME': ..}

The files and the tensors in them are those of `released_tensors`. Start at `load_released`.
"""

import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import yaml

from memoryformer import model
from memoryformer.convert import folders, released_tensors, torch_file, trees
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.errors import ConfigError, DataError
from memoryformer.notation import Params

EXTRA_BITS = 2  # fixed in the released code
_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


def load_released(
    directory: str | os.PathLike, config_file: str | os.PathLike = ""
) -> tuple[model.ModelConfig, Params]:
    """Read a checkpoint of the released code: (model_config, float32 params).

    `directory` is a `global_stepN` or the folder around it; `config_file` is the run's
    yml, by default what the checkpoint carries. Raises `ConfigError` for a variant that
    we lack, `DataError` for missing or damaged files.
    """
    directory = _step_directory(pathlib.Path(directory))
    pieces = released_tensors.read_pieces(directory)
    fields = _read_config(directory, config_file)
    config = model_config(fields, pieces, directory)
    tensors = {
        f"{index}.{name}": tensor
        for index, piece in pieces.items()
        for name, tensor in piece.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    return config, trees.read(
        released_tensors.entries(config), tensors, config, directory
    )


def save_released(
    directory: str | os.PathLike,
    config: model.ModelConfig,
    params: Params,
    *,
    step: int = 0,
    dtype: str = "float16",
    layer_files: bool = True,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> None:
    """Write `DIR/global_step{step}` as the released code does, and `DIR/latest`.

    float16, theirs, rounds: exact for what was float16 before; 'float32' is exact.
    `layer_files=False` puts everything into one file. DIR must be new or empty. Raises
    `ConfigError` if it is not and for a model that the released code cannot run,
    `DataError` for values beyond float16.
    """
    fields = their_config(config)
    entries = released_tensors.entries(config)
    pieces: dict[int, dict[str, np.ndarray]] = {}
    for name, tensor in trees.write(entries, params, config).items():
        index, _, name = name.partition(".")
        with np.errstate(over="ignore"):
            narrow = tensor.astype(dtype)
        if not np.isfinite(narrow).all():
            raise DataError(f"{name} of layer {index}: not finite in {dtype}.")
        pieces.setdefault(int(index), {})[name] = narrow

    states: dict[str, Any] = {
        "module": None,
        "iteration": step,
        "args": {
            "num_layers": config.num_layers,
            "hidden_size": config.embed_dim,
            "num_attention_heads": config.num_heads,
            "max_position_embeddings": config.seq_len,
            "padded_vocab_size": config.vocab_size,
            "model_parallel_size": 1,
        },
    }
    with folders.fill(directory, last="latest") as folder:
        target = folder / f"global_step{step}"
        (target / "configs").mkdir(parents=True)
        yml = json.dumps(fields, indent=2)
        (target / "configs" / "memoryformer.yml").write_text(yml, encoding="utf-8")
        if layer_files:
            for layer, piece in pieces.items():
                name = f"layer_{layer:02d}-model_00-model_states.pt"
                torch_file.write(target / name, piece)
        else:
            states["module"] = {
                f"sequential.{index}.{name}": tensor
                for index, piece in sorted(pieces.items())
                for name, tensor in piece.items()
            }
        torch_file.write(target / released_tensors.STATES, states)
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer.json")
        (folder / "latest").write_text(target.name, encoding="utf-8")


def model_config(
    fields: folders.Fields, pieces: dict[int, dict[str, np.ndarray]], source: Any
) -> model.ModelConfig:
    """Translate their yml; the sizes come from the tensors themselves."""
    memory = fields.section("attn_memory_config")
    inside = {f"attn_memory_config.{k}": v for k, v in memory.values.items()}
    settings = fields.values | inside
    for name, (value, default) in _REQUIRED.items():
        if settings.get(name, default) != value:
            raise ConfigError(
                f"{source}: {name}={settings.get(name, default)!r:.60}: only {value!r} is "
                "supported."
            )
    embedding = pieces.get(0, {}).get("word_embeddings.weight")
    if embedding is None or embedding.ndim != 2:
        raise DataError(f"{source}: lacks word_embeddings.weight [V, D].")
    blocks = [p for p in pieces.values() if "attention.query_proj.tables" in p]
    if not blocks:
        raise DataError(f"{source}: lacks attention.query_proj.tables.")
    vocab_size, embed_dim = embedding.shape
    longest = "max_position_embeddings"
    return model.ModelConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=len(blocks),
        num_heads=fields.integer("num_attention_heads"),
        seq_len=fields.integer(longest if longest in fields else "seq_length"),
        code_bits=memory.integer("code_length"),
        projection_options={"extra_bits": EXTRA_BITS, "memory_bias": True},
        score="l1_softmax",
        norm_eps=fields.number("rms_norm_epsilon", 1e-8),
        rotary_fraction=fields.number("rotary_pct", 1.0),
        rotary_base=fields.number("rotary_emb_base", 10_000.0),
    )


def their_config(config: model.ModelConfig) -> dict[str, Any]:
    """Translate our config; raises `ConfigError` for what the released code cannot run."""
    wanted = {
        "mixer": "softmax",
        "projection": "memory",
        "causal": True,
        "mixer_options.logit_transform": "none",
        "recurrence": "none",
        "projection_options.extra_bits": EXTRA_BITS,
        "score": "l1_softmax",
        "projection_options.temperature": 1.0,
        "projection_options.memory_bias": True,
        "projection_options.rows_read": 1,
        "projection_options.ngram_rows": 0,
        "projection_options.token_rows": False,
        "norm": "rmsnorm",
        "residual": "sequential",
        "ffn_activation": "none",
        "output_projection": False,
        "tie_embeddings": False,
    }
    trees.check_holds(config, wanted, "the released code has")
    sizes = {"ffn_num_table": config.num_tables, "code_length": config.code_bits}
    both = sizes | {"remove_projection": True, "block_size": 64, "act_fn": "silu"}
    both |= {"projection_type": "dense", "learn_weight": False}
    width = config.embed_dim
    return {
        "num_layers": config.num_layers,
        "hidden_size": width,
        "num_attention_heads": config.num_heads,
        "seq_length": config.seq_len,
        "max_position_embeddings": config.seq_len,
        "pos_emb": "rotary",
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        "no_weight_tying": True,
        "gpt_j_residual": False,
        "norm": "rmsnorm",
        "rms_norm_epsilon": config.norm_eps,
        "attn_memory_config": both
        | {"fc_qkv": False, "shared_projection": False, "del_dense": True}
        | {"value_size": width, "dense_size": width},
        "memory_config": both
        | {"hidden_size": width, "output_size": width, "act_pos": "none"},
        "mlp_type": "MemoryBlock",
        "double_mlp_table": True,
        "mlp_expand_type": "extra_bit",
        "zero_pad_residual": True,
        "repeat_residual": False,
        "aux_loss": False,
    }


# name -> (the value that we read, the default of GPT-NeoX or the released code)
_REQUIRED = {
    "norm": ("rmsnorm", "layernorm"),
    "pos_emb": ("rotary", "learned"),
    "gpt_j_residual": (False, False),
    "no_weight_tying": (True, False),
    "mlp_type": ("MemoryBlock", "regular"),
    "double_mlp_table": (True, False),
    "mlp_expand_type": ("extra_bit", "extra_bit"),
    "attn_memory_config.fc_qkv": (False, False),
    "attn_memory_config.remove_projection": (True, False),
    "attn_memory_config.shared_projection": (False, False),
    "attn_memory_config.del_dense": (True, False),
}


def _step_directory(directory: pathlib.Path) -> pathlib.Path:
    latest = directory / "latest"
    if latest.is_file():
        try:
            name = latest.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{latest}: cannot be read ({error}).") from error
        return directory / folders.plain_name(name, latest)
    if not directory.is_dir():
        raise DataError(f"{directory}: there is no such directory.")
    return directory


def _read_config(directory: pathlib.Path, config_file: Any) -> folders.Fields:
    files = [pathlib.Path(config_file)] if config_file else []
    files = files or sorted(directory.glob("configs/*.yml"))
    for folder in (directory, directory.parent):
        files = files or sorted(folder.glob("*.yml"))
    if not files:
        raise ConfigError(
            f"{directory}: carries no configs/*.yml; name the run's yml (heads and "
            "rotary_pct are in no tensor)."
        )
    fields: dict[str, Any] = {}
    for file in files:
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{file}: cannot be read ({reason}).") from error
        values = folders.Fields(loaded, file).values
        fields |= {
            str(key).replace("-", "_"): _number_or_same(value)
            for key, value in values.items()
        }
    return folders.Fields(fields, directory)


def _number_or_same(value: Any) -> Any:
    """A number that YAML 1.1 takes for a string, 1e-8 for want of a dot, as a number."""
    number = isinstance(value, str) and _EXPONENT.fullmatch(value)
    return float(value) if number else value
