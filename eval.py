"""Evaluate a checkpoint: python eval.py --workdir=DIR [--config=FILE] [--step=N].

With --tasks, on benchmarks: python eval.py --workdir=DIR --tasks=piqa,winogrande,wsc. With
--export=DIR --tasks=.., a converted model (`python -m memoryformer.convert`). JSON goes to
standard output and to --output=FILE, which holds what --tasks returned so far.
"""

from memoryformer.harness.__main__ import main

if __name__ == "__main__":
    main()
