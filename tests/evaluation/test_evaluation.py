"""Evaluation: the same number whatever the batch size and the devices, and the right one."""

import math

import jax
import numpy as np
import oracle
import pytest
import toy

from memoryformer import data, evaluation, model, sharding
from memoryformer.errors import ConfigError, DataError
from memoryformer.evaluation import base, buckets, slots
from memoryformer.evaluation import loss as loss_lib
from memoryformer.model import losses
from memoryformer.model import params as params_lib
from memoryformer.runs import steps as run_steps
from memoryformer.training import evaluate_run, experiment

KEYS = {"val/loss", "val/perplexity", "val/bits_per_byte", "val/tokens", "val/bytes"}


@pytest.fixture(scope="module")
def opened(toy_run):
    """(run, params, dataset) of the toy run."""
    config, params = run_steps.load(toy_run)
    run = experiment.resolve(config)
    return run, jax.tree.map(jax.numpy.asarray, params), data.load(run.data)


def evaluate(opened, batch_size, mesh="single", share=1, **options):
    run, params, dataset = opened
    made = sharding.make(mesh)
    specs = model.partition_specs(run.model, made)
    with made.activate():
        return loss_lib.evaluate(
            loss_lib.make_eval_step(run.model, made),
            made.put(params, specs),
            dataset.validation.eval_batches(run.model.seq_len, batch_size),
            dataset.token_bytes * share,
            made,
            **options,
        )


def without_time(result):
    return {k: v for k, v in result.items() if k != "val/seconds"}


@pytest.fixture(scope="module")
def by_eights(opened):
    return without_time(evaluate(opened, 8))


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_independent_of_the_batch_size(opened, by_eights, batch_size):
    """To the last bit, on one device; the last batch is padded.

    Mutations: the mean of batches' means; padding counted; groups as large as the batch.
    """
    assert without_time(evaluate(opened, batch_size)) == by_eights


def test_equals_a_plain_loop(opened, by_eights):
    """Window by window, without padding, packing by hand, in float64.

    Mutations: nats / ln 2 without the bytes; positions along the row.
    """
    run, params, dataset = opened
    stream = np.asarray(dataset.validation.tokens, np.int64)
    length, eot = run.model.seq_len, dataset.tokenizer.eot_id
    nats = []
    for start in range(0, len(stream) - 1, length):
        window = stream[start : start + length + 1]
        inputs, targets = window[None, :-1], window[None, 1:]
        starts = inputs == eot
        segments = np.cumsum(starts, axis=1) + 1
        positions = toy.positions(segments)
        logits = oracle.transformer(run.model, params, inputs, positions, segments)
        nats.extend(oracle.token_nats(logits, targets)[0])
    total, tokens = math.fsum(nats), len(stream) - 1
    num_bytes = int(dataset.tokenizer.token_bytes[stream[1:]].sum())
    assert by_eights["val/tokens"] == tokens and by_eights["val/bytes"] == num_bytes
    assert num_bytes == dataset.manifest.splits["validation"].bytes
    expected = {
        "val/loss": total / tokens,
        "val/perplexity": math.exp(total / tokens),
        "val/bits_per_byte": total / math.log(2) / num_bytes,
    }
    for name, value in expected.items():
        assert abs(by_eights[name] / value - 1) < 1e-6, name


def test_a_few_batches_and_a_stop(opened, by_eights):
    """`num_batches` are spread over the text; more than there are, all; a stop: None.

    Bytes that a share of each token's adds up to are whole ones.

    Mutations: `batches[i]`; `stop` asked only before the first batch; bytes of the
    inputs for the targets'; `int(num_bytes)`.
    """
    few = evaluate(opened, 8, num_batches=2, share=1 - 1e-9)
    assert few["val/tokens"] == 2 * 8 * 16
    dataset = opened[2]
    stream = np.asarray(dataset.validation.tokens, np.int64)
    assert len(stream) // 128 == 5  # six batches, of which 0 and 3
    targets = np.concatenate([stream[1:129], stream[385:513]])
    assert few["val/bytes"] == dataset.tokenizer.token_bytes[targets].sum()
    assert without_time(evaluate(opened, 8, num_batches=10**6)) == by_eights
    asked = iter([False, False, True])
    with pytest.raises(evaluation.Stopped):
        evaluate(opened, 8, stop=lambda: next(asked))
    assert next(asked, None) is None


@pytest.mark.parametrize("mesh", ["single", "data", "fsdp_tensor:model=2"])
def test_checkpoint_on_one_and_eight_devices(toy_run, by_eights, mesh):
    """Restored on any mesh, to rounding; all keys of eval.py's JSON.

    Mutation: parameters left unplaced (`put` the identity).
    """
    config = toy.run_config(
        toy_run.parent, **{"mesh": mesh, "eval.num_batches": 0, "eval.batch_size": 8}
    )
    result = evaluate_run.evaluate_checkpoint(toy_run, None, config)
    assert result["step"] == 20 and result.keys() >= KEYS
    assert 0 < result["utilisation/blocks.0.mixer.qkv/used_fraction"] <= 1
    assert len(result["model_fingerprint"]) == len(result["data_fingerprint"]) == 64
    for name in KEYS:
        assert abs(result[name] / by_eights[name] - 1) < 1e-6, name
    if mesh == "single":
        older = evaluate_run.evaluate_checkpoint(toy_run, 15, config)
        assert older["step"] == 15
        assert older["model_fingerprint"] != result["model_fingerprint"]
        assert older["val/loss"] > result["val/loss"]


@pytest.mark.parametrize(
    "fields", [{"model.score": "l1"}, {"data.source_options.validation_every": 9}]
)
def test_another_config_is_refused(toy_run, fields):
    """Named by field, in one line.

    Mutation: `check_same_model` returns at once.
    """
    config = toy.run_config(toy_run.parent, **fields)
    with pytest.raises(ConfigError, match=next(iter(fields))) as caught:
        evaluate_run.evaluate_checkpoint(toy_run, None, config)
    assert "\n" not in str(caught.value)


def test_other_data_is_refused(toy_run, tmp_path):
    """Text that the model was not trained on gives no figure under its name.

    Mutation: the fingerprints not compared.
    """
    other = toy.corpus(tmp_path / "corpus", seed=1)
    config = toy.run_config(toy_run.parent, **{"data.path": str(other)})
    with pytest.raises(DataError, match="has fingerprint"):
        evaluate_run.evaluate_checkpoint(toy_run, None, config)


def test_fingerprint_is_of_values_and_names():
    """Mutation: the path not hashed."""
    a, b = np.zeros(3, np.float32), np.ones(3, np.float32)
    prints = {
        params_lib.fingerprint(tree)
        for tree in ({"a": a, "b": b}, {"a": b, "b": a}, {"a": a, "c": b}, {"a": a})
    }
    assert len(prints) == 4
    assert params_lib.fingerprint({"a": a.copy()}) in prints


def test_nats_of_padding_are_nothing():
    """Not a product: 0 * inf in padding would be nan.

    Mutation: `nats * weights` for the `where`.
    """
    config = toy.model_config("dense", num_layers=1, vocab_size=4)
    params = jax.tree.map(lambda x: np.float32(0.1) * x, toy.numpy_params(config))
    params["head"]["kernel"][:, 0] = np.inf
    batch = toy.batch(config, batch_size=1)
    batch["weights"] = np.zeros_like(batch["weights"])
    nats = toy.quick_jit(lambda p, b: losses.batch_nats(config, p, b))(params, batch)
    np.testing.assert_array_equal(nats, np.zeros((1, 12)))


def test_a_mesh_that_does_not_fit_is_refused(toy_run):
    """By the function itself, in one line. Mutation tried: `validate` not called."""
    fields = {"mesh": "data", "eval.batch_size": 3}
    config = toy.run_config(toy_run.parent, **fields)
    with pytest.raises(ConfigError, match="batch_size=3 does not divide") as caught:
        evaluate_run.evaluate_checkpoint(toy_run, None, config)
    assert "\n" not in str(caught.value)


def test_what_memories_are_measured_on(monkeypatch):
    """The first four batches, or fewer; tables where there are any, slots likewise.

    Mutations: five; either kind always, or never.
    """
    looked_at = []

    def collect(config, params, batches, made):
        looked_at.append(list(batches))
        return {"slots": 2.0}

    monkeypatch.setattr(buckets, "collect", collect)
    monkeypatch.setattr(slots, "collect", collect)
    monkeypatch.setattr(buckets, "summary", lambda counts: {"tables": 1.0})
    made = sharding.make("single")
    for fields, wanted in (
        ({"projection": "memory"}, {"tables": 1.0}),
        ({"projection": "dense"}, {}),
        ({"projection": "dense", "mixer": "luna"}, {"slots": 2.0}),
        ({"projection": "memory", "mixer": "luna"}, {"tables": 1.0, "slots": 2.0}),
    ):
        config = toy.model_config(**fields)
        for batches in (range(6), range(3)):
            subject = base.Subject(config, made, batches, np.ones(1))
            values = {}
            for evaluator in (buckets.Buckets, slots.Slots):
                if evaluator.measures(config):
                    values |= evaluator(subject)({})
            assert values == wanted
            assert all(seen == list(range(min(len(batches), 4))) for seen in looked_at)
            assert len(looked_at) == len(wanted)
            looked_at.clear()


def test_text_that_counts_for_nothing(opened):
    """Of no bytes, or none at all. Mutations: `and` for `or`; the check left out."""
    with pytest.raises(DataError, match="validation: no text to evaluate on"):
        evaluate(opened, 8, share=0)
