"""Our own portable form: one safetensors file, config.json, tokenizer and a reader.

    DIR/model.safetensors   parameters by path, 'blocks.0.mixer.qkv.tables', ..
    DIR/config.json         the model, how tables are stored, where it comes from
    DIR/tokenizer.json      if the model has one
    DIR/reader.py           a reference implementation in one file, numpy only

Tables may be stored narrower; everything else stays float32:

    tables      bytes   error of an entry t of row r
    float32     4       none
    bfloat16    2       |t| / 256, and none if t was bfloat16 before
    int8        1       max|r| / 254: one scale max|r| / 127 for each row [F]

so a memory layer's output moves by at most sum_k s(z_k) * the error of its row k. Start at
`save_export` and `load_export`.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from memoryformer import config as config_lib
from memoryformer import data, model
from memoryformer.convert import folders, reference_reader, safetensors_file, trees
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.errors import ConfigError, DataError
from memoryformer.model import older
from memoryformer.notation import Params
from memoryformer.ops.lookup import narrow
from memoryformer.runs import old_configs

TABLE_TYPES = ("float32", "bfloat16", "int8")
SCALE = ".scale_of_rows"
_FORMAT = {"format": "memoryformer", "version": 1}


def save_export(
    directory: str | os.PathLike,
    config: model.ModelConfig,
    params: Params,
    *,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
    tables: str = "float32",
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write `params` to `directory`, which must be new or empty.

    `source` says where the model comes from and is kept as it is in config.json. Raises
    `ConfigError` for an unknown table type and for a directory that holds anything,
    `DataError` for parameters of another model.
    """
    config_lib.choose(tables, TABLE_TYPES, "--tables")
    trees.check(config, params, pathlib.Path(directory))
    arrays: dict[str, np.ndarray] = {}
    for path, array in trees.flatten(params).items():
        if path.split(".")[-1] == "tables":
            arrays |= _stored(path, array, tables)
        else:
            arrays[path] = array
    fields = _FORMAT | {
        "model": dataclasses.asdict(config),
        "tables": tables,
        "tokenizer": "tokenizer.json" if tokenizer else "",
        "tokenizer_sha256": tokenizer.fingerprint if tokenizer else "",
        "end_token": tokenizer.end_token if tokenizer else "",
        "source": dict(source or {}),
    }
    with folders.fill(directory, last="config.json") as folder:
        safetensors_file.write(folder / "model.safetensors", arrays, {"format": "np"})
        if tokenizer:
            tokenizer.save(folder / "tokenizer.json")
        shutil.copyfile(reference_reader.__file__, folder / "reader.py")
        text = json.dumps(fields, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def load_export(directory: str | os.PathLike) -> tuple[model.ModelConfig, Params]:
    """Read what `save_export` wrote: (model_config, float32 params).

    Raises `DataError` for missing or damaged files.
    """
    directory = pathlib.Path(directory)
    fields = _read_fields(directory)
    stored = fields.section("model").values
    config = model.ModelConfig.from_config(old_configs.upgraded_model(stored))
    retired = old_configs.retired({"model": stored})
    arrays, _ = safetensors_file.read(directory / "model.safetensors")
    flat = {
        path: _widen(path, arrays)
        for path in sorted(arrays)
        if not path.endswith(SCALE)
    }
    if config.num_layers > len(flat):  # a model of so many might never be laid out
        raise DataError(
            f"{directory}: model.num_layers={config.num_layers}, but there are "
            f"{len(flat)} parameters."
        )
    params = trees.unflatten(flat)
    drawn = jax.tree.map(np.asarray, older.random_features(config, retired))
    params = model.joined(params, drawn)
    trees.check(config, params, directory)
    return config, params


def source(directory: str | os.PathLike) -> folders.Fields:
    """Where an export says that its model comes from."""
    return _read_fields(directory).section("source")


def load_tokenizer(
    directory: str | os.PathLike, end_token: str = ""
) -> tokenizer_lib.Tokenizer | None:
    """Read the tokenizer beside a model, or None where there is none.

    end_token: the token that ends a document, '' for the first of the known names.
    """
    path = pathlib.Path(directory) / "tokenizer.json"
    return tokenizer_lib.load(str(path), end_token) if path.is_file() else None


def tokenizer_of(directory: str | os.PathLike) -> tokenizer_lib.Tokenizer | None:
    """Read the tokenizer that an export was written with, or that was put there later.

    None where there is none. Raises `DataError` if another was put in its place.
    """
    fields = _read_fields(directory)
    end_token, written = (
        fields.text("end_token", ""),
        fields.text("tokenizer_sha256", ""),
    )
    path = pathlib.Path(directory) / "tokenizer.json"
    if written and path.is_file():
        return tokenizer_lib.load_recorded(path, written, end_token, "this export")
    return load_tokenizer(directory, end_token)


def own_tokenizer(
    directory: str | os.PathLike, vocab_size: int
) -> tokenizer_lib.Tokenizer:
    """`tokenizer_of`; raises `ConfigError` if there is none, or it is larger than V."""
    tokenizer = tokenizer_of(directory)
    if tokenizer is None:
        raise ConfigError(f"--export={directory}: holds no tokenizer.json; add one.")
    data.check_vocab_size(tokenizer.vocab_size, vocab_size, tokenizer.name)
    return tokenizer


def _read_fields(directory: str | os.PathLike) -> folders.Fields:
    fields = folders.read_fields(pathlib.Path(directory) / "config.json")
    if fields.values.get("format") != _FORMAT["format"]:
        raise ConfigError(f"{fields.source}: not an export of this package.")
    version = fields.integer("version")
    if version != _FORMAT["version"]:
        raise ConfigError(
            f"{fields.source}: version={version}: this code reads version "
            f"{_FORMAT['version']}."
        )
    return fields


def _stored(path: str, table: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    if kind == "bfloat16":
        return {path: table.astype(ml_dtypes.bfloat16)}
    if kind == "float32":
        return {path: table}
    values, scales = narrow.round_rows(table)
    return {path: values, path + SCALE: scales}


def _widen(path: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    array = arrays[path]
    if array.dtype == np.int8:
        scale = arrays.get(path + SCALE)
        if scale is None or scale.shape != array.shape[:-1]:
            raise DataError(f"{path}: lacks {path + SCALE}, one scale for each row.")
        return array * np.asarray(scale, np.float32)[..., None]
    return np.asarray(array, np.float32)
