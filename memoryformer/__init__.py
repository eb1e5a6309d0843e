"""MemoryFormer in JAX: language models whose projections are hash-indexed tables."""
