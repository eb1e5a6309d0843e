"""Measurements, each a module that is run with `python -m` from the repository's root."""
