"""A saved step of a run, evaluated on its validation text. Start at `evaluate_checkpoint`."""

import os
from collections.abc import Mapping
from typing import Any

import jax

from memoryformer import data, evaluation
from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError
from memoryformer.model import implementations, mixers, narrow
from memoryformer.notation import Params
from memoryformer.runs import compatibility, remote
from memoryformer.training import compilation_cache, experiment


def evaluate_checkpoint(
    workdir: str | os.PathLike,
    step: int | None = None,
    config: Mapping[str, Any] | None = None,
    kinds: narrow.WeightKinds | None = None,
    density: float = 1.0,
) -> dict[str, Any]:
    """Evaluate one step of a run (None: the newest) on all of its validation text.

    `kinds` rounds the weights first, `density` prunes dense ones (see `model.narrow`).

    With `config`, the architecture, data and tokenizer must be the checkpoint's; its `eval`
    and `mesh` sections are used instead of those stored. Works on any number of devices.
    """
    run, params, facts, dataset = _load(workdir, step, config)
    params, changed = narrow.altered(run.model, params, kinds, density)
    compilation_cache.use_cache(run.train.compilation_cache, required=False)
    return {
        "step": facts["step"],
        **changed,
        **_measure(run, params, dataset),
        "model_fingerprint": model_lib.fingerprint(params),
        "data_fingerprint": dataset.fingerprint,
    }


def _load(
    workdir: str | os.PathLike, step: int | None, config: Mapping[str, Any] | None
) -> tuple[experiment.Experiment, Params, dict[str, Any], data.Dataset]:
    """The run to evaluate as, parameters, facts and data of a step, checked to fit."""
    workdir = remote.copied(workdir, step)
    run, params, facts = experiment.load(workdir, step)
    if config is None:
        dataset = run_tokenizer.dataset(workdir, run.data, facts, run.model.vocab_size)
        return run, params, facts, dataset
    run = experiment.resolve(config)
    check_same_model(facts["config"], run)
    # What is asked for here, not what the run was trained with.
    implementations.check(run.model, jax.default_backend())
    corpus = run_tokenizer.located(run.data, workdir)
    dataset = data.load(corpus, run.model.vocab_size)
    data.check(dataset, facts["data_fingerprint"])
    return run, params, facts, dataset


def _measure(
    run: experiment.Experiment, params: Params, dataset: data.Dataset
) -> dict[str, float]:
    """Place the parameters and run every evaluator on all of the validation text."""
    model_config = implementations.readable(run.model)
    striped = mixers.takes_any_order(model_config)
    sharding = sharding_lib.make(run.mesh, striped=striped)
    specs = model_lib.partition_specs(model_config, sharding)
    names = model_lib.param_specs(model_config)
    sharding_lib.validate(
        sharding, names, params, run.eval.batch_size, model_config.num_heads
    )
    batches = dataset.validation.eval_batches(model_config.seq_len, run.eval.batch_size)
    subject = evaluation.Subject(model_config, sharding, batches, dataset.token_bytes)
    values: dict[str, float] = {}
    with sharding.activate():
        placed = sharding.put(params, specs)
        for evaluator in evaluation.make(subject):
            values |= evaluator(placed)
    return values


def check_same_model(saved: Mapping[str, Any], run: experiment.Experiment) -> None:
    """Raise `ConfigError` unless `run` has the checkpoint's model and data."""
    saved = experiment.complete(saved)
    changes = compatibility.drift(
        {name: saved[name] for name in ("model", "data")},
        {name: experiment.as_dict(run)[name] for name in ("model", "data")},
    )
    # In which precision to evaluate is for whoever asks to choose.
    free = experiment.may_change() | {"model.dtype"}
    changes = [change for change in changes if change[0] not in free]
    if changes:
        listed = "; ".join(
            f"{f}: {old!r} there, {new!r} here" for f, old, new in changes
        )
        raise ConfigError(f"the checkpoint is of another config: {listed}.")
