"""EleutherAI's GPT-NeoX models (Pythia) as `save_pretrained` writes them <-> our dense twin.

A directory holds `config.json` and the weights: `model.safetensors`, `pytorch_model.bin`,
or either in parts with an index (`gpt_neox_tensors`). Start at `load_gpt_neox`.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np
import tokenizers

from memoryformer import model
from memoryformer.convert import folders, gpt_neox_tensors, safetensors_file, trees
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.errors import ConfigError, DataError
from memoryformer.notation import Params

ACTIVATIONS = {  # theirs -> ours
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def load_gpt_neox(directory: str | os.PathLike) -> tuple[model.ModelConfig, Params]:
    """Read a GPT-NeoX checkpoint: (model_config, float32 params).

    Raises `ConfigError` for a variant that the dense twin cannot express, `DataError` for
    missing or damaged files.
    """
    directory = pathlib.Path(directory)
    fields = folders.read_fields(directory / "config.json")
    config = model_config(fields)
    tensors = gpt_neox_tensors.read_tensors(directory)
    _check_size(config, tensors, directory)
    if config.tie_embeddings:  # some writers store the shared matrix twice
        tensors.pop("embed_out.weight", None)
    if not fields.flag("attention_bias", True):
        tensors |= gpt_neox_tensors.zero_biases(config)
    entries = gpt_neox_tensors.entries(config)
    return config, trees.read(entries, tensors, config, directory)


def save_gpt_neox(
    directory: str | os.PathLike,
    config: model.ModelConfig,
    params: Params,
    *,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> None:
    """Write the dense twin so that `GPTNeoXForCausalLM.from_pretrained` reads it.

    With a `tokenizer`, `AutoTokenizer` reads that: it puts the end-of-document token
    before a prompt, as documents begin here, and `generate` stops at it. `directory` must
    be new or empty. Raises `ConfigError` if it is not, and for a model that they lack.
    """
    fields = their_config(config, None if tokenizer is None else tokenizer.eot_id)
    tensors = trees.write(gpt_neox_tensors.entries(config), params, config)
    with folders.fill(directory, last="config.json") as folder:
        safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
        if tokenizer is not None:
            _save_tokenizer(folder, tokenizer, config.seq_len)
        _write_json(folder / "config.json", fields)


def end_token(directory: str | os.PathLike) -> str:
    """The token that ends a document, as the files beside the weights say; '' if none does.

    tokenizer_config.json names it, else config.json numbers it: an added token, for the
    number that transformers puts there by default is that of some piece of text.
    """
    directory = pathlib.Path(directory)
    if (path := directory / "tokenizer_config.json").is_file():
        fields = folders.read_fields(path)
        if isinstance(fields.values.get("eos_token"), dict):
            return fields.section("eos_token").text("content")
        if "eos_token" in fields:
            return fields.text("eos_token")
    if not (path := directory / "tokenizer.json").is_file():
        return ""
    number = folders.read_fields(directory / "config.json").values.get("eos_token_id")
    added = folders.read_fields(path).values.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and number is not None and token.get("id") == number:
            return folders.Fields(token, f"{path}: added_tokens").text("content")
    return ""


def model_config(fields: folders.Fields) -> model.ModelConfig:
    """Translate their config.json; raises `ConfigError` for what we lack."""
    source = fields.source
    kind = fields.text("model_type", "(none)")
    if kind != "gpt_neox":
        raise ConfigError(f"{source}: model_type={kind!r}: only 'gpt_neox' is read.")
    if "quantization_config" in fields:
        raise ConfigError(
            f"{source}: quantization_config: quantised weights are not read."
        )
    activation = fields.text("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"{source}: hidden_act={activation!r}: unsupported; known: "
            f"{', '.join(ACTIVATIONS)}."
        )
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    hidden = fields.integer("intermediate_size", 4 * width)
    if hidden % width:
        raise ConfigError(
            f"{source}: intermediate_size={hidden}: must be a multiple of "
            f"hidden_size={width}."
        )
    if width % heads:
        raise ConfigError(
            f"{source}: hidden_size={width}: must be a multiple of "
            f"num_attention_heads={heads}."
        )
    fraction, base = _rotary(fields, width // heads)
    parallel = fields.flag("use_parallel_residual", True)
    return model.ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        embed_dim=width,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        seq_len=fields.integer("max_position_embeddings"),
        projection="dense",
        projection_options={"ffn_multiple": hidden // width},
        norm="layernorm",
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        residual="parallel" if parallel else "sequential",
        ffn_activation=ACTIVATIONS[activation],
        output_projection=True,
        rotary_fraction=fraction,
        rotary_base=base,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def their_config(config: model.ModelConfig, eot_id: int | None) -> dict[str, Any]:
    """Translate our config; raises `ConfigError` if it is no GPT-NeoX model.

    Documents begin and end with the token `eot_id`; without one, nothing ends a text.
    """
    wanted = {
        "mixer": "softmax",
        "projection": "dense",
        "causal": True,
        "mixer_options.logit_transform": "none",
        "recurrence": "none",
        "norm": "layernorm",
        "output_projection": True,
        "projection_options.ngram_rows": 0,
        "projection_options.token_rows": False,
    }
    trees.check_holds(config, wanted, "a GPT-NeoX checkpoint holds")
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if config.residual == "eq13" or config.ffn_activation not in activations:
        raise ConfigError(
            f"model.residual={config.residual!r}, model.ffn_activation="
            f"{config.ffn_activation!r}: a GPT-NeoX checkpoint cannot hold them."
        )
    if int(config.head_dim * config.rotary_fraction) % 2:
        raise ConfigError(
            f"model.rotary_fraction={config.rotary_fraction}: turns an odd number of the "
            f"{config.head_dim} values of each head, which a GPT-NeoX checkpoint cannot."
        )
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.embed_dim * config.projection_options.ffn_multiple,
        "max_position_embeddings": config.seq_len,
        "hidden_act": activations[config.ffn_activation],
        "layer_norm_eps": config.norm_eps,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        "use_parallel_residual": config.residual == "parallel",
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": True,
        "torch_dtype": "float32",
        "bos_token_id": eot_id,  # their defaults are 0 and 2, whatever the vocabulary
        "eos_token_id": eot_id,
    }


def _rotary(fields: folders.Fields, head_dim: int) -> tuple[float, float]:
    """(fraction, base): transformers has moved these twice."""
    section = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    scaling = fields.section(section)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind != "default":
        raise ConfigError(
            f"{fields.source}: rope_type={kind!r}: rescaled rotary positions are "
            "unsupported."
        )

    def first(names: tuple[str, str], default: float) -> float:
        places = ((where, n) for where in (scaling, fields) for n in names)
        numbers = (where.number(n) for where, n in places if n in where)
        return next(numbers, default)

    fraction = first(("rotary_pct", "partial_rotary_factor"), 0.25)
    base = first(("rope_theta", "rotary_emb_base"), 10_000.0)
    if fraction > 1:
        raise ConfigError(f"{fields.source}: rotary_pct={fraction}: must be at most 1.")
    turned = int(head_dim * fraction)
    if turned % 2:
        raise ConfigError(
            f"{fields.source}: rotary_pct={fraction}: turns {turned} values of each "
            "head; only pairs are supported."
        )
    return fraction, base


def _check_size(
    config: model.ModelConfig, tensors: dict[str, np.ndarray], directory: pathlib.Path
) -> None:
    """Raise `DataError` for a config of far more than there is: it may never end."""
    if config.num_layers > len(tensors):
        raise DataError(
            f"{directory}: num_hidden_layers={config.num_layers}, but the weights hold "
            f"{len(tensors)} tensors."
        )
    wanted = (config.vocab_size, config.embed_dim)
    embedding = tensors.get("gpt_neox.embed_in.weight")
    if embedding is not None and embedding.shape != wanted:
        raise DataError(
            f"{directory}: 'gpt_neox.embed_in.weight' is {embedding.shape}, the config's "
            f"vocab_size and hidden_size are {wanted}."
        )


def _save_tokenizer(folder, tokenizer, seq_len) -> None:
    """tokenizer.json and what transformers wants beside it."""
    end, eot_id = tokenizer.end_token, tokenizer.eot_id
    # In a template a token's own name could hold a blank, a colon or a `$`.
    begin = tokenizers.processors.TemplateProcessing(
        single="END $A",
        pair="END $A END $B",
        special_tokens=[{"id": "END", "ids": [eot_id], "tokens": [end]}],
    )
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.spec))
    theirs.post_processor = begin
    theirs.save(str(folder / "tokenizer.json"), pretty=False)
    ids = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    names = {"bos_token": end, "eos_token": end, "pad_token": end}
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # as here: text that spells one is text
    }
    _write_json(folder / "tokenizer_config.json", options | names)
    _write_json(folder / "generation_config.json", {"do_sample": False} | ids)


def _write_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
