"""MemoryFormer-small, beside Pythia-160M (NeurIPS 2024, Table 1).

    python train.py --config=configs/memoryformer_small.py --workdir=runs/small \\
        --config.data.path='/data/pile/*.jsonl.gz'

`:released` is what the authors' repository trains instead (docs/paper_differences.md).

Cost: 1.87B table parameters, 143,000 steps of 2.1M tokens; not run here. Expected: the paper's
zero-shot average over six tasks, .423.

Target: v6e:4x4 --config.model.remat=projections
    --config.mesh=fsdp_tensor:model=4 --config.train.num_microbatches=128
"""

import ml_collections

from memoryformer import presets


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the experiment; variant is '', 'released' or a mixer."""
    if variant in presets.mixer_settings():
        return presets.with_mixer(presets.memoryformer("small"), variant)
    return presets.memoryformer("small", variant)
