"""Where compiled programs are kept: on by default, the environment first, and off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer.errors import ConfigError
from memoryformer.training import compilation_cache, experiment


@pytest.fixture
def untouched(monkeypatch):
    """A process that nothing has configured; the settings come back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    names += ("jax_persistent_cache_min_compile_time_secs",)
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(compilation_cache, "_chosen", None)
    for name, value in zip(names, (None, True, 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.compilation_cache.reset_cache()


def test_a_second_start_reads_what_the_first_compiled(untouched, tmp_path):
    """One file more for each program, none when it is compiled again; off keeps none.

    Mutations: `reset_cache` left out; 'off' taken for a directory.
    """

    def compile_anew():
        return np.asarray(jax.jit(lambda x: jnp.sin(x) * 3)(np.ones(8, np.float32)))

    def kept():
        return sorted(path.name for path in tmp_path.rglob("jit__lambda*-cache"))

    told = compilation_cache.use_cache(str(tmp_path))
    assert str(tmp_path) in told and "train.compilation_cache" in told
    first = compile_anew()
    names = kept()
    assert len(names) == 1
    jax.clear_caches()
    np.testing.assert_array_equal(compile_anew(), first)
    assert kept() == names
    assert compilation_cache.use_cache("off") == "compiled programs are not kept"
    assert jax.config.jax_compilation_cache_dir is None
    jax.clear_caches()
    jax.jit(lambda x: jnp.cos(x) * 5)(np.ones(8, np.float32)).block_until_ready()
    assert kept() == names


def test_the_environment_comes_first(untouched, tmp_path):
    """Mutation: `present` not looked at."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert str(tmp_path) in compilation_cache.use_cache("off")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    jax.config.update("jax_enable_compilation_cache", False)
    assert "JAX_ENABLE_COMPILATION_CACHE" in compilation_cache.use_cache("elsewhere")


def test_bad_directories_are_one_line(untouched, tmp_path):
    """Mutation: the `OSError` of mkdir let through."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Not a directory; name a directory"):
        compilation_cache.use_cache(str(tmp_path / "file"))
    config = toy.run_config(tmp_path, **{"train.compilation_cache": ""})
    with pytest.raises(ConfigError, match="or 'off' for none"):
        experiment.resolve(config)
    assert experiment.TrainConfig(1, 1).compilation_cache == compilation_cache.DEFAULT


def test_cpus_are_told_apart(untouched, tmp_path, monkeypatch):
    """A home shared by two kinds of CPU. Mutation: one folder for all."""
    here = compilation_cache._folder(str(tmp_path))
    monkeypatch.setattr(compilation_cache.platform, "machine", lambda: "another")
    assert compilation_cache._folder(str(tmp_path)) != here
