"""Benchmarks through EleutherAI's lm-evaluation-harness, an optional dependency.

    result = evaluate_tasks.evaluate(model_config, params, tokenizer, tasks="piqa,wsc")
    print(summary.table(result))

`evaluate_tasks` is the way through, `task_loading` and `task_files` say what is evaluated (the
paper's six tasks are pinned in `task_files`), `adapter` is our model as the harness wants it:
`encoding` turns texts into tokens, `scoring` computes log-likelihoods. `summary` lays results
out, `output` keeps them. Needs the extra `eval`, and no PyTorch.
"""
