"""MemoryFormer-tiny, beside Pythia-70M (NeurIPS 2024, Table 1).

    python train.py --config=configs/memoryformer_tiny.py --workdir=runs/tiny \\
        --config.data.path='/data/pile/*.jsonl.gz'

`:released` is what the authors' repository trains instead (docs/paper_differences.md).

Cost: 415M table parameters, 143,000 steps of 2.1M tokens; not run here. Expected: the paper's
zero-shot average over six tasks, .404.

Target: v5e:2x4 --config.model.remat=projections --config.train.num_microbatches=128
"""

import ml_collections

from memoryformer import presets


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the experiment; variant is '', 'released' or a mixer."""
    if variant in presets.mixer_settings():
        return presets.with_mixer(presets.memoryformer("tiny"), variant)
    return presets.memoryformer("tiny", variant)
