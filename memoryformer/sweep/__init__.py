"""From one config to an experiment: a sweep's points, run, watched and tabulated.

A config file defines `sweep_NAME()` generators of overrides beside its `get_config`:

    def sweep_learning_rate():
        for rate in (1e-3, 2e-3, 3e-3):
            yield {"optimizer.learning_rate": rate}

    def sweep_seed():
        for seed in range(3):
            yield {"train.seed": seed}

A generator with a parameter is given the config's argument (`f.py:mini`). The key `label`
names a point, and is no override. `metrics()` may name the columns to tabulate.

    python -m memoryformer.sweep --config=f.py --sweep=learning_rate,seed list   # 9 points
    ... check      resolve every point, build its shapes, estimate its memory
    ... print      one shell command per point (--index=N: of that point)
    ... run        train all here, --parallel=N at a time; go on where it was left
    ... submit     give a scheduler what is not done, --launcher=slurm (local: `run`)
    ... status     what is done, running, queued, failed or missing; asks the scheduler
    ... collect    a table with mean and s.d. over seeds, one of each side at its own best
                   learning rate (--best_over=FIELD), and points.csv; reads files only

A point lives in ROOT/CONFIG/SWEEP/SLUG-HASH, HASH being that of its resolved config.
Modules: `points` (what there is), `commands` (the words above), `runner` and `worker`
(processes), `launchers` (a file for each scheduler), `jobs` (which has what), `statistics`
and `best` (files to text).
"""
