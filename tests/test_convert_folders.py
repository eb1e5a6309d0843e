"""Exports go to new or empty folders, whole or not at all, and carry their tokenizer."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import toy

from memoryformer import checkpoint, convert, errors, model
from memoryformer.convert import export, folders, runs
from memoryformer.data import tokenizer as tokenizer_lib

RELEASED = {"score": "l1_softmax", "memory_bias": True}
PYTHIA = {
    "projection": "dense",
    "norm": "layernorm",
    "residual": "parallel",
    "ffn_activation": "gelu",
    "output_projection": True,
    "rotary_fraction": 0.5,
}
SAVE = {
    "safetensors": (convert.save_export, {}, "config.json"),
    "gpt_neox": (convert.save_gpt_neox, PYTHIA, "config.json"),
    "released": (convert.save_released, RELEASED, "latest"),
}


def make(form):
    save, fields, last = SAVE[form]
    config = model.ModelConfig(
        vocab_size=257,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        seq_len=16,
        code_bits=4,
        **fields,
    )
    params = model.init(config)
    byte_level = tokenizer_lib.byte_level()
    return lambda folder: save(folder, config, params, tokenizer=byte_level), last


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize(
    "held", ["config.json", "tokenizer.json", "notes.txt", "sub/x"]
)
def test_nothing_is_written_over(tmp_path, form, held):
    """A folder that holds anything is refused and stays as it is, in every format.

    Mutation: `check_free` looks for config.json only.
    """
    (tmp_path / held).parent.mkdir(exist_ok=True)
    (tmp_path / held).write_text("mine")
    save, _ = make(form)
    with pytest.raises(errors.ConfigError, match="nothing is written over") as caught:
        save(tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files == [tmp_path / held] and files[0].read_text() == "mine"


@pytest.mark.parametrize("form", SAVE)
def test_an_export_is_whole_or_not_there(tmp_path, form, monkeypatch):
    """New, empty and linked folders, and what a killed export left, are filled; a failure
    leaves nothing.

    Mutations: `written` not sorted; the folder that was made not removed.
    """
    save, last = make(form)
    moved = []
    replace = pathlib.Path.replace

    def watched(self, target):
        if (
            self.parent.name == ".unfinished"
            and pathlib.Path(target).parent != self.parent
        ):
            moved.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", watched)
    (tmp_path / "empty").mkdir()
    (tmp_path / "killed" / ".unfinished").mkdir(parents=True)
    (tmp_path / "killed" / ".unfinished" / "half").write_text("")
    (tmp_path / "behind").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "behind")
    for name in ("new", "deep/new", "empty", "killed", "link"):
        moved.clear()
        save(tmp_path / name)
        assert moved[-1] == last and "tokenizer.json" in moved
        names = sorted(p.name for p in (tmp_path / name).iterdir())
        assert names == sorted(moved)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer_lib.Tokenizer, "save", full)
    monkeypatch.setattr(convert.gpt_neox, "_save_tokenizer", full)
    (tmp_path / "kept").mkdir()
    for name in ("gone", "kept"):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / name)
    assert not (tmp_path / "gone").exists()
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize("target", ["", "gs://bucket/x", "s3://bucket/x", "file"])
def test_targets_that_are_no_folders(tmp_path, monkeypatch, target):
    """Mutation: `"://" in name` left out: a folder called gs: is made."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("file").write_text("mine")
    with pytest.raises(errors.ConfigError, match="name a"):
        folders.check_free(target)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_is_not_exported_into_itself(toy_run, tmp_path):
    """Its folder and its checkpoints are refused before anything is read; a new folder
    inside it is fine.

    Mutation: `check_free` not called by `export_run`; the checkpoints' folder allowed.
    """
    before = (toy_run / "config.json").read_bytes()
    for form in runs.FORMATS:
        with pytest.raises(errors.ConfigError, match="nothing is written over"):
            runs.export_run(toy_run, toy_run, form=form)
        with pytest.raises(errors.ConfigError, match="among the run's checkpoints"):
            runs.export_run(toy_run, toy_run / checkpoint.FOLDER / "99", form=form)
    assert (toy_run / "config.json").read_bytes() == before
    assert not (toy_run / checkpoint.FOLDER / "99").exists()
    runs.export_run(toy_run, tmp_path / "out")
    with pytest.raises(errors.ConfigError, match="nothing is written over"):
        runs.import_run(tmp_path / "out", tmp_path / "out")
    runs.import_run(tmp_path / "out", tmp_path / "back")
    own = tokenizer_lib.load(str(tmp_path / "back" / "tokenizer.json"))
    told = checkpoint.facts(tmp_path / "back")["tokenizer"]
    assert told == {"sha256": own.fingerprint, "end_token": "<eot>"}


def test_an_import_compares_the_tokens(toy_run, tmp_path):
    """With a config of its own, an export's tokens must be those of the data.

    Mutation: `_check_same_tokens` left out.
    """
    runs.export_run(toy_run, tmp_path / "out")
    config = toy.run_config(toy_run.parent)
    runs.import_run(tmp_path / "out", tmp_path / "same", config)
    fields = export.read_config(tmp_path / "out")
    swapped = tokenizer_lib.byte_level().spec
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(swapped))
    (tmp_path / "out" / "config.json").write_text(
        json.dumps(fields | {"tokenizer_sha256": "", "end_token": ""})
    )
    with pytest.raises(errors.ConfigError, match="token 97 is b'a', there b'b'"):
        runs.import_run(tmp_path / "out", tmp_path / "other", config)
    assert not (tmp_path / "other").exists()


def test_prompts_are_not_written_over(tmp_path):
    """--output on the file of --prompts, also through a link.

    Mutation: `os.path.samefile` left out: the prompts are gone.
    """
    save, _ = make("safetensors")
    save(tmp_path / "out")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    (tmp_path / "link.jsonl").symlink_to(prompts)
    command = [sys.executable, "-m", "memoryformer.generation"]
    command += [
        f"--export={tmp_path / 'out'}",
        f"--prompts={prompts}",
        "--max_tokens=1",
    ]
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'link.jsonl'}"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )
    assert done.returncode == 2 and "is the file of prompts" in done.stderr
    assert prompts.read_text() == "one\n"
