"""Paths: work as they are written, or refused in a line before anything is made."""

import glob
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from absl import flags

from memoryformer import cli, data
from memoryformer import config as config_lib
from memoryformer.data import listing
from memoryformer.errors import ConfigError, StorageError
from memoryformer.files import paths
from memoryformer.runs import checkpoint, manifest, orbax_files
from memoryformer.runs import steps as run_steps
from memoryformer.sweep import points
from memoryformer.training import compilation_cache, experiment, loop

REFUSED = {
    "": "an empty path",
    "gs://bucket/run": "mount the store",
    "s3://bucket/run": "mount the store",
    "file:///tmp/run": "mount the store",
    "gs:/bucket": "mount the store",  # what pathlib makes of it
    "~nobody-of-that-name/run": "no such home folder",
    "new\nline": "not text",
    "a\0b": "not text",
    "a\udcffb": "not text",
    "a\u2028b": "not text",
}
# What checkpoints are saved to and read from; see `WRONG` for what they cannot.
NAMES = [
    "with space",
    "naïve_日本",
    "a#b%20c&d",
    "q'u\"o",
    "pi|pe:;,=@",
    "a]b{x}",
    "$HOME",
]
WRONG = ["[x]", "a[b", "a*b", "a?b", "back\\slash"]
STATE = {"step": jnp.int32(3), "params": {"a": jnp.arange(8.0)}, "opt": (jnp.ones(2),)}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_path_here(text):
    """Mutation: `_STORE` that wants two slashes; `RuntimeError` let through."""
    with pytest.raises(ConfigError, match=REFUSED[text]) as caught:
        paths.local(text, "--workdir")
    assert str(caught.value).startswith("--workdir=") and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=REFUSED[text]):
        paths.workdir(text)


def test_home_and_links(tmp_path, monkeypatch):
    """`~` is the home folder; a link is as good as what it names, and may name more.

    Mutation: `expanduser` left out; `resolve` for `absolute`.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.local("~/a/", "x") == tmp_path / "a"
    assert paths.local("hub:a/b", "x") == pathlib.Path("hub:a/b")
    odd = tmp_path / "odd[1]"
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    assert paths.workdir(tmp_path / "link") == tmp_path / "link"
    monkeypatch.chdir(odd)
    with pytest.raises(ConfigError, match=r"holds '\['"):
        paths.workdir("run")  # an absolute path is what counts


def saved(workdir):
    settings = checkpoint.CheckpointConfig()
    facts = {"run_config": {"a": 1}, "data_fingerprint": "x"}
    with checkpoint.Checkpointer(workdir, settings, **facts) as one:
        one.save(3, STATE, wait=True)
    with checkpoint.Checkpointer(workdir, settings, **facts) as one:
        return one.restore_latest(STATE)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_come_back_from_odd_names(tmp_path, name):
    """Mutation: any of these letters in `_PATTERN`."""
    step, state = saved(tmp_path / name)
    assert step == 3
    np.testing.assert_array_equal(state["params"]["a"], STATE["params"]["a"])
    params = run_steps.load(tmp_path / name)[1]
    np.testing.assert_array_equal(params["a"], STATE["params"]["a"])


@pytest.mark.parametrize("name", WRONG)
def test_names_that_are_patterns_are_refused(tmp_path, name):
    """By the checkpointer, by training and by a sweep; nothing is made.

    Mutation: `local` for `workdir` in any of them.
    """
    with pytest.raises(ConfigError, match="could not be read again"):
        saved(tmp_path / name)
    with pytest.raises(ConfigError, match="could not be read again"):
        loop.train(toy.run_config(tmp_path), tmp_path / name)
    config = toy.config_file(tmp_path)
    config.write_text(config.read_text() + "\ndef sweep_one():\n    yield {}\n")
    with pytest.raises(ConfigError, match=r"--root=.*could not be read again"):
        points.expand(str(config), ["one"], tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_step_counts_once_it_was_found_again(tmp_path, monkeypatch):
    """The path check passed over: Orbax takes `[x]` for a pattern and merges nothing.

    Every file is there, byte for byte, and the save fails all the same. Mutation: no
    `runs.orbax_files.read` in `_finalise`.
    """
    monkeypatch.setattr(paths, "workdir", lambda path: pathlib.Path(path))
    with pytest.raises(StorageError, match="cannot be read again"):
        saved(tmp_path / "[x]")
    (folder,) = glob.glob(glob.escape(str(tmp_path / "[x]")) + "/checkpoints/3")
    assert not manifest.exists(pathlib.Path(folder))


def test_a_leaf_of_every_kind_is_read(tmp_path):
    """The smallest array of each, a scalar where there is no array.

    Mutation: `not in chosen` without the comparison of sizes.
    """
    state = {
        "n": jnp.int32(1),
        "p": {"a": jnp.ones(9), "b": jnp.ones(2), "c": jnp.ones(())},
    }
    found = orbax_files.samples(state)
    assert found["n"].shape == () and found["p"]["b"].shape == (2,)
    kept = [x for x in jax.tree.leaves(found) if hasattr(x, "shape")]
    assert len(kept) == 2


FIELDS = (
    "data.path",
    "data.source_options.validation_path",
    "data.data_dir",
    "train.compilation_cache",
)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("text", ["gs://bucket/x", "~nobody-of-that-name", "a\nb"])
def test_fields_are_checked_as_the_config_is_read(tmp_path, field, text):
    """Mutation: a field left out of `DataConfig`'s check."""
    with pytest.raises(ConfigError, match=f"^{field}="):
        experiment.resolve(toy.run_config(tmp_path, **{field: text}))


def test_a_tokenizer_on_a_store_is_refused(tmp_path):
    """Mutation: `pathlib.Path(spec)`, which makes one slash of two."""
    with pytest.raises(ConfigError, match=r"^data\.tokenizer='gs://.*mount"):
        data.tokenizer.load("gs://bucket/tokenizer.json")


def test_a_corpus_whose_name_is_a_pattern(tmp_path):
    """A folder or file that is there is meant as it is written; then a glob is one.

    Mutation: `has_magic` asked first.
    """
    for name in ("[x]", "a*b ü'"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.txt").write_text("text")
        assert [key for key, _ in listing.list_files(str(tmp_path / name))] == ["t.txt"]
    assert len(listing.list_files(f"{glob.escape(str(tmp_path))}/*/*.txt")) == 2


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    """The default cache is done without; one that was chosen stops training, not others.

    Mutation: `directory != DEFAULT` left out.
    """
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(compilation_cache, "_chosen", None)
    before = (
        jax.config.jax_enable_compilation_cache,
        jax.config.jax_compilation_cache_dir,
    )
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert "are not kept" in compilation_cache.use_cache(compilation_cache.DEFAULT)
        chosen = str(tmp_path / "file" / "x")
        assert "Not a directory" in compilation_cache.use_cache(chosen, required=False)
        with pytest.raises(ConfigError):
            compilation_cache.use_cache(chosen)
    finally:
        jax.config.update("jax_enable_compilation_cache", before[0])
        jax.config.update("jax_compilation_cache_dir", before[1])


def run(define, words, main=lambda argv: None):
    with pytest.raises(SystemExit) as ended:
        cli.run_main(main, define, ["x", *words])
    return ended.value.code or 0


def test_flags_of_paths_and_configs(tmp_path, monkeypatch, capsys):
    """Checked as they are read, in our words; gone when the command ends.

    Mutation: `error.__context__` not looked at; flags left defined.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    toy.config_file(tmp_path)
    found = []

    def define():
        cli.define_path_flag("output", "A file.")
        cli.define_config_flag()

    def note(argv):
        found.append((flags.FLAGS.output, flags.FLAGS.config.train.seed))

    words = ["--output=~/x", "--config=~/toy_config.py", "--config.train.seed=4"]
    assert run(define, words, note) == 0
    assert found == [(f"{tmp_path}/x", 4)]
    assert "output" not in flags.FLAGS
    for word, message in (
        ("--output=", "error: --output='': an empty path"),
        ("--output=gs://x/y", "error: --output='gs://x/y': only folders"),
        ("--config=~/no.py", "error: --config=~/no.py: there is no file '~/no.py'."),
        (f"--config={tmp_path}", "(it is a folder)."),
        ("--config=a:b.py", "what follows a colon is the config's argument."),
    ):
        for more in ([], ["--config.train.seed=1"] if "config" in word else []):
            assert run(define, [word, *more]) == 2
            line = capsys.readouterr().err
            assert message in line and line.count("\n") == 1, line
    assert run(define, ["--flagfile=/none"]) == 2
    assert "Unable to open flagfile" in capsys.readouterr().err
    assert run(define, ["--help"]) == 0


CONFIGS = {
    "def get_config(:\n": "line 1: SyntaxError|: SyntaxError",
    "x = 1\n": r"defines no get_config\(\)",
    "def get_config():\n    return 1 // 0\n": "line 2: ZeroDivisionError",
    "def get_config():\n    return {}\n": "returns dict, not a ConfigDict",
    "def get_config():\n    pass\n": "returns NoneType",
    "import nothing_of_that_name\n": "line 1: ModuleNotFoundError",
    "import sys\nsys.exit(3)\n": "line 2: SystemExit",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_config_files_that_make_none(tmp_path, text):
    """Mutation: `SystemExit` not caught; the colon's text split at its commas."""
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=CONFIGS[text]) as caught:
        config_lib.load(str(path))
    assert "\n" not in str(caught.value)


def test_what_follows_the_colon_is_the_argument(tmp_path):
    """All of it, whatever it holds.

    Mutation: anything taken for an override.
    """
    path = tmp_path / "config.py"
    path.write_text(
        "import ml_collections\n"
        "def get_config(x='none'):\n    return ml_collections.ConfigDict({'x': x})\n"
    )
    assert config_lib.load(str(path)).x == "none"
    for argument in ("mini", "a,b=c", ",train.seed=1", "x:y", "data.path=/a,b.txt"):
        assert config_lib.load(f"{path}:{argument}").x == argument


def test_who_owns_expansion():
    """One function expands `~`; ops, which import nothing of ours, have their own.

    Mutation: `expanduser` anywhere else.
    """
    root = pathlib.Path(paths.__file__).parents[1]
    found = [p for p in root.rglob("*.py") if "expanduser" in p.read_text("utf-8")]
    names = {os.path.relpath(p, root) for p in found}
    assert names == {"files/paths.py", "ops/lookup/native.py"}
