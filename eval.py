"""Evaluate a checkpoint: python eval.py --workdir=DIR [--config=FILE] [--step=N].

With --tasks, on benchmarks: python eval.py --workdir=DIR --tasks=piqa,winogrande,wsc. With
--export=DIR --tasks=.., a converted model (`python -m memoryformer.convert`).
"""

import json
import pathlib
import sys

from absl import flags

from memoryformer import config, errors, paths

_WORKDIR = paths.define_flag("workdir", "The run's directory.")
_EXPORT = paths.define_flag("export", "An exported model, instead of a run.")
_STEP = flags.DEFINE_integer("step", -1, "Which step; the newest if negative.")
_OUTPUT = paths.define_flag("output", "Also write the JSON to this file.")
_TASKS = flags.DEFINE_list("tasks", [], "Tasks of the lm-evaluation-harness.")
_TASKS_PATH = paths.define_flag("tasks_path", "Folder of local task files.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Documents of each task; 0 is all.", 0)
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", 0, "Examples before a question.", 0)
_TASK_BATCH_SIZE = flags.DEFINE_integer("task_batch_size", 64, "Rows at a time.", 1)
_ADD_BOS = flags.DEFINE_bool("add_bos", False, "End-of-text token before contexts.")
_TABLES = flags.DEFINE_string("tables", "float32", "Round to bfloat16 or int8.")
_HEAD = flags.DEFINE_string("head", "float32", "The same, or int4.")
_DENSE = flags.DEFINE_string("dense", "float32", "The same, of other dense layers.")
_DENSITY = flags.DEFINE_float("density", 1.0, "Prune dense layers to this share.")


def main(argv):
    """Check the command line, evaluate and print JSON."""
    errors.check_arguments(argv, config=flags.FLAGS.config, required=False)
    if bool(_WORKDIR.value) == bool(_EXPORT.value):
        raise errors.ConfigError("name one of --workdir=DIR and --export=DIR.")
    if _EXPORT.value and not _TASKS.value:
        raise errors.ConfigError("--export: holds no validation text; give --tasks.")
    step = None if _STEP.value < 0 else _STEP.value
    if _TASKS.value:
        result = _evaluate_tasks(step)
    else:
        from memoryformer import evaluation, inference

        kinds = inference.WeightKinds(_TABLES.value, _HEAD.value, _DENSE.value)
        result = evaluation.evaluate_checkpoint(
            _WORKDIR.value, step, flags.FLAGS.config, kinds, _DENSITY.value
        )
    text = json.dumps(result, indent=2)
    try:
        print(text, flush=True)
    finally:  # neither is lost where the other cannot be written
        if _OUTPUT.value:
            path = pathlib.Path(_OUTPUT.value)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")


def _evaluate_tasks(step):
    from memoryformer import tasks

    options = {
        "tasks": _TASKS.value,
        "tasks_path": _TASKS_PATH.value or "",
        "limit": _LIMIT.value,
        "num_fewshot": _NUM_FEWSHOT.value,
        "batch_size": _TASK_BATCH_SIZE.value,
        "add_bos": _ADD_BOS.value,
    }
    if _EXPORT.value:
        result = tasks.evaluate_export(_EXPORT.value, **options)
    else:
        result = tasks.evaluate_checkpoint(_WORKDIR.value, step, **options)
    print(tasks.table(result), file=sys.stderr)
    return result


if __name__ == "__main__":
    errors.run_main(main, config.define_flag)
