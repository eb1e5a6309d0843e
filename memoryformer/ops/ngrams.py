"""Buckets of hashed n-grams: which row of a table the last n tokens read.

Of the tokens t_{i-n+1} .. t_i, oldest first, in 32 bits without sign:

    h = 2166136261 + n;   h <- (h xor t) * 16777619  for each     (as FNV-1a, by words)
    h <- h xor h >> 16;   h <- h * 0x85ebca6b;   h <- h xor h >> 13
    h <- h * 0xc2b2ae35;  h <- h xor h >> 16                      (the end of MurmurHash3)
    bucket = h mod R

Nothing is stored: equal n-grams share a row, others do by chance. The same everywhere, since
whole numbers do not round. Start at `buckets`.
"""

import jax.numpy as jnp

from memoryformer.notation import Array, Bool, Int

OFFSET, PRIME = 2_166_136_261, 16_777_619
MIXERS = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
NOTHING = -1  # before the first token


def buckets(
    tokens: Int[Array, "B L"], before: Int[Array, "B P"], order: int, num_buckets: int
) -> Int[Array, "B L"]:
    """Return the bucket of the `order` tokens that end at each position, int32.

    before: the P >= order - 1 tokens before these, `NOTHING` where there are none.
    """
    line = jnp.concatenate([before, tokens], axis=1).astype(jnp.uint32)
    length, first = tokens.shape[1], before.shape[1]
    h = jnp.full(tokens.shape, OFFSET + order, jnp.uint32)
    for back in range(order - 1, -1, -1):
        h = (h ^ line[:, first - back : first - back + length]) * jnp.uint32(PRIME)
    for shift, factor in MIXERS:
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    h = h ^ (h >> 16)
    return (h % jnp.uint32(num_buckets)).astype(jnp.int32)


def whole(
    tokens: Int[Array, "B L"],
    before: Int[Array, "B P"],
    positions: Int[Array, "B L"],
    order: int,
) -> Bool[Array, "B L"]:
    """Whether all `order` tokens that end at a position are there, and of its document."""
    line = jnp.concatenate([before, tokens], axis=1)
    length, first = tokens.shape[1], before.shape[1]
    known = positions >= order - 1
    for back in range(1, order):
        known &= line[:, first - back : first - back + length] != NOTHING
    return known


def last(tokens: Int[Array, "B L"], before: Int[Array, "B P"]) -> Int[Array, "B P"]:
    """Return the P tokens before the ones to come."""
    line = jnp.concatenate([before, tokens], axis=1)
    return line[:, line.shape[1] - before.shape[1] :]
