"""The one table of letters, used in names, einsum strings, shape comments and specs.

letter      meaning                                            name in code
B, L, D     batch, sequence length, model width                batch_size, seq_len, embed_dim
H, E        heads, head width                                  num_heads, head_dim
V           vocabulary                                         vocab_size
K, tau      tables of a memory layer, bits of one code         num_tables, code_bits
C           buckets (rows) of one table, 2^tau                 num_buckets
F           output width of a layer                            features
z, h(z), s  chunk [.., K, tau], its code (int32), its score    chunks, codes, scores
T           all tables of a layer, one array [K, C, F]         tables
"""

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

AnyArray = Array | np.ndarray  # what is taken where numpy's arrays will do
ArrayOrShape = Array | jax.ShapeDtypeStruct  # where only shape and dtype are read
Tokens = Int[Array, "B L"]
Activations = Float[Array, "*B D"]
Chunks = Float[Array, "*B K tau"]
Codes = Int[Array, "*B K"]
Scores = Float[Array, "*B K"]
Tables = Float[Array, "K C F"]
Params = dict[str, "Params | Array"]

__all__ = [
    "Activations",
    "AnyArray",
    "Array",
    "ArrayOrShape",
    "Bool",
    "Chunks",
    "Codes",
    "Float",
    "Int",
    "Params",
    "Scores",
    "Tables",
    "Tokens",
]
