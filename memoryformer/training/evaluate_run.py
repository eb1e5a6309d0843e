"""A saved step of a run, evaluated on its validation text. Start at `evaluate_checkpoint`."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from memoryformer import data
from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError
from memoryformer.evaluation import loss as loss_lib
from memoryformer.model import implementations, mixers, narrow
from memoryformer.model import params as params_lib
from memoryformer.runs import compatibility
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
    run, params, facts = experiment.load(workdir, step)
    if config is not None:
        given = experiment.resolve(config)
        check_same_model(facts["config"], given)
        given_model = dataclasses.replace(
            given.model,
            performer_seed=run.model.performer_seed,
            performer_draw=run.model.performer_draw,
        )
        run = dataclasses.replace(given, model=given_model)
        # What is asked for here, not what the run was trained with.
        implementations.check(run.model, jax.default_backend())
        corpus = run_tokenizer.located(run.data, workdir)
        dataset = data.open(corpus, run.model.vocab_size)
        data.check(dataset, facts["data_fingerprint"])
    else:
        dataset = run_tokenizer.dataset(workdir, run.data, facts, run.model.vocab_size)
    params, changed = narrow.altered(run.model, params, kinds, density)
    run = dataclasses.replace(run, model=implementations.readable(run.model))
    compilation_cache.use_cache(run.train.compilation_cache, required=False)
    striped = mixers.takes_any_order(run.model)
    sharding = sharding_lib.make(run.mesh, striped=striped)
    specs = model_lib.partition_specs(run.model, sharding)
    names = model_lib.param_specs(run.model)
    sharding_lib.validate(
        sharding, names, params, run.eval.batch_size, run.model.num_heads
    )
    batches = dataset.validation.eval_batches(run.model.seq_len, run.eval.batch_size)
    with sharding.activate():
        placed = sharding.put(params, specs)
        step_fn = loss_lib.make_eval_step(run.model, sharding)
        result = loss_lib.evaluate(
            step_fn, placed, batches, dataset.token_bytes, sharding
        )
        result |= loss_lib.memories(run.model, placed, batches, sharding)
    return {
        "step": facts["step"],
        **changed,
        **result,
        "model_fingerprint": params_lib.fingerprint(params),
        "data_fingerprint": dataset.fingerprint,
    }


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
