"""Evaluate a checkpoint: python eval.py --workdir=DIR [--config=FILE] [--step=N].

With --tasks, on benchmarks: python eval.py --workdir=DIR --tasks=piqa,winogrande,wsc. With
--export=DIR --tasks=.., a converted model (`python -m memoryformer.convert`). JSON goes to
standard output and to --output=FILE, which holds what --tasks returned so far.
"""

import sys

from absl import flags

from memoryformer import cli, errors

_WORKDIR = cli.define_path_flag("workdir", "The run's directory.")
_EXPORT = cli.define_path_flag("export", "An exported model, instead of a run.")
_STEP = flags.DEFINE_integer("step", -1, "Which step; the newest if negative.")
_OUTPUT = cli.define_path_flag("output", "Also write the JSON to this file.")
_TASKS = flags.DEFINE_list("tasks", [], "Tasks of the lm-evaluation-harness.")
_TASKS_PATH = cli.define_path_flag("tasks_path", "Folder of local task files.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Documents of each task; 0 is all.", 0)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot",
    None,
    "Examples before a question; unless given, as the task says.",
    0,
)
_TASK_BATCH_SIZE = flags.DEFINE_integer("task_batch_size", 64, "Rows at a time.", 1)
_ADD_BOS = flags.DEFINE_bool("add_bos", False, "End-of-text token before contexts.")
_OF_TASKS = ("tasks_path", "limit", "num_fewshot", "task_batch_size", "add_bos")
_TABLES = flags.DEFINE_string("tables", "float32", "Round to bfloat16 or int8.")
_HEAD = flags.DEFINE_string("head", "float32", "The same, or int4.")
_DENSE = flags.DEFINE_string("dense", "float32", "The same, of other dense layers.")
_DENSITY = flags.DEFINE_float("density", 1.0, "Prune dense layers to this share.")


def main(argv):
    """Check the command line, evaluate and print JSON."""
    cli.check_arguments(argv, config=flags.FLAGS.config, required=False)
    _refuse_unused_flags()
    from memoryformer import harness
    from memoryformer.model import narrow
    from memoryformer.training import evaluate_run

    files = harness.files_read(_TASKS.value, _TASKS_PATH.value or "")
    folder = _WORKDIR.value or _EXPORT.value
    out = harness.Output(_OUTPUT.value or "", files, [folder])
    kinds = cli.chosen(narrow.WeightKinds)
    step = None if _STEP.value < 0 else _STEP.value
    if not _TASKS.present:
        settings = (step, flags.FLAGS.config, kinds, _DENSITY.value)
        out.give(evaluate_run.evaluate_checkpoint(_WORKDIR.value, *settings))
        return
    options = {"tasks": _TASKS.value, "tasks_path": _TASKS_PATH.value or ""}
    options |= {"limit": _LIMIT.value, "num_fewshot": _NUM_FEWSHOT.value}
    options |= {"batch_size": _TASK_BATCH_SIZE.value, "add_bos": _ADD_BOS.value}
    options |= {"kinds": kinds, "density": _DENSITY.value, "keep": out.keep}
    with out.unfinished():
        if _EXPORT.value:
            result = harness.evaluate_export(_EXPORT.value, **options)
        else:
            result = harness.evaluate_checkpoint(_WORKDIR.value, step, **options)
    out.give(result)
    print(harness.table(result), file=sys.stderr)


def _refuse_unused_flags():
    if bool(_WORKDIR.value) == bool(_EXPORT.value):
        raise errors.ConfigError("name one of --workdir=DIR and --export=DIR.")
    if _EXPORT.value and not _TASKS.present:
        raise errors.ConfigError("--export: holds no validation text; give --tasks.")
    if _EXPORT.value:
        cli.refuse_flags(["step"], "an export holds one step; leave it out")
    if _TASKS.present:
        cli.refuse_flags(["config"], "tasks are scored with the model's own config")
    else:
        cli.refuse_flags(_OF_TASKS, "says how to evaluate --tasks; give those too")


if __name__ == "__main__":
    cli.run_main(main, cli.define_config_flag)
