"""MemoryFormer-tiny with rows that tokens address, beside those that activations address.

    python train.py --config=configs/memoryformer_token_addressed.py --workdir=runs/token_addressed \\
        --config.data.path='/data/pile/*.jsonl.gz'

The last two to the last five tokens each address one of 32,768 rows of width D, added to the
embedding, and the token a row of Q, K and V in each block (docs/variants.md). It is ours, and
not in the paper: the best that was found within a tenth of the published layer's bytes and time.

Cost: that of MemoryFormer-tiny, and a hundredth more bytes of rows read for a token. Parameters
are twice as many: 67M more of n-grams, 464M more of tokens, which
--config.model.projection_options.token_rows=False leaves out. Expected: a lower loss than
MemoryFormer-tiny's. In the miniature of `configs/studies.py` it is 0.08 to 0.17 bits per byte lower
after 20M bytes, and with model.score='l1_softmax' at a lower rate another 0.06; nobody has seen
by how much at this size. The target is MemoryFormer-tiny's, and was not compiled for.

Target: v5e:2x4 --config.model.remat=projections --config.train.num_microbatches=128
"""

import ml_collections

from memoryformer import presets


def get_config() -> ml_collections.ConfigDict:
    """Return the experiment."""
    config = presets.memoryformer("tiny")
    options = config.model.projection_options
    options.ngram_rows = 1 << 15
    options.ngram_order = 5
    options.token_rows = True
    return config
