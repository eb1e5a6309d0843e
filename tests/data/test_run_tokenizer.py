"""A run owns its tokenizer: what becomes of its corpus changes nothing that reads it."""

import dataclasses
import hashlib
import json
import math
import shutil
import types

import numpy as np
import pytest
import tokenizers
import toy

from memoryformer import data
from memoryformer.convert import export, gpt_neox, transfer
from memoryformer.data import run_tokenizer
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.errors import ConfigError, DataError, StorageError
from memoryformer.generation import sampler
from memoryformer.generation import text as text_lib
from memoryformer.report import pictures
from memoryformer.runs import directory, metrics
from memoryformer.runs import manifest as manifest_lib
from memoryformer.runs import steps as run_steps
from memoryformer.training import evaluate_run, experiment, loop

GREEDY = sampler.SamplingConfig(max_tokens=12, temperature=0.0)
PYTHIA = {  # what the GPT-NeoX format can hold
    "model.projection": "dense",
    "model.norm": "layernorm",
    "model.residual": "parallel",
    "model.ffn_activation": "gelu",
    "model.output_projection": True,
    "model.rotary_fraction": 0.5,
    "model.vocab_size": 304,
    "model.head_std": 0.5,
}


def text(workdir):
    """Greedy text of a run, and its tokenizer."""
    generator, tokenizer, _ = text_lib.open_run(workdir)
    (reply,) = text_lib.complete(generator, tokenizer, ["def return"], GREEDY)
    return reply.text, tokenizer


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """(run, config, text before): bpe:300, and a corpus that has grown since."""
    folder = tmp_path_factory.mktemp("grown")
    toy.corpus(folder / "corpus")
    shutil.copytree(folder / "corpus", folder / "first")
    values = PYTHIA | {"data.tokenizer": "bpe:300", "train.num_steps": 5}
    config = toy.run_config(folder, **values)
    loop.train(config, folder / "run")
    before = text(folder / "run")[0]
    for i in range(60):
        lines = [f"SELECT id FROM table_{i} WHERE key={j};\n" for j in range(20)]
        (folder / "corpus" / f"new{i}.txt").write_text("".join(lines))
    return folder / "run", config, before


@pytest.fixture
def alone(grown, tmp_path):
    """A copy of the run whose corpus and prepared data are out of reach."""
    run, _, before = grown
    shutil.copytree(run, tmp_path / "run")
    hidden = [(run.parent / n, run.parent / f"{n}-away") for n in ("corpus", "cache")]
    for path, away in hidden:
        path.rename(away)
    yield tmp_path / "run", before
    for path, away in hidden:
        shutil.rmtree(path, ignore_errors=True)
        away.rename(path)


def make_old(workdir):
    """Turn a run into one of before runs kept their tokenizer."""
    (workdir / "tokenizer.json").unlink()
    for step in (workdir / "checkpoints").glob("*/MANIFEST"):
        manifest = manifest_lib._read(step.parent)
        del manifest["facts"]["tokenizer"]
        manifest_lib._seal(step, manifest)


def test_it_is_written_and_its_hash_is_in_every_manifest(grown):
    """Mutations: `run_tokenizer.keep` left out of the loop; `tokenizer=` out of its
    checkpointer.
    """
    run, config, _ = grown
    made = tokenizer_lib.load(str(run / "tokenizer.json"))
    assert made.vocab_size == 300
    told = {"sha256": made.fingerprint, "end_token": "<eot>"}
    steps = [int(p.name) for p in (run / "checkpoints").iterdir() if p.is_dir()]
    assert steps
    assert all(run_steps.facts(run, step)["tokenizer"] == told for step in steps)
    now = data.load(experiment.resolve(config).data).tokenizer
    assert now.fingerprint != made.fingerprint  # or nothing here can fail


def test_a_grown_corpus_changes_nothing(grown, tmp_path, monkeypatch):
    """Text, evaluation, pictures and exports are those of before.

    Mutations: `data.load(run.data)` in `generation.text.open_run`, `transfer.export_run`,
    `pictures._collect` or `evaluate_checkpoint`.
    """
    run, config, before = grown
    assert text(run)[0] == before
    transfer.export_run(run, tmp_path / "out")
    generator, tokenizer = text_lib.open_export(str(tmp_path / "out"))
    (reply,) = text_lib.complete(generator, tokenizer, ["def return"], GREEDY)
    assert reply.text == before
    trained = data.find(
        experiment.resolve(config).data, run_steps.facts(run)["data_fingerprint"]
    )
    result = evaluate_run.evaluate_checkpoint(run)
    assert result["val/bytes"] == trained.manifest.splits["validation"].bytes
    assert result["data_fingerprint"] == trained.fingerprint
    rows = [row for row in metrics.read(run) if "val/loss" in row]
    assert rows[-1]["val/tokens"] <= result["val/tokens"]
    looked_at = lambda config, params, batches: next(batches)["inputs"]  # noqa: E731
    monkeypatch.setattr(pictures.buckets, "collect", looked_at)
    first = trained.validation.eval_batches(16, 512).batch(0)["inputs"]
    np.testing.assert_array_equal(pictures._collect(run, 100), first)


def test_no_corpus_is_needed_to_sample_and_to_export(alone, tmp_path):
    """Nor the prepared data, for any format.

    Mutation: `run_tokenizer.load` looks for the data first.
    """
    run, before = alone
    found, tokenizer = text(run)
    assert found == before
    for form in transfer.FORMATS[:2]:
        transfer.export_run(run, tmp_path / form, form=form)
        assert (tmp_path / form / "tokenizer.json").is_file()
    assert (
        export.own_tokenizer(tmp_path / "safetensors", 304).pieces == tokenizer.pieces
    )
    with pytest.raises(ConfigError, match="has 300 tokens"):
        export.own_tokenizer(tmp_path / "safetensors", 299)


def test_another_tokenizer_in_its_place_is_refused(alone, tmp_path):
    """In the run and in the export, with the same end token or another.

    Mutation: the fingerprints not compared in `load_recorded`.
    """
    run, _ = alone
    transfer.export_run(run, tmp_path / "out")
    for folder, read in (
        (run, lambda: text_lib.open_run(run)),
        (tmp_path / "out", lambda: text_lib.open_export(str(tmp_path / "out"))),
    ):
        path = folder / "tokenizer.json"
        whole = path.read_text()
        for other in ("<eot>", "<eos>"):
            spec = tokenizer_lib.byte_level().spec
            path.write_text(json.dumps(spec).replace("<eot>", other))
            with pytest.raises(
                DataError, match="is not the tokenizer of this"
            ) as error:
                read()
            assert "\n" not in str(error.value)
        path.write_text(json.dumps(json.loads(whole), indent=1))  # the same, spaced
        read()
    (run / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer.json: is missing; put it back"):
        text_lib.open_run(run)


def test_an_old_run_has_the_tokenizer_of_its_data_or_none(grown, tmp_path):
    """The prepared data is known by its fingerprint; made anew, it is compared.

    Mutation: `check(dataset, fingerprint)` left out of `data.find`.
    """
    run, _, before = grown
    old = tmp_path / "run"
    shutil.copytree(run, old)
    make_old(old)
    assert text(old)[0] == before
    away = run.parent / "cache-away"
    (run.parent / "cache").rename(away)
    try:
        for read in (
            lambda: text_lib.open_run(old),
            lambda: transfer.export_run(old, tmp_path / "out"),
            lambda: evaluate_run.evaluate_checkpoint(old),
        ):
            with pytest.raises(DataError, match="has fingerprint"):
                read()
        assert not (tmp_path / "out").exists()
    finally:
        shutil.rmtree(run.parent / "cache")
        away.rename(run.parent / "cache")


def test_going_on_compares_the_tokenizer_by_content(grown, tmp_path):
    """Another is refused whatever is allowed; the same one under another path goes on.

    Mutations: `runs.compatibility.check_tokenizer` left out; `data.tokenizer` no longer a field that names nothing;
    `run_tokenizer.check` left out of the loop.
    """
    run, config, before = grown
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with pytest.raises(ConfigError, match="was trained with the tokenizer") as caught:
        loop.train(config, copy, allow=["*"])
    assert "\n" not in str(caught.value)
    moved = config.copy_and_resolve_references()
    moved.data.path = str(run.parent / "first")
    moved.data.tokenizer = str(copy / "tokenizer.json")
    loop.train(moved, copy)
    assert text(copy)[0] == before
    (tmp_path / "fresh").mkdir()
    tokenizer_lib.byte_level().save(tmp_path / "fresh" / "tokenizer.json")
    with pytest.raises(ConfigError, match="not the tokenizer of this run"):
        loop.train(moved, tmp_path / "fresh")
    assert not (tmp_path / "fresh" / "config.json").exists()
    gone = experiment.resolve(moved).data
    gone = dataclasses.replace(gone, tokenizer=str(tmp_path / "gone.json"))
    assert run_tokenizer.located(gone, copy).tokenizer == str(copy / "tokenizer.json")
    named = dataclasses.replace(gone, tokenizer=str(run / "tokenizer.json"))
    assert run_tokenizer.located(named, copy) is named
    evaluate_run.check_same_model(
        run_steps.facts(run)["config"], experiment.resolve(moved)
    )


def test_what_lies_in_the_folder_is_not_written_over(tmp_path):
    """A tokenizer.json of something else; of a run that never got far it is replaced.

    Mutation: `begun or not ..exists()` -> `begun`.
    """
    ours, other = (
        tokenizer_lib.byte_level(),
        tokenizer_lib.train_bpe(["ab ab"] * 9, 258),
    )
    path = tmp_path / "tokenizer.json"
    other.save(path)
    for begun in (False, True):
        with pytest.raises(ConfigError, match="not the tokenizer of this run"):
            run_tokenizer.keep(tmp_path, ours, begun=begun)
    assert tokenizer_lib.load(str(path)).fingerprint == other.fingerprint
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the tokenizer of this run"):
        run_tokenizer.keep(tmp_path, ours, begun=True)
    run_tokenizer.keep(tmp_path, ours, begun=False)
    assert tokenizer_lib.load(str(path)).fingerprint == ours.fingerprint
    path.write_text("{")
    run_tokenizer.keep(tmp_path, ours, begun=False)
    assert tokenizer_lib.load(str(path)).fingerprint == ours.fingerprint


def test_keeping_it_touches_nothing_that_is_there(tmp_path):
    """The same one stays as it is spelt; folders are made; a full disk is told.

    Mutations: written anew each time; `parents=False`; the OSError let through.
    """
    ours = tokenizer_lib.byte_level()
    folder = tmp_path / "a" / "b"
    run_tokenizer.keep(folder, ours, begun=False)
    path = folder / "tokenizer.json"
    spaced = json.dumps(json.loads(path.read_text()), indent=1)
    path.write_text(spaced)
    for begun in (False, True):
        run_tokenizer.keep(folder, ours, begun=begun)
        assert path.read_text() == spaced
    path.unlink()
    run_tokenizer.keep(folder, ours, begun=True)  # the folder is there already
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"tokenizer\.json: cannot be written"):
        run_tokenizer.keep(tmp_path / "file", ours, begun=False)


def test_which_tokenizer_a_run_has(tmp_path, monkeypatch):
    """Its own, if it is as large as the model; before runs kept theirs, that of the data.

    Mutations: the size not looked at; an old run given what lies in its folder; a path
    that is none taken for a file.
    """
    ours = tokenizer_lib.byte_level()
    run_tokenizer.keep(tmp_path, ours, begun=False)
    config = data.DataConfig(source="text", path="x", tokenizer="~nobody-here/x.json")
    facts = {"tokenizer": run_tokenizer.identity(ours)}
    assert run_tokenizer.load(tmp_path, config, facts, 257).vocab_size == 257
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size=256: the tokenizer '.*257 t"
    ):
        run_tokenizer.load(tmp_path, config, facts, 256)
    of_data = types.SimpleNamespace(tokenizer="of the data")
    monkeypatch.setattr(run_tokenizer, "dataset", lambda *arguments: of_data)
    assert run_tokenizer.load(tmp_path, config, {}, 257) == "of the data"
    own = str(tmp_path / "tokenizer.json")
    assert run_tokenizer.located(config, tmp_path).tokenizer == own
    for spec in ("bytes", "bpe:300", "hub:a/b"):
        named = dataclasses.replace(config, tokenizer=spec)
        assert run_tokenizer.located(named, tmp_path) is named


@pytest.mark.parametrize("config", [{"format": "memoryformer"}, {"model_type": "x"}])
def test_no_run_begins_in_the_folder_of_another_model(tmp_path, config):
    """Mutation: `runs.directory.refuse_foreign` not called by `train`."""
    (tmp_path / "export").mkdir()
    path = tmp_path / "export" / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="of another model"):
        loop.train(toy.run_config(tmp_path), tmp_path / "export")
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]
    path.write_text("[]")
    directory.refuse_foreign(path.parent)  # a run's own, damaged: it writes it anew


def prefix_space(path, texts):
    """A byte-level BPE that puts a space before every text that has none."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=["<begin>", "<fin>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.save(str(path))


def test_bits_per_byte_are_of_the_text(tmp_path):
    """A tokenizer that adds a space, with an end token of its own, from start to export.

    Mutations: `tokenizer.token_bytes` for `dataset.token_bytes` in the trainer or in
    `evaluate_checkpoint`; `int(num_bytes)`; the end token not handed on.
    """
    toy.corpus(tmp_path / "corpus")
    texts = [p.read_text() for p in (tmp_path / "corpus").iterdir()]
    prefix_space(tmp_path / "tokenizer.json", texts)
    values = {
        "data.tokenizer": str(tmp_path / "tokenizer.json"),
        "data.end_token": "<fin>",
        "model.vocab_size": 304,
        "train.num_steps": 1,
        "eval.num_batches": 0,
    }
    config = toy.run_config(tmp_path, **PYTHIA | values)
    trained = loop.train(config, tmp_path / "run")
    split = data.load(experiment.resolve(config).data).manifest.splits["validation"]
    assert split.token_bytes == split.bytes + split.documents
    assert trained["val/bytes"] == split.bytes
    nats = trained["val/loss"] * trained["val/tokens"]
    bits = nats / math.log(2) / split.bytes
    assert trained["val/bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    (tmp_path / "tokenizer.json").unlink()
    result = evaluate_run.evaluate_checkpoint(tmp_path / "run")
    assert result["val/bytes"] == split.bytes
    assert text(tmp_path / "run")[1].end_token == "<fin>"
    transfer.export_run(tmp_path / "run", tmp_path / "out")
    assert export.own_tokenizer(tmp_path / "out", 304).eot_id == 1


PROMPTS = [
    "def return",
    "",
    "else (x): <eot> self +=",
    "naïve → 日本",
    " table\n  hash",
]


def test_transformers_gives_our_greedy_text(grown, tmp_path):
    """AutoModelForCausalLM and AutoTokenizer of the export, plain calls, against ours.

    Mutations: the template left out (no end token before the prompt); eos_token_id left
    to their default of 2; split_special_tokens left out.
    """
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    run = grown[0]
    transfer.export_run(run, tmp_path / "out", form="gpt_neox")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenize = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    generator, ours, _ = text_lib.open_run(run)
    assert len(tokenize) == ours.vocab_size == 300
    for config in (theirs.config, theirs.generation_config):
        assert config.eos_token_id == config.bos_token_id == ours.eot_id
    assert tokenize.eos_token_id == tokenize.bos_token_id == ours.eot_id
    replies = text_lib.complete(generator, ours, PROMPTS, GREEDY)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = tokenize(prompt, return_tensors="pt")
        assert ids["input_ids"][0].tolist() == [ours.eot_id, *ours.encode(prompt)]
        with torch.no_grad():
            made = theirs.generate(**ids, max_new_tokens=GREEDY.max_tokens)
        new = made[0, ids["input_ids"].shape[1] :]
        assert tokenize.decode(new, skip_special_tokens=True) == reply.text
    config, params = gpt_neox.load_gpt_neox(tmp_path / "out")
    again = export.load_tokenizer(tmp_path / "out")
    assert again.pieces == ours.pieces and again.eot_id == ours.eot_id
    assert np.isfinite(params["head"]["kernel"]).all() and config.vocab_size == 304


def test_tokens_of_a_model_and_of_its_data():
    """Bytes and the end are compared, to the last token. Mutations: any of the comparison."""

    def made(pieces, eot_id):
        return types.SimpleNamespace(
            pieces=pieces,
            eot_id=eot_id,
            piece=lambda token: dict(enumerate(pieces)).get(token, b""),
        )

    ours = made([b"a", b"b", b""], 2)
    run_tokenizer.check_same_tokens(None, ours, "there")
    run_tokenizer.check_same_tokens(made([b"a", b"b", b""], 2), ours, "there")
    run_tokenizer.check_same_tokens(made([b"a", b"b"], 2), ours, "there")  # padding
    for theirs, message in (
        (made([b"x", b"b", b""], 2), r"of there: token 0 is b'a', there b'x'\."),
        (made([b"a", b"c", b""], 2), r"of there: token 1 is b'b', there b'c'\."),
        (made([b"a", b"b", b"", b"d"], 2), r"of there: token 3 is b'', there b'd'\."),
        (made([b"a", b"b", b""], 1), r"the end of a document is 2, there 1\."),
    ):
        with pytest.raises(ConfigError, match=message):
            run_tokenizer.check_same_tokens(theirs, ours, "there")


def test_a_tokenizer_that_cannot_be_there(tmp_path):
    """The run's own is taken for one in a store, or of a home that nobody has.

    Mutations: such a path taken for one that exists; `or` for `and`; the hub's replaced.
    """
    (tmp_path / "tokenizer.json").write_text("{}")
    kept = str(tmp_path / "tokenizer.json")

    def located(spec, folder=tmp_path):
        config = data.DataConfig(source="text", path="x", tokenizer=spec)
        return run_tokenizer.located(config, folder).tokenizer

    for spec in (
        "gs://bucket/tokenizer.json",
        "~nobody-here/t.json",
        str(tmp_path / "no"),
    ):
        assert located(spec) == kept
        assert located(spec, tmp_path / "empty") == spec
    for spec in ("bytes", "bpe:300", "hub:owner/name", kept):
        assert located(spec) == spec
    assert run_tokenizer._fingerprint(tmp_path / "tokenizer.json", "") == ""


def test_a_fingerprint_is_of_sorted_keys(tmp_path):
    """Whatever their order in a file, and text is saved as it is. Mutations: unsorted; escaped."""
    made = tokenizer_lib.byte_level()
    path = tmp_path / "t.json"
    made.save(path)
    content = path.read_text(encoding="utf-8")
    assert "\\u" not in content and "Ġ" in content
    canonical = json.dumps(made.spec, sort_keys=True)
    assert made.fingerprint == hashlib.sha256(canonical.encode()).hexdigest()
    turned = dict(reversed(json.loads(content).items()))
    path.write_text(json.dumps(turned))
    assert tokenizer_lib.load(str(path)).fingerprint == made.fingerprint
