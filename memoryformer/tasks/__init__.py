"""Tasks that are generated here, with one small trainer.

Modules: `base` (what a task is), `registry` (which there are), `experiment` (a checked config),
`trainer` (the loop), `trunk` (tasks on a language model's trunk); each other one is a task.
"""
