"""What is converted (a run, an export or a GPT-NeoX directory), and the run that comes out.

Start at `load`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from memoryformer import data
from memoryformer import model as model_lib
from memoryformer.convert import export, folders, gpt_neox
from memoryformer.convert.memorise.activations import Subject
from memoryformer.convert.memorise.options import Options
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError, DataError
from memoryformer.model import parts, token_rows
from memoryformer.runs import old_configs
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment


class Source(NamedTuple):
    """A model, the experiment that it goes on in, its text."""

    run: experiment.Experiment
    subject: Subject
    dataset: data.Dataset


def load(directory: pathlib.Path, config: Mapping[str, Any] | None) -> Source:
    """Read a model; `config` says on what text, and how it will be trained.

    A run and its export say both themselves; `config` wins. Its `model` is not looked at.
    Raises `DataError` for a directory without a model, `ConfigError` for another tokenizer.
    """
    if (directory / run_steps.FOLDER).is_dir():
        run, params, facts = experiment.load(directory)
        if config is None:
            vocab_size = run.model.vocab_size
            dataset = run_tokenizer.dataset(directory, run.data, facts, vocab_size)
            return _source(run, params, dataset)
        theirs = run_tokenizer.load(directory, run.data, facts, run.model.vocab_size)
        return _with_config(run.model, params, config, theirs, directory)
    if not (directory / "config.json").is_file():
        raise DataError(
            f"{directory}: no run, no export and no GPT-NeoX model (no config.json)."
        )
    if "model_type" in folders.read_fields(directory / "config.json"):
        model, params = gpt_neox.load_gpt_neox(directory)
        end_token = gpt_neox.end_token(directory)
        tokenizer = export.load_tokenizer(directory, end_token)
        return _with_config(model, params, config, tokenizer, directory)
    model, params = export.load_export(directory)
    stored = export.source(directory)
    if config is None and "config" in stored:
        config = old_configs.upgraded(stored.section("config").values)
    tokenizer = export.tokenizer_of(directory)
    return _with_config(model, params, config, tokenizer, directory)


def _with_config(
    model: model_lib.ModelConfig, params, config, tokenizer, directory
) -> Source:
    if config is None:
        raise ConfigError(
            f"{directory}: does not say which text to use; give --config=FILE, whose data "
            "and train sections are taken."
        )
    run = experiment.resolve({**config, "model": dataclasses.asdict(model)})
    dataset = data.load(run.data, expected_vocab_size=model.vocab_size)
    run_tokenizer.check_same_tokens(tokenizer, dataset.tokenizer, directory)
    return _source(run, params, dataset)


def _source(run, params, dataset) -> Source:
    return Source(run, Subject(run.model, jax.tree.map(np.asarray, params)), dataset)


def prepared(subject: Subject, options: Options) -> Subject:
    """The model with the score and the bias of the layers to come."""
    config, params = subject
    token_rows.refuse(config, "memorise")
    blocks = {i: parts.of_layer(config, i) for i in range(config.num_layers)}
    mixed = parts.mixed(config, blocks)
    if not parts.has_tables(config):
        fields = dataclasses.asdict(mixed.projection_options) | {"memory_bias": True}
        mixed = dataclasses.replace(
            mixed, score=options.score, projection_options=fields
        )
        return Subject(mixed, params)
    parts.check_one_row(config, "memorise")
    biased = config.projection_options.memory_bias
    if not biased or config.score != options.score:
        raise ConfigError(
            f"--score={options.score}: the model has memory layers with model.score="
            f"{config.score!r} and memory_bias={biased}; those to come need the same "
            "score, and a bias."
        )
    return Subject(mixed, params)
