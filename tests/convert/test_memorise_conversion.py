"""A whole dense model as memory layers: a run that goes on, stopped and gone on with, refused."""

import dataclasses
import io
import json
import shlex
import sys

import jax
import numpy as np
import oracle
import pytest
import toy

from memoryformer import cli, data, errors, model
from memoryformer import config as config_lib
from memoryformer.convert import __main__ as command
from memoryformer.convert import export, gpt_neox, memorise, transfer
from memoryformer.convert.memorise import activations, batches, conversion, fit
from memoryformer.convert.memorise.options import Options
from memoryformer.model import parts
from memoryformer.training import evaluate_run, experiment, loop

DENSE = {
    "model.projection": "dense",
    "model.num_layers": 2,
    "model.output_projection": True,
    "model.ffn_activation": "gelu",
    "model.residual": "parallel",
    **{f"model.{part}_std": 0.4 for part in ("embed", "mixer", "ffn", "head")},
    "model.projection_options.output_std": 0.4,
}
ALL = Options(
    parts="qkv,output,ffn",
    bits="4",
    tokens=2048,
    mix="ffn=none+hadamard",
    eval_batches=0,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run of two layers, at step 0: training it would compile."""
    folder = tmp_path_factory.mktemp("dense")
    toy.corpus(folder / "corpus")
    run = experiment.resolve(toy.run_config(folder, **DENSE))
    dataset = data.load(run.data)
    params = model.init(run.model)
    about = (dataset.fingerprint, dataset.tokenizer)
    transfer.begin_run(folder / "run", run, params, *about)
    return folder / "run"


@pytest.fixture(scope="module")
def converted(dense, tmp_path_factory):
    """All of it as memory layers: (workdir, what is told)."""
    workdir = tmp_path_factory.mktemp("memorised") / "run"
    return workdir, conversion.memorise(dense, workdir, ALL)


def test_the_result_is_a_run(dense, converted):
    """It evaluates to the loss that was told, trains on and exports.

    Mutations: a part put into another layer; the bias left out; `memory_bias` not set.
    """
    workdir, told = converted
    run, params, facts = experiment.load(workdir)
    assert facts["step"] == 0 and not (workdir / conversion.FOLDER).exists()
    assert run.model.projection_options.parts == told["model_parts"]
    for layer in range(2):
        kinds = [part.kind for part in parts.of_layer(run.model, layer)]
        assert kinds == ["memory", "memory", "memory_block"]
    loss = evaluate_run.evaluate_checkpoint(workdir)["val/loss"]
    assert loss == pytest.approx(told["loss_after"], rel=1e-5)
    before = evaluate_run.evaluate_checkpoint(dense)["val/loss"]
    assert before == pytest.approx(told["loss_before"], rel=1e-5)
    assert json.loads((workdir / "memorise.json").read_text()) == told
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert told["after"]["parameters"] == total
    assert told["after"]["bytes_a_token"] < told["before"]["bytes_a_token"]


def test_the_flags_that_train_on(dense, converted):
    """They make the dense model's config that of the run. Mutation: any of them left out."""
    workdir, told = converted
    words = [w.removeprefix("--config.") for w in shlex.split(told["go_on_with"])]
    fields = dict(word.split("=", 1) for word in words)
    for name, read in (("memory_bias", bool), ("output_std", float)):
        fields[f"model.projection_options.{name}"] = read(
            fields[f"model.projection_options.{name}"]
        )
    config = toy.run_config(dense.parent, **DENSE)
    config_lib.override(config, fields)
    run, _, _ = experiment.load(workdir)
    assert experiment.resolve(config).model == run.model


def test_tables_are_the_best_for_the_model_converted_so_far(dense, converted):
    """What is told of the last part, from the definition: the part before it is converted.

    It is a sum of two layers, fitted together. Mutations: activations of the dense model; the
    threshold left out; the bits of another part; the tables of a sum the other way round.
    """
    workdir, told = converted
    run, params, _ = experiment.load(workdir)
    original, theirs, _ = experiment.load(dense)
    wide = {**params["blocks"]["1"], "ffn": theirs["blocks"]["1"]["ffn"]}
    blocks = {**params["blocks"], "1": wide}
    half = activations.Subject(
        parts.mixed(run.model, {
            0: parts.of_layer(run.model, 0),
            1: parts.of_layer(run.model, 1)._replace(ffn=parts.Part("dense", 4)),
        }),
        {**params, "blocks": blocks},
    )  # fmt: skip
    source = conversion.source_lib.load(dense, None)
    others = batches.Batches(source, ALL).others()
    pairs = [activations.observe(half, 1, "ffn", batch) for batch in others]
    inputs, outputs = (np.concatenate(each) for each in zip(*pairs, strict=True))
    terms = params["blocks"]["1"]["ffn"]["terms"]
    assert "signs" in terms["1"]["front"] and "signs" not in terms["0"]["front"]
    fitted = terms["0"]["bias"]
    for layer in terms.values():
        z = oracle.front(layer["front"], inputs).reshape(len(inputs), 4, 4)
        codes = ((z >= 0) * [8, 4, 2, 1]).sum(-1)
        fitted = fitted + sum(
            np.abs(z[:, k]).sum(-1, keepdims=True) * layer["tables"][k, codes[:, k]]
            for k in range(4)
        )
    left = np.square(outputs - fitted).sum()
    left /= np.square(outputs - outputs.mean(0)).sum()
    assert left == pytest.approx(told["parts"][-1]["unexplained"], rel=1e-3)
    assert left < 0.5
    assert original.model.projection == "dense"


def test_a_stopped_conversion_goes_on(dense, converted, tmp_path, monkeypatch):
    """At the part where it was, to the same parameters; another conversion is refused.

    Mutations: parts that are kept fitted again; the settings not compared.
    """
    real, fitted = conversion._fitted, []

    def stop_at_the_third(*args):
        if len(fitted) == 3:
            raise KeyboardInterrupt
        fitted.append(args[2:4])
        return real(*args)

    monkeypatch.setattr(conversion, "_fitted", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        conversion.memorise(dense, tmp_path / "run", ALL)
    monkeypatch.setattr(conversion, "_fitted", real)
    with pytest.raises(errors.ConfigError, match="holds another conversion"):
        conversion.memorise(dense, tmp_path / "run", Options(bits="4", tokens=2000))
    calls = []
    monkeypatch.setattr(
        conversion, "_fitted", lambda *args: calls.append(args[2:4]) or real(*args)
    )
    told = conversion.memorise(dense, tmp_path / "run", ALL)
    assert calls == [(1, "qkv"), (1, "output"), (1, "ffn")]
    again, whole = (experiment.load(w)[1] for w in (tmp_path / "run", converted[0]))
    assert model.fingerprint(again) == model.fingerprint(whole)
    assert told["loss_after"] == converted[1]["loss_after"]
    with pytest.raises(errors.ConfigError, match="holds checkpoints"):
        conversion.memorise(dense, tmp_path / "run", ALL)


@pytest.mark.slow
def test_from_gpt_neox_to_ten_more_steps(dense, tmp_path):
    """A folder as transformers writes it, half converted, trained on, exported.

    Mutations: the model of --config taken; the tokens of --config not compared.
    """
    run, _, _ = experiment.load(dense)
    origin = tmp_path / "neox"
    layernorm = {"norm": "layernorm", "norm_eps": 1e-5}
    theirs = model.ModelConfig(**{
        **{f: getattr(run.model, f) for f in run.model.__dataclass_fields__},
        **layernorm,
    })  # fmt: skip
    fresh = jax.tree.map(np.asarray, model.init(theirs))
    gpt_neox.save_gpt_neox(origin, theirs, fresh)
    config = toy.run_config(dense.parent, **{"train.num_steps": 10})
    chosen = Options(parts="ffn", layers="1", bits="4", tokens=2048, mix="auto")
    with pytest.raises(errors.ConfigError, match="give --config=FILE"):
        conversion.memorise(origin, tmp_path / "run", chosen)
    conversion.memorise(origin, tmp_path / "run", chosen, config)
    made, before, _ = experiment.load(tmp_path / "run")
    assert (
        made.model.norm == "layernorm"
        and made.model.projection_options.parts.startswith("ffn@1=")
    )
    loop.train(experiment.as_dict(made), tmp_path / "run")
    _, after, facts = experiment.load(tmp_path / "run")
    assert facts["step"] == 10
    moved = (
        before["blocks"]["1"]["ffn"]["tables"] != after["blocks"]["1"]["ffn"]["tables"]
    )
    assert moved.any()
    transfer.export_run(tmp_path / "run", tmp_path / "export", tables="int8")
    config, _ = export.load_export(tmp_path / "export")
    assert config == made.model


def test_a_model_that_transformers_wrote(dense, tmp_path):
    """A random GPTNeoXForCausalLM of theirs: half converted, ten steps, exported.

    Part of `make test-peers`. Mutations: the loss told of the model before; W_O of theirs taken
    for the feed-forward layer; parameters of another layer trained.
    """
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 16}
    theirs = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(vocab_size=toy.VOCAB, **sizes)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    fields = {"train.num_steps": 10, "eval.every_steps": 0, "eval.num_batches": 0}
    config = toy.run_config(dense.parent, **fields)
    chosen = Options(parts="ffn", bits="4", tokens=1024, eval_batches=0)
    told = conversion.memorise(tmp_path / "theirs", tmp_path / "run", chosen, config)
    source = conversion.source_lib.load(tmp_path / "theirs", config)
    batch = batches.Batches(source, chosen).validation[0]
    keep = (batch["segment_ids"] == batch["segment_ids"][:, :1]).all(1)  # one document
    assert keep.any()
    ids, targets = (
        torch.tensor(batch[name][keep].astype(np.int64))
        for name in ("inputs", "targets")
    )
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(
            theirs(ids).logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
    rows = {name: array[keep] for name, array in batch.items()}
    ours, weight = activations.nats(source.subject, rows)
    wanted = (nats.numpy() * rows["weights"].ravel()).sum() / weight
    assert ours / weight == pytest.approx(wanted, rel=1e-5)
    made, before, _ = experiment.load(tmp_path / "run")
    after_config = experiment.as_dict(made)
    after_config["train"] |= {"trainable": "converted"}
    loop.train(after_config, tmp_path / "run")
    _, after, facts = experiment.load(tmp_path / "run")
    assert facts["step"] == 10 and told["parts"][0]["unexplained"] < 1
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    block = changed["blocks"]["0"]
    assert block.pop("ffn")["tables"] and not any(jax.tree.leaves(changed))
    transfer.export_run(tmp_path / "run", tmp_path / "export", tables="int8")
    assert export.load_export(tmp_path / "export")[0] == made.model


def test_the_stream_can_be_what_is_fitted_to(dense):
    """Wanted is then what brings the residual stream to the dense model's.

    Mutation: the reference's own outputs alone.
    """
    source = conversion.source_lib.load(dense, None)
    config, params = source.subject
    other = jax.tree.map(lambda a: 1.1 * a, params)
    batch = next(batches.Batches(source, ALL).fitted())
    teacher, student = source.subject, activations.Subject(config, other)
    _, wanted = activations.observe(student, 1, "ffn", batch, teacher)
    x, seq = activations._stream(student, 1, batch)
    block = model.merge(config, other).blocks[1]
    beside = x + block.mixer(block.norm1(x), seq)[0]
    theirs, _ = activations._stream(teacher, 2, batch)
    target = np.asarray(theirs - beside).reshape(wanted.shape)
    np.testing.assert_allclose(wanted, target, atol=1e-5)


def test_conjugate_gradients_end_their_line_on_a_terminal(dense, tmp_path, monkeypatch):
    """With the iterations that they took. Mutation: no `finish` after the fit."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    chosen = dataclasses.replace(
        ALL, parts="ffn", layers="0", solver="gradients", ridges="0.1"
    )
    told = conversion.memorise(dense, tmp_path / "run", chosen)
    (part,) = told["parts"]
    lines = [x.rpartition("\r")[2] for x in terminal.getvalue().split("\n")[:-1]]
    (solving,) = [line for line in lines if "solving, at most: " in line]
    assert f" {part['iterations']}/{fit.MAX_ITERATIONS} iterations " in solving


def test_ridges_are_tried_from_the_largest():
    """Whatever their order. Mutations: not sorted; the smallest first; one twice."""
    assert Options(ridges="1e-3,0.1,0.001").ridge_values() == (0.1, 0.001)
    assert Options().ridge_values() == fit.RIDGES


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"parts": "head"}, "--parts='head': unknown choice"),
        ({"bits": "5"}, "--bits=5: 5 bits of qkv do not divide the width 16"),
        ({"bits": "ffn=x"}, "--bits=ffn=x: must be from 1 to 16"),
        ({"layers": "1-4"}, "--layers=1-4: the model has 2"),
        ({"layers": "x"}, "--layers=x: must be like 0,2-4"),
        ({"tokens": 50}, "--tokens=50: fewer than the 64 rows"),
        ({"tokens": 90_000}, "--tokens=90000: with what is held out .* the text has"),
        ({"ridges": "0.1,none"}, "--ridges=0.1,none: must be numbers above 0"),
        ({"ridges": "0.1,-1"}, "--ridges=0.1,-1: must be numbers above 0"),
        ({"ridges": "inf"}, "--ridges=inf: must be numbers above 0"),
        ({"mix": "stirred"}, "--mix='stirred': unknown choice"),
        (
            {"mix": "ffn=auto+none"},
            "--mix=ffn=auto.none: auto chooses the mix of one layer",
        ),
        (
            {"tokens": 100, "mix": "none+hadamard"},
            "--tokens=100: fewer than the 128 rows",
        ),
    ],
)
def test_mistakes_are_one_line(dense, tmp_path, fields, message):
    """And nothing is written. Mutations: any of these checks left out."""
    with pytest.raises(errors.ConfigError, match=message) as caught:
        conversion.memorise(
            dense, tmp_path / "run", Options(**{"bits": "4", "tokens": 2048} | fields)
        )
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_command(dense, tmp_path, capsys):
    """A table at the end. Mutation: `report.table` not printed."""
    words = ["convert", "memorise", str(dense), str(tmp_path / "run"), "--bits=4"]
    words += ["--tokens=1024", "--parts=qkv", "--layers=0"]
    with pytest.raises(SystemExit) as ended:
        cli.run_main(command._run, command.define_flags, words)
    assert ended.value.code in (0, None)
    text = capsys.readouterr().out
    assert "unexplained" in text and "bytes of float32 weights read for a token" in text
    assert memorise.fit_tables  # the name that others use
