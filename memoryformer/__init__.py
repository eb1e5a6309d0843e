"""MemoryFormer in JAX: language models whose projections are hash-indexed tables."""

__version__ = "0.1.0"
