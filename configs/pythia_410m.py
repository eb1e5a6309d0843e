"""Pythia-410M, the paper's dense baseline (arXiv 2304.01373).

    python train.py --config=configs/pythia_410m.py --workdir=runs/pythia_410m \\
        --config.data.path='/data/pile/*.jsonl.gz'

`:linformer`, `:cosformer` and `:performer` are the paper's efficient baselines (Table 2) with
settings of our own, for the paper names none; `:linformer_matched` and `:performer_matched` meet
its FLOPs. `:rmt`, `:memformer` and `:pmi` carry a memory over chunks, each recomputed for its gradient:
the target's `remat` below is for the others. docs/mixers.md compares them.

Published weights load through `memoryformer.convert.load_gpt_neox`.
Cost: 143,000 steps of 2.1M tokens; not run here. Expected: the paper's quoted zero-shot average
over six tasks, .435.

Target: v5e:2x4 --config.model.remat=projections --config.train.num_microbatches=128
"""

import ml_collections

from memoryformer import presets


def get_config(mixer: str = "softmax") -> ml_collections.ConfigDict:
    """Return the experiment; mixer is one of `presets.mixer_settings`."""
    return presets.with_mixer(presets.pythia("410m"), mixer)
