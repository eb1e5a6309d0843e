"""Exports go to new or empty folders, whole or not at all, and carry their tokenizer."""

import json
import pathlib

import pytest
import tokenizers
import toy

from memoryformer import convert, errors, model
from memoryformer.convert import __main__ as command
from memoryformer.convert import export, folders, gpt_neox, transfer
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.generation import __main__ as generation
from memoryformer.runs import steps as run_steps

RELEASED = {"score": "l1_softmax", "projection_options": {"memory_bias": True}}
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
    """Mutation: `pathlib.Path` for `paths.local`: a folder called gs: is made."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("file").write_text("mine")
    with pytest.raises(errors.ConfigError, match=r"TO='.*name a|mount|is a file"):
        folders.check_free(target)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_is_not_exported_into_itself(toy_run, tmp_path):
    """Its folder and its checkpoints are refused before anything is read; a new folder
    inside it is fine.

    Mutation: `check_free` not called by `export_run`; the checkpoints' folder allowed.
    """
    before = (toy_run / "config.json").read_bytes()
    for form in transfer.FORMATS:
        with pytest.raises(errors.ConfigError, match="nothing is written over"):
            transfer.export_run(toy_run, toy_run, form=form)
        with pytest.raises(errors.ConfigError, match="among the run's checkpoints"):
            transfer.export_run(toy_run, toy_run / run_steps.FOLDER / "99", form=form)
    assert (toy_run / "config.json").read_bytes() == before
    assert not (toy_run / run_steps.FOLDER / "99").exists()
    transfer.export_run(toy_run, tmp_path / "out")
    with pytest.raises(errors.ConfigError, match="nothing is written over"):
        transfer.import_run(tmp_path / "out", tmp_path / "out")
    transfer.import_run(tmp_path / "out", tmp_path / "back")
    own = tokenizer_lib.load(str(tmp_path / "back" / "tokenizer.json"))
    told = run_steps.facts(tmp_path / "back")["tokenizer"]
    assert told == {"sha256": own.fingerprint, "end_token": "<eot>"}


def test_an_import_compares_the_tokens(toy_run, tmp_path):
    """With a config of its own, an export's tokens must be those of the data.

    Mutation: `_check_same_tokens` left out.
    """
    transfer.export_run(toy_run, tmp_path / "out")
    config = toy.run_config(toy_run.parent)
    transfer.import_run(tmp_path / "out", tmp_path / "same", config)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    swapped = tokenizer_lib.byte_level().spec
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(swapped))
    (tmp_path / "out" / "config.json").write_text(
        json.dumps(fields | {"tokenizer_sha256": "", "end_token": ""})
    )
    with pytest.raises(errors.ConfigError, match="token 97 is b'a', there b'b'"):
        transfer.import_run(tmp_path / "out", tmp_path / "other", config)
    assert not (tmp_path / "other").exists()


def test_what_is_read_is_not_written_over(tmp_path, capsys):
    """--output on the file of --prompts, also through a link, and on the model's own.

    Mutation: `runs.directory.check_output` not called: the prompts are gone, or the model.
    """
    save, _ = make("safetensors")
    save(tmp_path / "out")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    before = (tmp_path / "out" / "config.json").read_bytes()
    (tmp_path / "link.jsonl").symlink_to(prompts)
    words = [f"--export={tmp_path / 'out'}", f"--prompts={prompts}", "--max_tokens=1"]
    for output in (tmp_path / "link.jsonl", tmp_path / "out" / "config.json"):
        assert generation_command(*words, f"--output={output}") == 2
        assert "which would be written over" in capsys.readouterr().err
    assert prompts.read_text() == "one\n"
    assert (tmp_path / "out" / "config.json").read_bytes() == before


def with_end(name):
    """A tokenizer of bytes whose documents end with the added token `name`."""
    spec = json.loads(json.dumps(tokenizer_lib.byte_level().spec))
    known = tokenizer_lib.byte_level().end_token
    return tokenizer_lib.Tokenizer(json.dumps(spec).replace(known, name), "own", name)


@pytest.mark.parametrize("end", ["<end of text>", "<e:t>", "$end", "END"])
def test_any_end_token_goes_out_and_comes_in(tmp_path, end):
    """Mutations: the token's own name in the template; `end_token` not handed on."""
    save, fields, _ = SAVE["gpt_neox"]
    config = model.ModelConfig(
        vocab_size=257, embed_dim=16, num_layers=1, num_heads=2, seq_len=16, **fields
    )
    tokenizer = with_end(end)
    save(tmp_path / "theirs", config, model.init(config), tokenizer=tokenizer)
    written = (tmp_path / "theirs" / "tokenizer.json").read_text()
    theirs = tokenizers.Tokenizer.from_str(written)
    assert theirs.encode("ab").tokens == [end, "a", "b"]
    assert theirs.encode("a", "b").tokens == [end, "a", end, "b"]
    assert convert_command("gpt_neox", tmp_path / "theirs", tmp_path / "out") == 0
    assert export.own_tokenizer(tmp_path / "out", 257).end_token == end


def convert_command(*words):
    return code_of(command.main, "convert", *words)


def generation_command(*words):
    return code_of(generation.main, "generation", *words)


def code_of(main, *words):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return ended.value.code or 0


def test_where_the_end_of_a_document_is_named(tmp_path):
    """tokenizer_config.json, a string or a token of its own, then an added token's number.

    Mutation: the number taken where it is no added token's: transformers' default is 2.
    """
    tokenizer = with_end("<mine>")
    tokenizer.save(tmp_path / "tokenizer.json")
    beside, config = tmp_path / "tokenizer_config.json", tmp_path / "config.json"
    for number, found in ((tokenizer.eot_id, "<mine>"), (2, ""), (None, "")):
        config.write_text(json.dumps({"eos_token_id": number}))
        assert gpt_neox.end_token(tmp_path) == found
    config.write_text(json.dumps({"eos_token_id": tokenizer.eot_id}))
    for value, found in (("x", "x"), ({"content": "y"}, "y"), (None, "<mine>")):
        beside.write_text(json.dumps({"eos_token": value}))
        assert gpt_neox.end_token(tmp_path) == found
    beside.write_text(json.dumps({"eos_token": 3}))
    with pytest.raises(errors.DataError, match="eos_token=3: expected a string"):
        gpt_neox.end_token(tmp_path)


def test_the_flag_wins_over_the_files(tmp_path, capsys):
    """Mutation: the files' token first."""
    save, _ = make("gpt_neox")
    save(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"eos_token": "none"}')
    words = ("gpt_neox", tmp_path / "theirs", tmp_path / "out")
    assert convert_command(*words) == 2
    told = capsys.readouterr().err
    assert "--end_token='none'" in told and "data.end_token" not in told
    end = tokenizer_lib.byte_level().end_token
    assert convert_command(*words, f"--end_token={end}") == 0
    assert export.own_tokenizer(tmp_path / "out", 257).end_token == end


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpt_neox", "x", "y", "--step=1"], "--step: gpt_neox does not look at it"),
        (["gpt_neox", "x", "y", "--released_config=z"], "--released_config: gpt_neox"),
        (["released", "x", "y", "--to=gpt_neox"], "--to: released does not"),
        (["released", "x", "y", "--revision=a"], "--revision: is of a hub repository"),
        (["export", "x", "y", "--end_token=a"], "--end_token: export does not"),
        (["export", "x", "y", "--to=gpt_neox", "--tables=int8"], "--tables: only"),
        (["import", "x", "y", "--tables=int8"], "--tables: import does not"),
    ],
)
def test_flags_that_would_be_ignored(tmp_path, monkeypatch, capsys, words, message):
    """Mutation: `_refuse_unused_flags` not called."""
    monkeypatch.chdir(tmp_path)
    assert convert_command(*words) == 2
    assert message in capsys.readouterr().err
