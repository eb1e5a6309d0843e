"""The teacher of a run, `train.teacher`: a trained model whose outputs the student learns.

    python train.py --config=FILE --workdir=DIR --config.train.teacher=RUN
        [--config.train.teacher_options.{temperature,weight,hidden}=..]

The objective is that of `model.distillation`. A teacher's parameters are an input of the step: they are
neither trained nor saved, lie over the devices as a student's would, and its tables are kept
in the type that they are read in. Start at `load`.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from memoryformer import accounting, data
from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError, StorageError
from memoryformer.model import ModelConfig, implementations, mixers
from memoryformer.notation import Params
from memoryformer.runs import remote
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment


class Teacher(NamedTuple):
    """A teacher, as a run needs it.

    model: to be run in the student's type.  params: host arrays, tables as they are read.
    fingerprint: SHA-256 of all parameters as they are stored.
    """

    model: ModelConfig
    params: Params
    fingerprint: str


def load(run: experiment.Experiment, tokenizer: data.Tokenizer) -> Teacher | None:
    """Read the newest step of the teacher of a run; None for a run without one.

    Raises `ConfigError` for a teacher of other tokens, or of shorter rows, `StorageError` for
    a folder without a whole checkpoint.
    """
    if not run.train.teacher:
        return None
    directory = _directory(run)
    stored, params, facts = experiment.load(directory)
    config = _as_run(stored.model, run)
    theirs = run_tokenizer.load(directory, stored.data, facts, stored.model.vocab_size)
    run_tokenizer.check_same_tokens(theirs, tokenizer, directory)
    read = jax.tree.map(np.asarray, model_lib.with_tables_as_read(config, params))
    return Teacher(config, read, model_lib.fingerprint(params))


def config_of(run: experiment.Experiment) -> ModelConfig | None:
    """Return the teacher's model alone, as `load` does: what is compiled depends on no more."""
    if not run.train.teacher:
        return None
    facts = run_steps.facts(_directory(run))
    stored = experiment.resolve(experiment.complete(facts["config"]))
    return _as_run(stored.model, run)


def placed(teacher: Teacher | None, sharding: sharding_lib.Sharding) -> list[Params]:
    """Put a teacher's parameters onto the devices: what the train step takes beside the batch."""
    if teacher is None:
        return []
    return [sharding.put(teacher.params, specs(teacher.model, sharding))]


def specs(config: ModelConfig, sharding: sharding_lib.Sharding) -> Any:
    """Return how the parameters of a teacher lie: as those of a student would.

    Raises `ConfigError` where they cannot.
    """
    return model_lib.partition_specs(config, sharding)


def abstract(config: ModelConfig | None, sharding: sharding_lib.Sharding) -> list[Any]:
    """`placed` of a teacher that is not there: shapes, types and places."""
    if config is None:
        return []
    shapes = jax.eval_shape(
        lambda: model_lib.with_tables_as_read(config, model_lib.init(config))
    )
    places = sharding.named(specs(config, sharding))
    return [
        jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            shapes,
            places,
            is_leaf=lambda x: x is None,
        )
    ]


def training_flops_per_token(run: experiment.Experiment) -> int:
    """`accounting` of the student, and the teacher's forward pass."""
    flops, teacher = (
        accounting.count(run.model).training_flops_per_token,
        config_of(run),
    )
    return flops + (accounting.count(teacher).flops_per_token if teacher else 0)


def striped(run: experiment.Experiment) -> bool:
    """Whether rows may be dealt out over `sequence`: whether all mixers take any order."""
    models = filter(None, (run.model, config_of(run)))
    return all(mixers.takes_any_order(model) for model in models)


def _directory(run: experiment.Experiment) -> pathlib.Path:
    """The teacher's folder, which must be that of a run."""
    name = run.train.teacher
    directory = remote.copied(name, name="train.teacher")
    if (directory / run_steps.FOLDER).is_dir():
        return directory
    if (directory / "model.safetensors").is_file():
        reason = "is an export; make a run of it: python -m memoryformer.convert import"
    else:
        reason = "is no folder of a run; if it has moved, name where it lies now"
    raise StorageError(f"train.teacher={name!r}: {reason}.")


def _as_run(config: ModelConfig, run: experiment.Experiment) -> ModelConfig:
    """The teacher's config in the type, and with the lookups, of the student's."""
    model, options = run.model, run.train.teacher_options
    where = f"train.teacher={run.train.teacher!r}"
    if config.vocab_size != model.vocab_size:
        raise ConfigError(
            f"{where}: has {config.vocab_size} tokens, and model.vocab_size="
            f"{model.vocab_size}; both must be of one vocabulary."
        )
    if config.seq_len < model.seq_len:
        raise ConfigError(
            f"{where}: was trained on rows of {config.seq_len} tokens, and model.seq_len="
            f"{model.seq_len}; use rows of {config.seq_len} tokens or fewer."
        )
    if options.hidden and config.embed_dim != model.embed_dim:
        raise ConfigError(
            f"train.teacher_options.hidden={options.hidden}: the teacher's width is "
            f"{config.embed_dim}, and model.embed_dim={model.embed_dim}; use hidden=0."
        )
    config = implementations.readable(config)
    return dataclasses.replace(
        config, dtype=model.dtype, lookup=model.lookup, remat="none"
    )
