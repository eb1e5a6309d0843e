"""Evaluate a checkpoint: on its validation text, or with --tasks on benchmarks.

python eval.py --workdir=DIR [--config=FILE] [--step=N]
python eval.py --workdir=DIR --tasks=piqa,winogrande,wsc
python eval.py --export=DIR --tasks=piqa       a model of `python -m memoryformer.convert`

`python -m memoryformer.harness` is the same command. JSON goes to standard output and to
--output=FILE, which holds what --tasks returned so far.
"""

import sys
from collections.abc import Sequence

from absl import flags

from memoryformer import cli, errors

_OF_TASKS = ("tasks_path", "limit", "num_fewshot", "task_batch_size", "add_bos")


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config_flag()
    cli.define_path_flag("workdir", "The run's directory.", in_store=True)
    cli.define_path_flag("export", "An exported model, instead of a run.")
    flags.DEFINE_integer("step", -1, "Which step; the newest if negative.")
    cli.define_path_flag("output", "Also write the JSON to this file.")
    flags.DEFINE_list("tasks", [], "Tasks of the lm-evaluation-harness.")
    cli.define_path_flag("tasks_path", "Folder of local task files.")
    flags.DEFINE_integer("limit", 0, "Documents of each task; 0 is all.", 0)
    flags.DEFINE_integer(
        "num_fewshot",
        None,
        "Examples before a question; unless given, as the task says.",
        0,
    )
    flags.DEFINE_integer("task_batch_size", 64, "Rows at a time.", 1)
    flags.DEFINE_bool("add_bos", False, "End-of-text token before contexts.")
    flags.DEFINE_string("tables", "float32", "Round to bfloat16 or int8.")
    flags.DEFINE_string("head", "float32", "The same, int4 or int8-screened.")
    flags.DEFINE_string("dense", "float32", "Other dense layers; float32 to int4.")
    flags.DEFINE_float("density", 1.0, "Prune dense layers to this share.")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv: Sequence[str]) -> None:
    """Check the command line, evaluate and print JSON."""
    values = flags.FLAGS
    cli.check_arguments(argv, config=values.config, required=False)
    _refuse_unused_flags()
    from memoryformer.harness import evaluate_tasks, summary, task_files
    from memoryformer.harness import output as output_lib
    from memoryformer.model import narrow
    from memoryformer.training import evaluate_run

    tasks_path = values.tasks_path or ""
    files = task_files.files_read(values.tasks, tasks_path)
    out = output_lib.Output(
        values.output or "", files, [values.workdir or values.export]
    )
    kinds = cli.chosen(narrow.WeightKinds)
    step = None if values.step < 0 else values.step
    if not values["tasks"].present:
        result = evaluate_run.evaluate_checkpoint(
            values.workdir, step, values.config, kinds, values.density
        )
        out.give(result)
        return
    options = {
        "tasks": values.tasks,
        "tasks_path": tasks_path,
        "limit": values.limit,
        "num_fewshot": values.num_fewshot,
        "batch_size": values.task_batch_size,
        "add_bos": values.add_bos,
        "kinds": kinds,
        "density": values.density,
        "keep": out.keep,
    }
    with out.unfinished():
        if values.export:
            result = evaluate_tasks.evaluate_export(values.export, **options)
        else:
            result = evaluate_tasks.evaluate_checkpoint(values.workdir, step, **options)
    out.give(result)
    print(summary.table(result), file=sys.stderr)


def _refuse_unused_flags() -> None:
    values = flags.FLAGS
    if bool(values.workdir) == bool(values.export):
        raise errors.ConfigError("name one of --workdir=DIR and --export=DIR.")
    if values.export and not values["tasks"].present:
        raise errors.ConfigError("--export: holds no validation text; give --tasks.")
    if values.export:
        cli.refuse_flags(["step"], "an export holds one step; leave it out")
    if values["tasks"].present:
        cli.refuse_flags(["config"], "tasks are scored with the model's own config")
    else:
        cli.refuse_flags(_OF_TASKS, "says how to evaluate --tasks; give those too")


if __name__ == "__main__":
    main()
