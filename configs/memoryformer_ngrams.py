"""MemoryFormer-tiny with rows of hashed n-grams beside the embedding (docs/variants.md).

    python train.py --config=configs/memoryformer_ngrams.py --workdir=runs/ngrams \\
        --config.data.path='/data/pile/*.jsonl.gz'

The last two and the last three tokens each address one of 65,536 rows of width D, added to the
embedding. It is ours, and not in the paper.

Cost: that of MemoryFormer-tiny, 67M parameters more, and a thousandth more bytes of rows read for
a token; not run here. Expected: a lower loss than MemoryFormer-tiny's. In the miniature of
`configs/studies.py` it is 0.5 bits per byte lower after 205 thousand bytes; nobody has seen by
how much at this size. The target is MemoryFormer-tiny's, and was not compiled for.

Target: v5e:2x4 --config.model.remat=projections --config.train.num_microbatches=128
"""

import ml_collections

from memoryformer import presets


def get_config() -> ml_collections.ConfigDict:
    """Return the experiment."""
    config = presets.memoryformer("tiny")
    config.model.projection_options.ngram_rows = 1 << 16
    config.model.projection_options.ngram_order = 3
    return config
