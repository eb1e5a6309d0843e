"""The harness's side: is it installed, which tasks does it know, and each of them loaded.

Whatever its YAML files, templates and data make it raise becomes one line. Start at `load`.
"""

import importlib.metadata
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from memoryformer import config as config_lib
from memoryformer import data
from memoryformer.errors import ConfigError, DataError
from memoryformer.harness import task_files


def check_installed() -> None:
    """Prepare lm-eval for a process that runs JAX; raises `ConfigError` without it."""
    # It would fork for bootstraps, and a process that runs JAX must not be forked.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "--tasks: needs the lm-evaluation-harness; `pip install -e '.[eval]'`."
        ) from None
    if version != task_files.HARNESS_VERSION:
        logging.warning(
            "lm-eval %s is installed, %s is pinned.",
            version,
            task_files.HARNESS_VERSION,
        )


def task_manager(tasks_path: str) -> Any:
    """Return the harness's `TaskManager` of the YAML files below `tasks_path`."""
    from lm_eval import tasks as harness_tasks

    # Not the defaults: indexing 14,000 names takes longer than a small evaluation.
    has_yaml = tasks_path and any(pathlib.Path(tasks_path).rglob("*.yaml"))
    try:
        return harness_tasks.TaskManager(
            include_path=tasks_path if has_yaml else None, include_defaults=False
        )
    except Exception as error:  # whatever a YAML file makes it raise
        raise ConfigError(
            f"--tasks_path={tasks_path}: its YAML files cannot be read "
            f"({_reason(error)})."
        ) from error


def load(
    names: Sequence[str], tasks_path: str, num_fewshot: int | None
) -> dict[str, list[Any]]:
    """Return for each name the harness's tasks, or the one group, that it stands for.

    Raises `ConfigError` for a name that nothing defines and for examples (`num_fewshot`) that
    a task does not take, `DataError` for a task that cannot be loaded.
    """
    manager = task_manager(tasks_path)
    in_folder = set(manager.all_tasks)
    known = sorted({*task_files.TASKS, *in_folder})
    cache = data.cache_root(data.DataConfig()) / "tasks" / "logiqa"
    loaded = {}
    for name in names:
        if name not in known:
            _refuse_damaged(tasks_path)
        config_lib.choose(name, known, "--tasks")
        spec: Any = name
        if name not in in_folder:
            spec = task_files.task_config(name, tasks_path, cache=cache)
        try:
            parts = manager.load([spec])
        except Exception as error:  # its YAML, its templates, its data's file or server
            raise task_error(name, "cannot be loaded", error) from error
        for task in parts["tasks"].values():
            _check_fewshot(task, num_fewshot)
        group = parts.get("groups", {}).get(name)
        loaded[name] = [group] if group else [*parts["tasks"].values()]
    return loaded


def task_error(name: str, failure: str, error: Exception) -> DataError:
    """Return one line about a task from whatever was raised."""
    return DataError(f"task {name}: {failure} ({_reason(error)}).")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _refuse_damaged(tasks_path: str) -> None:
    """Name the first YAML file that the harness left out because it cannot be read."""
    from lm_eval.tasks import _yaml_loader

    for path in sorted(pathlib.Path(tasks_path).rglob("*.yaml")) if tasks_path else ():
        try:
            _yaml_loader.load_yaml(path, resolve_func=False, recursive=False)
        except Exception as error:  # of the YAML reader's or of the file's kind
            raise ConfigError(f"{path}: cannot be read ({_reason(error)}).") from error


def _check_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Refuse examples that the harness would leave out without a word."""
    if not num_fewshot:
        return
    flag = f"--num_fewshot={num_fewshot}: task {task.task_name}"
    if task.get_config("num_fewshot") == 0:
        raise ConfigError(f"{flag} is defined with num_fewshot: 0, which stays.")
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise ConfigError(f"{flag} scores whole texts, which have no examples.")
