"""Strict JAX for every test: 8 CPU devices, no silent rank promotion, quick compilation.

Compiling is what takes the time. Programs are compiled as `runner.QUICK` says, and the
suite and all that it starts share what is compiled, in .pytest_cache/jax. An XLA_FLAGS of the
environment is left alone: `make test-optimised` sets an empty one and compiles as users do.
"""

import gc
import os
import pathlib
import signal
import subprocess

from runner import XLA_FLAGS

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jaxtyping
import pytest

# Checks the annotations of `ops`, and is there when they are imported first. It is switched on
# in the tests of `ops` only: see `ops/conftest.py`.
jaxtyping.install_import_hook("memoryformer.ops", "beartype.beartype")
jaxtyping.config.update("jaxtyping_disable", True)

jax.config.update("jax_numpy_rank_promotion", "raise")
# `make test &` starts with Ctrl-C ignored, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish():
    gc.freeze()  # pytest then collects five times, all that was ever compiled


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """The workdir of one toy run of 20 steps; its corpus and cache lie beside it."""
    import toy  # it imports jax's users, which must come after the settings above

    return toy.trained(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Toy runs in processes of their own, at the price of a fork; see `world.World`."""
    from world import World

    with World(tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.fixture(scope="session")
def runner(world):
    """Runs commands at the price of a fork; see `runner.Runner.command`."""
    return world.runner


@pytest.fixture
def store_url(tmp_path, monkeypatch):
    """A folder in an object store of this process; leases are short, copies in `tmp_path`."""
    import fsspec

    from memoryformer.files import lease

    monkeypatch.setenv("MEMORYFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "LEASE", 1.0)
    yield "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB of its own."""
    if os.geteuid():
        pytest.skip("mounting needs root; a limit on file size is tested instead")
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine forbids mounting")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)
