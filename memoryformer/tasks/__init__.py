"""Benchmarks through EleutherAI's lm-evaluation-harness, an optional dependency.

    result = tasks.evaluate(model_config, params, tokenizer, tasks="piqa,wsc")
    print(tasks.table(result))

`scoring` computes log-likelihoods, `harness` is the adapter, `catalogue` pins the paper's
six tasks. Needs `pip install -r requirements-eval.txt`, and no PyTorch. Start at
`evaluate`.
"""

import dataclasses
import importlib.metadata
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from memoryformer import config as config_lib
from memoryformer import data, evaluation, experiment, generation, run_tokenizer
from memoryformer import model as model_lib
from memoryformer.convert import export
from memoryformer.errors import ConfigError
from memoryformer.notation import Params
from memoryformer.tasks import catalogue, scoring

__all__ = ["evaluate", "evaluate_checkpoint", "evaluate_export", "table"]


def evaluate_checkpoint(
    workdir: str | os.PathLike, step: int | None = None, **options: Any
) -> dict[str, Any]:
    """Evaluate one step of a run (None: the newest); `options` are those of `evaluate`."""
    run, params, facts = experiment.load(workdir, step)
    tokenizer = run_tokenizer.load(workdir, run.data, facts, run.model.vocab_size)
    result = evaluate(run.model, params, tokenizer, **options)
    origin = {
        "workdir": os.fspath(workdir),
        "step": facts["step"],
        "model_fingerprint": evaluation.fingerprint(params),
        "data_fingerprint": facts["data_fingerprint"],
    }
    return {"checkpoint": origin, **result}


def evaluate_export(directory: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """Evaluate what `python -m memoryformer.convert` wrote, such as a Pythia model."""
    config, params = export.load_export(directory)
    tokenizer = export.own_tokenizer(directory, config.vocab_size)
    result = evaluate(config, params, tokenizer, **options)
    source = export.source(directory).values
    origin = {
        "export": os.fspath(directory),
        "step": source.get("step"),
        "model_fingerprint": evaluation.fingerprint(params),
        "data_fingerprint": source.get("data_fingerprint"),
    }
    return {"checkpoint": origin, **result}


def evaluate(
    model_config: model_lib.ModelConfig,
    params: Params,
    tokenizer: data.Tokenizer,
    tasks: str | Sequence[str] = tuple(catalogue.TASKS),
    *,
    tasks_path: str = "",
    limit: int = 0,
    num_fewshot: int = 0,
    batch_size: int = 64,
    add_bos: bool = False,
) -> dict[str, Any]:
    """Evaluate on tasks of the harness.

    Args:
      model_config, params, tokenizer: the model.
      tasks: names, or one string with commas: the paper's six, or tasks of `tasks_path`.
      tasks_path: a folder with `TASK.jsonl` files for the six, or the harness's YAML files.
      limit: documents of each task; 0 is all.
      num_fewshot: examples before each question.
      batch_size: rows at a time; the results do not depend on it.
      add_bos: put the end-of-document token before every context, not only before empty ones.

    Returns {'tasks': {name: {'acc', 'acc_stderr', .., 'documents', 'version'}}, 'average',
    'settings'}. Raises `ConfigError` for an unknown task and without lm-eval.
    """
    names = [n for n in tasks.split(",") if n] if isinstance(tasks, str) else [*tasks]
    if jax.process_count() > 1:
        raise ConfigError("--tasks: runs in one process; start eval.py on one host.")
    _import_harness()
    from lm_eval import evaluator

    from memoryformer.tasks import harness

    scorer = scoring.Scorer(model_config, params, batch_size=batch_size)
    generator = generation.Generator(model_config, params)
    adapter = harness.HarnessModel(scorer, generator, tokenizer, add_bos=add_bos)
    results = evaluator.simple_evaluate(
        model=adapter,
        tasks=_load(names, tasks_path),
        num_fewshot=num_fewshot,
        limit=limit or None,
        bootstrap_iters=1000,  # of metrics that are no means
        log_samples=False,
        task_manager=_manager(tasks_path),
    )
    found = {name: _summary(results, name) for name in results["results"]}
    accuracies = [found[n]["acc"] for n in catalogue.TASKS if n in found]
    complete = len(accuracies) == len(catalogue.TASKS)
    settings = {
        "harness": importlib.metadata.version("lm_eval"),
        "num_fewshot": num_fewshot,
        "limit": limit,
        "batch_size": batch_size,
        "dtype": model_config.dtype,
        "bos": "every context" if add_bos else "empty contexts only",
        "seq_len": model_config.seq_len,
        "devices": scorer.sharding.num_devices,
        "compilations": len(scorer.shapes),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "model": dataclasses.asdict(model_config),
    }
    average = float(np.mean(accuracies)) if complete else None
    return {"tasks": found, "average": average, "settings": settings}


def table(result: dict[str, Any]) -> str:
    """Lay results out beside the paper's and EleutherAI's figures, for a terminal."""
    published = list(catalogue.FIGURES)
    lines = [
        f"{'':<14} {'acc':>13} {'acc_norm':>13}  "
        + " ".join(f"{n:>14}" for n in published)
    ]
    for name, values in result["tasks"].items():
        row = f"{name:<14} {_with_error(values, 'acc')} {_with_error(values, 'acc_norm')}  "
        if name in catalogue.TASKS:
            at = list(catalogue.TASKS).index(name)
            row += " ".join(f"{catalogue.FIGURES[n][at]:>14.3f}" for n in published)
        lines.append(row)
    if result["average"] is not None:
        row = f"{'average':<14} {result['average']:>7.3f}{'':>6} {'':>13}  "
        means = (float(np.mean(catalogue.FIGURES[n])) for n in published)
        lines.append(row + " ".join(f"{mean:>14.3f}" for mean in means))
    lines.append("published figures: zero-shot acc; +- is one standard error")
    return "\n".join(line.rstrip() for line in lines)


def _with_error(values: dict[str, Any], metric: str) -> str:
    if metric not in values:
        return f"{'':>13}"
    error = values.get(metric + "_stderr")
    return f"{values[metric]:>7.3f}" + (
        "" if error is None else f"+-{error:.3f}"
    ).rjust(6)


def _import_harness() -> None:
    # It would fork for bootstraps, and a process that runs JAX must not be forked.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "--tasks: needs the lm-evaluation-harness; "
            "`pip install -r requirements-eval.txt`."
        ) from None
    if version != catalogue.HARNESS_VERSION:
        logging.warning(
            "lm-eval %s is installed, %s is pinned.", version, catalogue.HARNESS_VERSION
        )


def _manager(tasks_path: str) -> Any:
    from lm_eval import tasks as harness_tasks

    # Not the defaults: indexing 14,000 names takes longer than a small evaluation.
    has_yaml = tasks_path and any(pathlib.Path(tasks_path).rglob("*.yaml"))
    return harness_tasks.TaskManager(
        include_path=tasks_path if has_yaml else None, include_defaults=False
    )


def _load(names: Sequence[str], tasks_path: str) -> list[Any]:
    if tasks_path and not pathlib.Path(tasks_path).is_dir():
        raise ConfigError(f"--tasks_path={tasks_path}: there is no such folder.")
    theirs = set(_manager(tasks_path).all_tasks)
    known = sorted({*catalogue.TASKS, *theirs})
    if not names:
        raise ConfigError(f"--tasks: name some of {', '.join(known)}.")
    cache = data.cache_root(data.DataConfig()) / "tasks" / "logiqa"
    loaded = []
    for name in names:
        config_lib.choose(name, known, "--tasks")
        if name in theirs:
            loaded.append(name)
        else:
            loaded.append(catalogue.task_config(name, tasks_path, cache=cache))
    return loaded


def _summary(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Flatten the harness's {'acc,none': ..}."""
    values: dict[str, Any] = {}
    for key, value in results["results"][name].items():
        metric, _, _ = key.partition(",")
        if isinstance(value, int | float) and "," in key:
            values[metric] = float(value)
    values["documents"] = results["n-samples"][name]["effective"]
    values["version"] = results["versions"].get(name)
    return values
