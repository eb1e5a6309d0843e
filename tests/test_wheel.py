"""The wheel, installed into an empty environment, trains from an empty folder."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import toy

import memoryformer

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = (
    "memoryformer",
    "configs",
    "pyproject.toml",
    "setup.py",
    "requirements.txt",
    "README.md",
    "LICENSE",
)
TINY = {
    "data.source": "text",
    "data.path": "corpus",
    "data.tokenizer": "bytes",
    "model.vocab_size": toy.VOCAB,
    "model.embed_dim": 32,
    "model.num_layers": 1,
    "model.seq_len": 32,
    "train.num_steps": 3,
    "train.log_every": 1,
    "optimizer.warmup_steps": 1,
    "eval.num_batches": 2,
}


def run(*words, folder, **environment):
    """Standard output of a command that must succeed; nothing of this checkout is found."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.slow
def test_wheel_in_an_empty_environment(tmp_path):
    """Import, a dry run of a shipped config, three training steps, an evaluation.

    Mutations: "memoryformer.configs" left out of setup.py; the .cc files out of the
    package data; `shipped` without the folder of a wheel.
    """
    source, venv, folder = (tmp_path / name for name in ("source", "venv", "empty"))
    source.mkdir()
    folder.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", source, folder=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", venv, folder=tmp_path)
    python, script = venv / "bin" / "python", venv / "bin" / "memoryformer"
    run(python, *pip[1:], "install", wheel, folder=tmp_path)

    code = (
        "import memoryformer, pathlib; print(memoryformer.__version__);"
        "folder = pathlib.Path(memoryformer.__file__).parent;"
        "print(*(f.name for f in folder.rglob('*') if f.suffix in ('.cc', '.css', '.typed')))"
    )
    version, files = run(python, "-c", code, folder=folder).splitlines()
    assert version == memoryformer.__version__
    package = (ROOT / "memoryformer").rglob("*")
    shipped = [p.name for p in package if p.suffix in (".cc", ".css", ".typed")]
    assert sorted(files.split()) == sorted(shipped)

    said = run(
        script,
        "dryrun",
        "--config=memoryformer_tiny",
        "--compile=none",
        folder=folder,
    )
    assert "parameters" in said

    toy.corpus(folder / "corpus")
    overrides = [f"--config.{key}={value}" for key, value in TINY.items()]
    said = run(
        script,
        "train",
        "--config=quickstart",
        "--workdir=run",
        *overrides,
        folder=folder,
        MEMORYFORMER_DATA=str(tmp_path / "cache"),
        JAX_NUM_CPU_DEVICES="1",
    )
    assert "step" in said and "loss" in said, said
    said = run(script, "eval", "--workdir=run", folder=folder)
    assert '"step": 3' in said
