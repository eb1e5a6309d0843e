"""Evaluate a checkpoint: python eval.py --workdir=DIR [--config=FILE] [--step=N].

With --tasks, on benchmarks: python eval.py --workdir=DIR --tasks=piqa,winogrande,wsc. With
--export=DIR --tasks=.., a converted model (`python -m memoryformer.convert`). JSON goes to
standard output and to --output=FILE, which after each of --tasks holds what the harness
returned so far.
"""

import json
import os
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from memoryformer import errors

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", "", "The run's directory.")
_EXPORT = flags.DEFINE_string("export", "", "An exported model, instead of a run.")
_STEP = flags.DEFINE_integer("step", -1, "Which step; the newest if negative.")
_OUTPUT = flags.DEFINE_string("output", "", "Also write the JSON to this file.")
_TASKS = flags.DEFINE_list("tasks", [], "Tasks of the lm-evaluation-harness.")
_TASKS_PATH = flags.DEFINE_string("tasks_path", "", "Folder of local task files.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Documents of each task; 0 is all.")
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Examples before a question; if not given, what the task says."
)
_TASK_BATCH_SIZE = flags.DEFINE_integer("task_batch_size", 64, "Rows at a time.")
_ADD_BOS = flags.DEFINE_bool("add_bos", False, "End-of-text token before contexts.")
_TABLES = flags.DEFINE_string("tables", "float32", "Round to bfloat16 or int8.")
_HEAD = flags.DEFINE_string("head", "float32", "The same, or int4.")
_DENSE = flags.DEFINE_string("dense", "float32", "The same, of other dense layers.")
_DENSITY = flags.DEFINE_float("density", 1.0, "Prune dense layers to this share.")


def main(argv):
    """Check the command line, evaluate and print JSON."""
    errors.check_arguments(argv, config=_CONFIG.value, required=False)
    _check_flags()
    from memoryformer import inference

    step = None if _STEP.value < 0 else _STEP.value
    kinds = inference.kinds_from_flags()
    if not _TASKS.present:
        from memoryformer import evaluation

        _give(
            evaluation.evaluate_checkpoint(
                _WORKDIR.value, step, _CONFIG.value, kinds, _DENSITY.value
            )
        )
        return
    from memoryformer import tasks

    result = _evaluate_tasks(step, kinds)
    _give(result)
    print(tasks.table(result), file=sys.stderr)


def _check_flags():
    """Refuse flags that would be ignored, and an --output that cannot be written."""
    if bool(_WORKDIR.value) == bool(_EXPORT.value):
        raise errors.ConfigError("name one of --workdir=DIR and --export=DIR.")
    if _TASKS.present:
        errors.refuse_flags(
            ["config"], "is for validation text; with --tasks the run's own is used"
        )
    else:
        ours = ("tasks_path", "limit", "num_fewshot", "task_batch_size", "add_bos")
        errors.refuse_flags(ours, "says how to evaluate --tasks; give those too")
    if _EXPORT.value:
        errors.refuse_flags(["step"], "an export holds one step; leave it out")
        if not _TASKS.present:
            raise errors.ConfigError(
                "--export: holds no validation text; give --tasks."
            )
    if not _OUTPUT.value:
        return
    path = pathlib.Path(_OUTPUT.value).absolute()
    folder = next(parent for parent in path.parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise errors.ConfigError(f"--output={_OUTPUT.value}: no file can be written.")


def _evaluate_tasks(step, kinds):
    from memoryformer import tasks

    unfinished = {}

    def keep(results):
        unfinished["harness"] = results
        _write({"finished": False, "harness": results})

    options = {
        "tasks": _TASKS.value,
        "tasks_path": _TASKS_PATH.value,
        "limit": _LIMIT.value,
        "num_fewshot": _NUM_FEWSHOT.value,
        "batch_size": _TASK_BATCH_SIZE.value,
        "add_bos": _ADD_BOS.value,
        "kinds": kinds,
        "density": _DENSITY.value,
        "keep": keep,
    }
    try:
        if _EXPORT.value:
            return tasks.evaluate_export(_EXPORT.value, **options)
        return tasks.evaluate_checkpoint(_WORKDIR.value, step, **options)
    except BaseException:  # an interrupt too: what was scored took its time
        if unfinished and not _OUTPUT.value:
            print(json.dumps({"finished": False} | unfinished, indent=2), flush=True)
        raise


def _give(result):
    print(json.dumps(result, indent=2), flush=True)  # not lost where no file can be
    _write(result)


def _write(result):
    from memoryformer import rundir

    path = pathlib.Path(_OUTPUT.value)
    if _OUTPUT.value and path.exists() and not path.is_file():  # such as a pipe
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    elif _OUTPUT.value:
        rundir.write_json(path, result, indent=2)


if __name__ == "__main__":
    errors.run_main(main)
