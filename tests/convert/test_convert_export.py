"""Our own export: exact round trips, stated error bounds, and the reader beside it."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import toy

from memoryformer import convert, errors, model
from memoryformer.convert import (
    export,
    reference_reader,
    safetensors_file,
    transfer,
    trees,
)
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.harness import scoring
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment, loop

DENSE = dict(projection="dense", output_projection=True)
CASES = {
    "paper": dict(),
    "released": dict(
        score="l1_softmax", projection_options={"memory_bias": True, "bias_std": 0.1}
    ),
    "learned_tied": dict(score="learned", tie_embeddings=True, rotary_fraction=1.0),
    "eq13_l1": dict(
        score="l1",
        residual="eq13",
        ffn_activation="gelu",
        projection_options={"extra_bits": 1},
    ),
    "constant_out": dict(score="constant", output_projection=True),
    "flat": dict(projection_options={"temperature": 0.5}),
    "pythia": dict(
        DENSE,
        norm="layernorm",
        norm_eps=1e-5,
        residual="parallel",
        ffn_activation="gelu",
    ),
    "dense_tanh": dict(DENSE, ffn_activation="gelu_tanh", rotary_fraction=0.0),
}


def make(case="paper"):
    config = model.ModelConfig(
        vocab_size=37,
        embed_dim=24,
        num_layers=2,
        num_heads=3,
        seq_len=16,
        code_bits=4,
        **CASES[case],
    )
    rng = np.random.default_rng(0)

    def noisy(array):  # norms of 1 and biases of 0 would hide a mistake
        noise = rng.normal(scale=0.1, size=array.shape)
        return (np.asarray(array) + noise).astype(np.float32)

    return config, jax.tree.map(noisy, model.init(config))


@pytest.mark.parametrize("case", CASES)
def test_reader_equals_the_model_and_the_file_is_exact(tmp_path, case):
    """Logits <= 1e-5 and argmax equal at two lengths, greedy text equal, same bits back.

    Red when the reader swaps a rotary pair, forgets a bias, takes another epsilon or
    reads the bits of a code in the other order.
    """
    config, params = make(case)
    convert.save_export(tmp_path, config, params)
    again, read = convert.load_export(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    reader = reference_reader.load(tmp_path)
    rng = np.random.default_rng(1)
    forward = jax.jit(lambda t: model.forward(config, params, t))
    tokens = rng.integers(0, 37, (2, 16), dtype=np.int32)
    expected = np.asarray(forward(tokens))
    for length in (5, 16):  # what comes later changes nothing before
        actual, wanted = reader.logits(tokens[:, :length]), expected[:, :length]
        np.testing.assert_allclose(actual, wanted, atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(actual.argmax(-1), wanted.argmax(-1))
    for i in range(3, 16):
        tokens[0, i] = np.asarray(forward(tokens))[0, i - 1].argmax()
    assert reader.greedy(tokens[0, :3], 13) == tokens[0, 3:].tolist()


@pytest.mark.parametrize("tables", ["bfloat16", "int8"])
def test_narrow_tables_stay_within_their_bounds(tmp_path, tables):
    """Each entry within its stated bound, one within half of it; the rest is exact.

    Red when the scale is taken per table instead of per row, when values are truncated
    instead of rounded, or when a norm or the head is narrowed too.
    """
    config, params = make("released")
    table = params["blocks"]["0"]["ffn"]["up"]["tables"]
    table[0, 3] = 0  # a row of zeros
    table[1] *= 1e-3  # and small ones
    convert.save_export(tmp_path, config, params, tables=tables)
    _, read = convert.load_export(tmp_path)
    flat, narrow = trees.flatten(params), trees.flatten(read)
    for path, array in flat.items():
        error = np.abs(array - narrow[path])
        if not path.endswith("tables"):
            assert not error.any()
            continue
        if tables == "int8":
            bound = np.abs(array).max(-1, keepdims=True) / 254 * (1 + 1e-5)
        else:
            bound = np.abs(array) / 256
        assert (error <= bound).all()
        assert error.max() > 0.5 * bound.max() / 2
    reader = reference_reader.load(tmp_path)
    tokens = np.arange(10)[None]
    expected = toy.forward(config, read, tokens)
    np.testing.assert_allclose(reader.logits(tokens), expected, atol=1e-5, rtol=1e-5)
    # Narrowing what is narrow already changes nothing more.
    convert.save_export(tmp_path / "2", config, read, tables=tables)
    _, twice = convert.load_export(tmp_path / "2")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=0), twice, read
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(mixer="linear", mixer_options=None),
        dict(mixer_options={"logit_transform": "dape_v2"}),
        dict(causal=False),
    ],
)
def test_reader_refuses_what_it_cannot_run(tmp_path, change):
    """The file is exact for every model; the reader says what it lacks.

    Red when the reader runs another model than the one exported.
    """
    config = dataclasses.replace(make()[0], **change)
    params = model.init(config)
    convert.save_export(tmp_path, config, params)
    _, read = convert.load_export(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    with pytest.raises(ValueError, match="this reader has only"):
        reference_reader.load(tmp_path)
    if not config.causal:
        with pytest.raises(errors.ConfigError, match="predicts no next token"):
            scoring.Scorer(config, params)


def test_reader_beside_the_weights_runs_alone(tmp_path):
    """`python reader.py`, in a process without this package on its path.

    Red when the reader imports anything of ours or is not copied.
    """
    config, params = make()
    convert.save_export(tmp_path, config, params)
    command = [sys.executable, "-I", "reader.py", ".", "1,2,3", "4"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = reference_reader.load(tmp_path).greedy([1, 2, 3], 4)
    assert json.loads(result.stdout) == expected
    text = pathlib.Path(reference_reader.__file__).read_text()
    imported = [
        line for line in text.splitlines() if line.startswith(("import", "from"))
    ]
    allowed = {"json", "math", "pathlib", "sys", "numpy as np"}
    assert {line.removeprefix("import ") for line in imported} <= allowed


def test_other_safetensors_readers_agree(tmp_path):
    """The `safetensors` package reads our file and we read its, every type.

    Red when offsets, padding or a type's name are wrong.
    """
    official = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    rng = np.random.default_rng(0)
    arrays = {
        f"a{i}": (rng.normal(size=(3, i)) * 9).astype(dtype)
        for i, dtype in enumerate(safetensors_file.DTYPES.values())
        if dtype is not ml_dtypes.bfloat16
    }
    arrays["scalar"] = np.array(3, np.float32)
    safetensors_file.write(tmp_path / "ours", arrays, {"format": "np"})
    official.save_file(arrays, tmp_path / "theirs")
    ours, metadata = safetensors_file.read(tmp_path / "ours")
    assert metadata == {"format": "np"}
    for other in (
        official.load_file(tmp_path / "ours"),
        safetensors_file.read(tmp_path / "theirs")[0],
        ours,
    ):
        assert other.keys() == arrays.keys()
        for name, array in arrays.items():
            assert other[name].dtype == array.dtype
            np.testing.assert_array_equal(other[name], array)


def test_damaged_and_foreign_directories_are_refused_in_one_line(tmp_path):
    """Red when a cut file, another version or another model is read all the same."""
    with pytest.raises(errors.DataError, match=r"config\.json"):
        convert.load_export(tmp_path)
    config, params = make()
    convert.save_export(tmp_path, config, params, tables="int8")
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:50], b"", b"\xff" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(errors.DataError, match="safetensors"):
            convert.load_export(tmp_path)
    weights.write_bytes(whole)
    fields = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"version": 2}, "version=2"),
        ({"format": "other"}, "not an export"),
        ({"model": fields["model"] | {"num_layers": 3}}, r"blocks\.2"),
        ({"model": fields["model"] | {"head": 3}}, r"model\.head: unknown"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(errors.MemoryFormerError, match=message) as caught:
            convert.load_export(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(errors.ConfigError, match="--tables='int4'"):
        convert.save_export(tmp_path, config, params, tables="int4")


def make_run(workdir):
    """A run of one step on two files of text: (experiment config, data directory)."""
    text = workdir.parent / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"{i} " + "some words to train on. " * 20)
    config = experiment.default_config()
    config.model.update(
        vocab_size=257, embed_dim=16, num_layers=1, num_heads=2, seq_len=16, code_bits=4
    )
    config.data.update(
        source="text", path=str(text), tokenizer="bytes", data_dir=str(workdir.parent)
    )
    config.train.update(num_steps=2, batch_size=8, log_every=1)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=1)
    config.eval.update(num_batches=1, batch_size=8)
    loop.train(config, workdir)
    return config


def test_run_to_export_and_back_through_the_command_line(tmp_path, runner):
    """export, import: the same bits, the same config; training goes on from step 0.

    Red when the export takes another step, loses the tokenizer, or the imported state
    does not fit the trainer.
    """
    config = make_run(tmp_path / "run")
    command = ["-m", "memoryformer.convert"]
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    for arguments in (
        ["export", str(tmp_path / "run"), out],
        ["import", out, back],
    ):
        result = runner.command(*command, *arguments)
        assert result.code == 0, result
    saved, params = run_steps.load(tmp_path / "run")
    again, imported = run_steps.load(back)
    assert again.to_dict() == saved.to_dict()
    jax.tree.map(np.testing.assert_array_equal, imported, params)
    tokenizer = export.load_tokenizer(out)
    assert tokenizer.fingerprint == tokenizer_lib.byte_level().fingerprint
    assert export.source(out).values["step"] == 2

    loop.train(config, back)
    _, trained = run_steps.load(back)
    assert np.any(trained["head"]["kernel"] != params["head"]["kernel"])

    with pytest.raises(errors.ConfigError, match=r"model\.score='softmax'"):
        transfer.export_run(tmp_path / "run", tmp_path / "theirs", form="released")

    refusals = (
        (["import", out, back], 2, "holds checkpoints"),
        (["exprot", out, back], 2, "did you mean 'export'"),
        (["released", str(tmp_path / "nowhere"), out], 46, "no such directory"),
    )
    for arguments, code, message in refusals:
        result = runner.command(*command, *arguments)
        assert result.code == code, result
        assert message in result.err and result.err.count("\n") == 1


def test_pythia_from_the_hubs_cache(tmp_path, monkeypatch):
    """`hub:owner/name` resolves through huggingface_hub; the model comes out exact.

    Red when the patterns leave out the weights or the tokenizer.
    """
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    config, params = make("pythia")
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    convert.save_gpt_neox(snapshot, config, params)
    tokenizer_lib.byte_level().save(snapshot / "tokenizer.json")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    download = hub.snapshot_download
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda *a, **k: download(*a, cache_dir=tmp_path / "hub", **k),
    )
    directory = transfer.fetch("hub:owner/name")
    read_config, read = convert.load_gpt_neox(directory)
    assert read_config.num_layers == 2
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert export.load_tokenizer(directory).vocab_size == 257
    with pytest.raises(errors.DataError, match="hub:owner/absent: could not be"):
        transfer.fetch("hub:owner/absent")
