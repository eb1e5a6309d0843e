"""MemoryFormer-base, beside Pythia-410M (NeurIPS 2024, Table 1).

    python train.py --config=configs/memoryformer_base.py --workdir=runs/base \\
        --config.data.path='/data/pile/*.jsonl.gz'

`:performer` and so on put another mixer between the same memory layers (docs/mixers.md).
The authors' repository has no config of this size.

Cost: 6.64B table parameters, 143,000 steps of 2.1M tokens; not run here. Expected: the paper's
zero-shot average over six tasks, .458.

Target: v6e:8x8 --config.model.remat=projections
    --config.mesh=fsdp_tensor:model=8 --config.train.num_microbatches=64
"""

import ml_collections

from memoryformer import presets


def get_config(mixer: str = "softmax") -> ml_collections.ConfigDict:
    """Return the experiment; mixer is one of `presets.mixer_settings`."""
    if mixer == "released":  # says that there is none
        return presets.memoryformer("base", mixer)
    return presets.with_mixer(presets.memoryformer("base"), mixer)
