"""Whole-model decoding on CPU, ours beside what people would use instead."""
