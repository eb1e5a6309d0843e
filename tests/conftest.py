"""Strict JAX for every test: 8 CPU devices, no silent rank promotion."""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No test leaves compiled programs behind, or finds some, unless it is asked to.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """The workdir of one toy run of 20 steps; its corpus and cache lie beside it."""
    import toy  # it imports jax's users, which must come after the settings above

    return toy.trained(tmp_path_factory.mktemp("toy"))
