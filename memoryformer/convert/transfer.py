"""Between a run's workdir and other formats, and from the Hugging Face hub.

Start at `export_run` and `import_run`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memoryformer import data
from memoryformer.convert import export, folders, gpt_neox, released
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError, DataError
from memoryformer.files import hub
from memoryformer.notation import Params
from memoryformer.runs import checkpoint, compatibility, old_configs, remote
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment
from memoryformer.training import step as step_lib

FORMATS = ("safetensors", "gpt_neox", "released")
_HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.yml", "*latest")


def export_run(
    workdir: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    step: int | None = None,
    form: str = "safetensors",
    tables: str = "float32",
) -> None:
    """Write a checkpoint of a run (None: the newest), with its tokenizer, in another format.

    `directory` must be new or empty. Raises `ConfigError` for a model that the format
    cannot hold.
    """
    check_target(workdir, directory)
    workdir = remote.copied(workdir, step, "FROM")
    run, params, facts = experiment.load(workdir, step)
    tokenizer = run_tokenizer.load(workdir, run.data, facts, run.model.vocab_size)
    if form == "gpt_neox":
        gpt_neox.save_gpt_neox(directory, run.model, params, tokenizer=tokenizer)
        return
    if form == "released":
        released.save_released(
            directory, run.model, params, step=facts["step"], tokenizer=tokenizer
        )
        return
    source = {name: facts[name] for name in ("step", "config", "data_fingerprint")}
    export.save_export(
        directory, run.model, params, tokenizer=tokenizer, tables=tables, source=source
    )


def import_run(
    directory: str | os.PathLike,
    workdir: str | os.PathLike,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Make an export the step 0 of a run, with a fresh optimizer, to evaluate or train on.

    Without `config` the run that was exported goes on; an export that comes from another
    code needs one, whose `model` and tokenizer are the export's. Raises `ConfigError` if
    they differ or if `workdir` holds anything.
    """
    if (pathlib.Path(workdir) / run_steps.FOLDER).exists():
        raise ConfigError(f"--workdir={workdir}: holds checkpoints; name a new one.")
    folders.check_free(workdir)
    model_config, params = export.load_export(directory)
    source = export.source(directory)
    if config is None and "config" not in source:
        raise ConfigError(
            f"{directory}: does not say how to train or evaluate it; give --config=FILE."
        )
    stored = old_configs.upgraded(source.section("config").values)
    run = experiment.resolve(stored if config is None else config)
    differences = compatibility.drift(
        *({"model": dataclasses.asdict(m)} for m in (model_config, run.model))
    )
    for name, exported, configured in differences:
        if name not in experiment.may_change():
            raise ConfigError(
                f"--config: {name}={configured!r}, but {directory} has {exported!r}."
            )
    if config is None:
        data_fingerprint = source.text("data_fingerprint")
        tokenizer = export.own_tokenizer(directory, model_config.vocab_size)
    else:
        dataset = data.load(run.data, expected_vocab_size=run.model.vocab_size)
        data_fingerprint, tokenizer = dataset.fingerprint, dataset.tokenizer
        theirs = export.tokenizer_of(directory)
        run_tokenizer.check_same_tokens(theirs, tokenizer, directory)
    begin_run(workdir, run, params, data_fingerprint, tokenizer)


def check_target(workdir: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Raise `ConfigError` unless `directory` is new or empty, and none of a run's checkpoints."""
    target = folders.check_free(directory)
    checkpoints = pathlib.Path(workdir, run_steps.FOLDER).resolve()
    if target.resolve().is_relative_to(checkpoints):
        raise ConfigError(f"{target}: lies among the run's checkpoints; name another.")


def begin_run(
    workdir: str | os.PathLike,
    run: experiment.Experiment,
    params: Params,
    data_fingerprint: str,
    tokenizer: data.Tokenizer,
) -> None:
    """Write `params` as step 0 of a run, with a fresh optimizer."""
    state = step_lib.new_state(run, jax.tree.map(jnp.asarray, params))
    with checkpoint.Checkpointer(
        workdir,
        run.checkpoint,
        run_config=experiment.as_dict(run),
        data_fingerprint=data_fingerprint,
        tokenizer=run_tokenizer.identity(tokenizer),
    ) as checkpointer:
        run_tokenizer.keep(workdir, tokenizer, begun=False)
        checkpointer.save(0, state, wait=True)
        checkpointer.amend(0, imported=True)  # no update was made under this config


def fetch(source: str, revision: str = "") -> pathlib.Path:
    """Return a local directory: `source` itself, or what `hub:owner/name` names.

    The hub's cache is used where it holds the files. Raises `ConfigError` without the
    package huggingface_hub, `DataError` if they cannot be had.
    """
    if not source.startswith("hub:"):
        path = pathlib.Path(source)
        if not path.is_dir():
            raise DataError(f"{source}: there is no such directory.")
        return path
    return hub.fetch(
        source,
        source.removeprefix("hub:"),
        _HUB_FILES,
        revision=revision,
        instead="download the files and name their directory",
    )
