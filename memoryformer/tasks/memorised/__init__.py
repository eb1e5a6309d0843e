"""Memorization-based inference: a recurrent attention network becomes a table of its own steps.

Modules: `digits` (the images), `network` (the task that is trained), `table` (its steps as rows,
read by the nearest row or by hash codes), `study` (accuracy against the share of the images that
have rows). `python -m memoryformer.tasks.memorised --workdir=RUN` measures a trained run.

After Giacomini et al. 2023 (arXiv 2307.07631), re-derived; reading by hash codes is ours.
"""
