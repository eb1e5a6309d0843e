"""A model, a checkpoint or an export on tasks of the harness. Start at `evaluate`."""

import dataclasses
import importlib.metadata
import os
import pathlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax

from memoryformer import data
from memoryformer import model as model_lib
from memoryformer.convert import export
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError, MemoryFormerError
from memoryformer.generation import sampler
from memoryformer.harness import scoring, summary, task_files, task_loading
from memoryformer.model import narrow
from memoryformer.model import params as params_lib
from memoryformer.notation import Params
from memoryformer.runs import remote
from memoryformer.training import experiment


@dataclasses.dataclass(frozen=True)
class Options:
    """What is evaluated, and how.

    tasks: names, or one string with commas: the paper's six, or tasks, groups and tags of
      `tasks_path`.
    tasks_path: a folder with `TASK.jsonl` files for the six, or the harness's YAML files.
    limit: documents of each task; 0 is all.
    num_fewshot: examples before each question; None is what the task says, or none.
    batch_size: rows at a time; log-likelihoods do not depend on it.
    add_bos: put the end-of-document token before every context, not only before empty ones.
    kinds, density: round and prune the weights first (see `model.narrow`).
    keep: called with what the harness returned so far, {name: results}, after each of `tasks`
      and before anything is made of it.
    """

    tasks: str | Sequence[str] = tuple(task_files.TASKS)
    tasks_path: str = ""
    limit: int = 0
    num_fewshot: int | None = None
    batch_size: int = 64
    add_bos: bool = False
    kinds: narrow.WeightKinds | None = None
    density: float = 1.0
    keep: Callable[[dict[str, Any]], Any] = lambda results: None

    def __post_init__(self):
        if not self.names:
            known = ", ".join(task_files.TASKS)
            raise ConfigError(f"--tasks: name some of {known}, or of --tasks_path.")
        if self.tasks_path and not pathlib.Path(self.tasks_path).is_dir():
            raise ConfigError(
                f"--tasks_path={self.tasks_path}: there is no such folder."
            )
        if self.limit < 0:
            raise ConfigError(f"--limit={self.limit}: must be 0 (all) or more.")
        if (self.num_fewshot or 0) < 0:
            raise ConfigError(f"--num_fewshot={self.num_fewshot}: must be 0 or more.")
        if self.batch_size < 1:
            raise ConfigError(f"--task_batch_size={self.batch_size}: must be >= 1.")
        if jax.process_count() > 1:
            raise ConfigError(
                "--tasks: runs in one process; start eval.py on one host."
            )

    @property
    def names(self) -> list[str]:
        """Each name once."""
        tasks = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks
        return list(dict.fromkeys(name.strip() for name in tasks if name.strip()))


def evaluate_checkpoint(
    workdir: str | os.PathLike, step: int | None = None, **options: Any
) -> dict[str, Any]:
    """Evaluate one step of a run (None: the newest); `options` are fields of `Options`."""
    chosen = Options(**options)
    folder = remote.copied(workdir, step)
    run, params, facts = experiment.load(folder, step)
    tokenizer = run_tokenizer.load(folder, run.data, facts, run.model.vocab_size)
    origin = {
        "workdir": os.fspath(workdir),
        "step": facts["step"],
        "data_fingerprint": facts["data_fingerprint"],
    }
    return _evaluate(run.model, params, tokenizer, chosen, origin)


def evaluate_export(directory: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """Evaluate what `python -m memoryformer.convert` wrote, such as a Pythia model."""
    chosen = Options(**options)
    config, params = export.load_export(directory)
    tokenizer = export.own_tokenizer(directory, config.vocab_size)
    source = export.source(directory).values
    origin = {
        "export": os.fspath(directory),
        "step": source.get("step"),
        "data_fingerprint": source.get("data_fingerprint"),
    }
    return _evaluate(config, params, tokenizer, chosen, origin)


def evaluate(
    model_config: model_lib.ModelConfig,
    params: Params,
    tokenizer: data.Tokenizer,
    tasks: str | Sequence[str] = tuple(task_files.TASKS),
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on tasks of the harness; `options` are the other fields of `Options`.

    Returns {'tasks': {name: {'acc', 'acc_stderr', .., 'documents', 'num_fewshot', 'version'}},
    'average', 'notes', 'settings'}: every metric of every task; the average of the paper's six;
    for each name, how often a text was cut or a reply shortened. Raises `ConfigError` for an
    unknown task and without lm-eval, `DataError` for a task that cannot be evaluated.
    """
    chosen = Options(tasks, **options)
    return _evaluate(model_config, params, tokenizer, chosen, {})


def _evaluate(model_config, params, tokenizer, options: Options, origin):
    task_loading.check_installed()
    # All before one is evaluated: a mistake shows at once.
    loaded = task_loading.load(options.names, options.tasks_path, options.num_fewshot)
    params, changed = narrow.altered(
        model_config, params, options.kinds, options.density
    )
    if origin:
        fingerprint = params_lib.fingerprint(params)
        origin = {"checkpoint": origin | {"model_fingerprint": fingerprint}}

    from memoryformer.harness import adapter as adapter_lib

    scorer = scoring.Scorer(model_config, params, batch_size=options.batch_size)
    generator = sampler.Generator(model_config, params)
    adapter = adapter_lib.HarnessModel(
        scorer, generator, tokenizer, add_bos=options.add_bos
    )
    results: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    for name, parts in loaded.items():
        adapter.notes.clear()
        results[name] = _run(name, parts, adapter, options)
        counts = {what: count for what, count in adapter.notes.items() if count}
        notes |= {name: counts} if counts else {}
        options.keep(results)
    tasks: dict[str, Any] = {}
    for result in results.values():
        tasks |= summary.flat(result)
    settings = {
        "harness": importlib.metadata.version("lm_eval"),
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "batch_size": options.batch_size,
        "dtype": model_config.dtype,
        "bos": "every context" if options.add_bos else "empty contexts only",
        "seq_len": model_config.seq_len,
        "devices": scorer.sharding.num_devices,
        "compilations": len(scorer.shapes),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "model": dataclasses.asdict(model_config),
    }
    return {
        **origin,
        **changed,
        "tasks": tasks,
        "average": summary.average(tasks),
        "notes": notes,
        "settings": settings,
    }


def _run(name: str, parts: list[Any], adapter: Any, options: Options) -> dict[str, Any]:
    """Evaluate one loaded name: what the harness returns, as JSON can hold it."""
    from lm_eval import evaluator

    try:
        results = evaluator.simple_evaluate(
            model=adapter,
            tasks=parts,
            num_fewshot=options.num_fewshot,
            limit=options.limit or None,
            bootstrap_iters=1000,  # of metrics that are no means
            log_samples=False,
            task_manager=task_loading.task_manager(options.tasks_path),
        )
    except MemoryFormerError:
        raise
    except Exception as error:  # whatever the task's templates, data and metrics raise
        frames = traceback.walk_tb(error.__traceback__)
        if any(f.f_globals["__name__"] == type(adapter).__module__ for f, _ in frames):
            raise  # below the adapter: ours
        raise task_loading.task_error(name, "cannot be evaluated", error) from error
    return summary.kept(results)
