"""Benchmarks through EleutherAI's lm-evaluation-harness, an optional dependency."""
