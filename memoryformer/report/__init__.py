"""From run directories to something to look at.

    python -m memoryformer.report DIR... [--output=FILE]          one HTML page of runs or sweeps
    python -m memoryformer.report flops [--output=DIR]            the paper's Fig. 1
    python -m memoryformer.report utilisation --workdir=DIR       the paper's Fig. 4
    python -m memoryformer.report quickstart --workdir=DIR        bits per byte, beside others
    python -m memoryformer.report curves DIR... [--output=DIR]    losses of one or more runs
    python -m memoryformer.report slots SWEEP... [--output=DIR]   how alike slots of memories are
    python -m memoryformer.report costs SWEEP [--output=DIR]      losses over FLOPs, time, bytes

The page reads files only, needs no server and stands alone; it goes to the first directory
unless `--output` says otherwise. So do the pictures, into DIR/plots. Each path is printed.
Modules: `studies` (files to runs and groups of them), `page`, `markup` and `charts` (to HTML),
`costs` with `pareto` (loss over what it costs) and `scaling` (a law over sizes and tokens), `about`
(what a person wrote of runs), `pictures`, `curves` and `slots`; `drawing` holds colours and smoothing.
"""
