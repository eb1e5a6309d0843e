"""MemoryFormer in JAX: language models whose projections are hash-indexed tables."""

from flax import nnx

# Modules are trees, never graphs with shared nodes: parameters go in and out as plain dicts.
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
