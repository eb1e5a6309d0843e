"""Mixers inside a whole run: what the step, the mesh and the length of a state ask of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import errors, model, sharding
from memoryformer.convert import export, transfer
from memoryformer.generation import sampler
from memoryformer.generation import text as text_lib
from memoryformer.model import mixers
from memoryformer.model.mixers import kernel
from memoryformer.ops import attention
from memoryformer.runs import metrics
from memoryformer.runs import steps as run_steps
from memoryformer.training import evaluate_run, experiment
from memoryformer.training import programs as programs_lib
from memoryformer.training import step as step_lib

OPTIONS = {"num_features": 6, "redraw_every": 3}
PERFORMER_MODEL = {"mixer": "performer", "mixer_options": OPTIONS}
PERFORMER = {
    "model.mixer": "performer",
    **{f"model.mixer_options.{name}": value for name, value in OPTIONS.items()},
}


def _gradients_at(steps, folder, **fields):
    """Gradient norms of the first batch's step, were it step `steps[i]`."""
    run = experiment.resolve(toy.run_config(folder, **fields))
    shards = sharding.make(run.mesh)
    specs = programs_lib.check_fit(run, shards)
    draw, _ = programs_lib.init_state(run, shards, specs)
    tokens = np.random.default_rng(0).integers(0, toy.VOCAB, (8, 16), dtype=np.int32)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32)[None], (8, 16)).copy()
    batch = {
        "inputs": tokens,
        "targets": tokens[:, ::-1].copy(),
        "positions": positions,
        "segment_ids": ones,
        "weights": ones.astype(np.float32),
    }
    with shards.activate():
        step = step_lib.make_train_step(run, shards, specs)
        return [
            float(step(_at(draw(), i), shards.put_batch(batch))[1]["grad_norm"])
            for i in steps
        ]


def _at(state, step):
    return state._replace(step=state.step + step)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """Gradient norms at steps 0, 2, 3 and 4: one program for two tests."""
    return _gradients_at((0, 2, 3, 4), tmp_path_factory.mktemp("one"), **PERFORMER)


def test_performer_redraws_on_schedule(on_one_device):
    """Red if the step does not reach the mixer, or if every step draws anew."""
    a, b, c, _ = on_one_device
    assert a == b != c


def test_redrawn_features_are_those_of_one_device(on_one_device, tmp_path):
    """Red if a device draws features of its own."""
    eight = _gradients_at((4,), tmp_path, **PERFORMER, mesh="tensor:model=2")
    np.testing.assert_allclose(on_one_device[3:], eight, rtol=1e-4)


def test_a_run_draws_by_its_seed_and_its_schedule():
    """Every layer its own, at every third batch others, and all of them by the run's seed.

    Mutation: `number = step`; or a key without the layer.
    """
    config = model.ModelConfig(8, 16, 3, 2, 32, code_bits=4, **PERFORMER_MODEL)
    _, fixed = model.split_trained(config, model.init(config, 5))
    rows = lambda tree: [b["mixer"]["random_rows"] for b in tree["blocks"].values()]  # noqa: E731
    redraw = jax.jit(lambda fixed, step: mixers.redraw(config, fixed, 5, step))
    for step in range(8):
        fixed = redraw(fixed, step)
        expected = kernel.random_rows(config, 5, step // 3)
        np.testing.assert_array_equal(rows(fixed), rows(expected))
    assert np.abs(rows(fixed)[0] - rows(fixed)[1]).max() > 0.1
    same = model.ModelConfig(8, 16, 3, 2, 32, code_bits=4)
    assert mixers.redraw(same, {}, 5, 4) == {}


def test_an_import_begins_with_the_features_it_was_trained_with():
    """Mutation: no `step > 0` in `Performer.redraw`."""
    config = model.ModelConfig(8, 16, 2, 2, 32, code_bits=4, **PERFORMER_MODEL)
    imported = kernel.random_rows(config, 9, 4)
    kept = mixers.redraw(config, imported, 5, jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, kept, imported)


@pytest.fixture(scope="module")
def performer_run(tmp_path_factory):
    """Six steps with seed 3, features redrawn after three."""
    folder = tmp_path_factory.mktemp("performer")
    fields = {"train.num_steps": 6, "train.seed": 3, "eval.num_batches": 0}
    return toy.trained(folder, **PERFORMER, **fields)


def test_random_features_are_not_trained(performer_run):
    """No moments, no decay: after six steps they are a draw of the seed, bit for bit.

    Mutation: `trained=False` left out of the parameter's metadata.
    """
    run, params, facts = experiment.load(performer_run)
    _, fixed = model.split_trained(run.model, params)
    assert jax.tree.leaves(fixed)
    jax.tree.map(
        np.testing.assert_array_equal, fixed, kernel.random_rows(run.model, 3, 1)
    )
    names = ["/".join(path) for path, _, _ in facts["leaves"]]
    assert sum("random_rows" in name for name in names) == run.model.num_layers


def test_a_checkpoint_is_evaluated_with_its_features(performer_run):
    """Mutation: `redraw` in `experiment.load` too, one draw ahead."""
    logged = [r["val/loss"] for r in metrics.read(performer_run) if "val/loss" in r][-1]
    later = evaluate_run.evaluate_checkpoint(performer_run)
    config = toy.run_config(performer_run.parent, **PERFORMER)
    config.train.seed, config.train.num_steps, config.eval.batch_size = 7, 6, 4
    given = evaluate_run.evaluate_checkpoint(performer_run, config=config)
    np.testing.assert_allclose(
        [later["val/loss"], given["val/loss"]], logged, rtol=1e-6
    )


def test_generation_and_exports_have_the_features(performer_run, tmp_path):
    """Mutation: an export without what is not trained; `import_run` that draws anew."""
    generator, _, run = text_lib.open_run(performer_run)
    _, params = run_steps.load(performer_run)
    prompt = np.arange(40, 50)[None]
    sampling = sampler.SamplingConfig(max_tokens=1, temperature=0)
    logits = toy.forward(run.model, params, prompt)[0, -1]
    assert list(generator.stream(prompt[0].tolist(), sampling)) == [np.argmax(logits)]
    transfer.export_run(performer_run, tmp_path / "export")
    transfer.import_run(tmp_path / "export", tmp_path / "back")
    for read in (
        export.load_export(tmp_path / "export"),
        experiment.load(tmp_path / "back")[:2],
    ):
        jax.tree.map(np.testing.assert_array_equal, read[1], params)


def test_seeds_share_a_program_and_no_features(tmp_path):
    """Mutation: `run.train.seed` in the train step, whatever `hyper` says."""
    made = []
    for seed in (3, 4):
        run = experiment.resolve(
            toy.run_config(tmp_path, **PERFORMER, **{"train.seed": seed})
        )
        single = sharding.make(run.mesh)
        made.append((run, step_lib.hyperparams(run)))
    run = made[0][0]
    assert programs_lib.program(run) == programs_lib.program(made[1][0])
    programs = programs_lib.make(run, single)
    state, batch = _at(programs.draw(0), 3), toy.batch(run.model, seq_len=16)
    norms = [
        float(programs.train_step(state, batch, h)[1]["grad_norm"]) for _, h in made
    ]
    assert norms[0] != norms[1] and programs.train_step._cache_size() == 1


def test_two_sided_training_of_a_language_model_is_refused(tmp_path):
    """Mutation: no such check; the loss then falls to the loss of copying."""
    config = toy.run_config(tmp_path)
    assert "causal" not in config.model
    config.model.causal = False
    with pytest.raises(errors.ConfigError, match="would see its targets"):
        experiment.resolve(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            ("linear", {"logit_transform": "dape_v2"}),
            "logit_transform: mixer='linear' has no such option .an option of softmax",
        ),
        (("linear", {"prefix_chunks": 3}), "option; did you mean 'prefix_chunk'"),
        (
            ("softmax", {"logit_transform": "nonsense"}),
            "model.mixer_options.logit_trans",
        ),
        (("conv_luna", {"filter": "none"}), "model.mixer_options.filter='none'"),
        (("luna", {"filter": "conv"}), "an option of conv_luna"),
        (("luna", {"num_slots": 0}), "model.mixer_options.num_slots=0: must be >= 1"),
        (("luna", {"num_slots": "5"}), "num_slots='5': expected int, got str"),
        (
            ("luna", mixers.MIXERS["linear"].Options()),
            "not the options of mixer='luna'",
        ),
    ],
)
def test_options_of_no_use_are_refused(fields, message):
    """Mutation: `config.options` drops what the mixer does not know."""
    mixer, options = fields
    with pytest.raises(errors.ConfigError, match=message) as caught:
        toy.model_config(mixer=mixer, mixer_options=options)
    assert "\n" not in str(caught.value)


def test_a_cache_is_not_rounded_up_over_the_last_position():
    """Mutation: rounded up to 384, which the mixer refuses, though 283 fit in 300."""
    config = toy.model_config(
        mixer="cosformer", mixer_options={"max_len": 300}, seq_len=256
    )
    generator = sampler.Generator(config, model.init(config))
    generator._init_state(1, 283)
    with pytest.raises(errors.ConfigError, match="but 301 tokens"):
        generator._init_state(1, 301)


def test_odd_rows_take_the_plain_attention(monkeypatch):
    """Mutation: left to cuDNN, whose gradient under a mask raises."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rows = [jax.ShapeDtypeStruct((1, n, 2, 64), jnp.bfloat16) for n in (8, 9)]
    reasons = [attention.why_not("cudnn", q) for q in rows]
    assert reasons == ["", "the length 9 is odd"]


@pytest.mark.parametrize("mixer", ["cosformer", "linformer"])
def test_a_state_beyond_the_last_position_is_refused(mixer):
    """Red if decoding runs into positions that the mixer does not have."""
    config = model.ModelConfig(8, 16, 1, 2, 32, mixer=mixer, code_bits=4)
    network = model.merge(config, model.init(config))
    assert mixers.max_length(config) == 32
    jax.tree.map(jnp.shape, network.init_state(1, 32))
    with pytest.raises(errors.ConfigError, match=r"max_len=32.* 33 tokens"):
        network.init_state(1, 33)
