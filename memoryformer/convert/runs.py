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

from memoryformer import checkpoint, data, experiment, mixers, trainer
from memoryformer.convert import export, gpt_neox, released
from memoryformer.errors import ConfigError, DataError

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
    """Write a checkpoint of a run (None: the newest) in another format.

    Raises `ConfigError` for a model that the format cannot hold.
    """
    run, params, facts = experiment.load(workdir, step)
    if form == "gpt_neox":
        gpt_neox.save_gpt_neox(directory, run.model, params)
        return
    if form == "released":
        released.save_released(directory, run.model, params, step=facts["step"])
        return
    source = {name: facts[name] for name in ("step", "config", "data_fingerprint")}
    dataset = data.open(run.data, expected_vocab_size=run.model.vocab_size)
    export.save_export(
        directory,
        run.model,
        params,
        tokenizer=dataset.tokenizer,
        tables=tables,
        source=source,
    )


def import_run(
    directory: str | os.PathLike,
    workdir: str | os.PathLike,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Make an export the step 0 of a run, with a fresh optimizer, to evaluate or train on.

    Without `config` the run that was exported goes on; an export that comes from another
    code needs one, whose `model` is the export's. Raises `ConfigError` if they differ or
    if `workdir` holds a run already.
    """
    model_config, params = export.load_export(directory)
    source = export.read_config(directory)["source"]
    if config is None and "config" not in source:
        raise ConfigError(
            f"{directory}: does not say how to train or evaluate it; give --config=FILE."
        )
    run = experiment.resolve(source["config"] if config is None else config)
    if config is None:  # what is random at its step 0 is what the export has
        draw = {"performer_draw": model_config.performer_draw}
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, **draw))
    begun = mixers.with_draw(run.model, run.train.seed, 0)
    fields = vars(model_config)
    free = {name.removeprefix("model.") for name in experiment.may_change()}
    differing = [n for n in fields if n not in free and fields[n] != getattr(begun, n)]
    if differing:
        name = differing[0]
        raise ConfigError(
            f"--config: model.{name}={getattr(begun, name)!r}, but {directory} has "
            f"{fields[name]!r}."
        )
    if config is None:
        data_fingerprint = source["data_fingerprint"]
    else:
        dataset = data.open(run.data, expected_vocab_size=run.model.vocab_size)
        data_fingerprint = dataset.fingerprint
    if (pathlib.Path(workdir) / checkpoint.FOLDER).exists():
        raise ConfigError(f"--workdir={workdir}: holds checkpoints; name a new one.")
    state = trainer.new_state(run, jax.tree.map(jnp.asarray, params))
    with checkpoint.Checkpointer(
        workdir,
        run.checkpoint,
        run_config=experiment.as_dict(run),
        data_fingerprint=data_fingerprint,
    ) as checkpointer:
        checkpointer.save(0, state, wait=True)


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
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ConfigError(
            f"{source}: needs the package huggingface_hub; `pip install "
            "huggingface_hub`, or download the files and name their directory."
        ) from None
    try:
        path = huggingface_hub.snapshot_download(
            source.removeprefix("hub:"),
            revision=revision or None,
            allow_patterns=list(_HUB_FILES),
        )
    except Exception as error:  # network, authorisation, no such repository
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{source}: could not be fetched ({type(error).__name__}: {reason}); "
            "download the files and name their directory."
        ) from error
    return pathlib.Path(path)
