"""Benchmarks through EleutherAI's lm-evaluation-harness, an optional dependency.

    result = harness.evaluate(model_config, params, tokenizer, tasks="piqa,wsc")
    print(harness.table(result))

`evaluate_tasks` is the way through, `task_loading` and `task_files` say what is evaluated (the
paper's six tasks are pinned in `task_files`), `adapter` is our model as the harness wants it:
`encoding` turns texts into tokens, `scoring` computes log-likelihoods. `summary` lays results
out, `output` keeps them. Needs the extra `eval`, and no PyTorch.
"""

from memoryformer.harness.evaluate_tasks import (
    Options,
    evaluate,
    evaluate_checkpoint,
    evaluate_export,
)
from memoryformer.harness.output import Output
from memoryformer.harness.summary import table
from memoryformer.harness.task_files import files_read

__all__ = [
    "Options",
    "Output",
    "evaluate",
    "evaluate_checkpoint",
    "evaluate_export",
    "files_read",
    "table",
]
