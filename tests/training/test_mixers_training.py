"""Mixers inside a whole run: what the step, the mesh and the length of a state ask of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import errors, model, sharding
from memoryformer.convert import export, runs
from memoryformer.generation import sampler
from memoryformer.generation import text as text_lib
from memoryformer.model import losses, mixers
from memoryformer.ops import attention
from memoryformer.runs import metrics
from memoryformer.runs import steps as run_steps
from memoryformer.training import evaluate_run, experiment
from memoryformer.training import programs as programs_lib
from memoryformer.training import step as step_lib

PERFORMER = {
    "model.mixer": "performer",
    "model.mixer_options.num_features": 6,
    "model.mixer_options.redraw_every": 3,
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


def test_performer_redraws_on_schedule(tmp_path):
    """Red if the step does not reach the mixer, or if every step draws anew."""
    a, b, c = _gradients_at((0, 2, 3), tmp_path, **PERFORMER)
    assert a == b != c


def test_redrawn_features_are_those_of_one_device(tmp_path):
    """Red if a device draws features of its own."""
    even = {"model.vocab_size": 258}
    one = _gradients_at((4,), tmp_path, **PERFORMER, **even)
    eight = _gradients_at((4,), tmp_path, **PERFORMER, mesh="tensor:model=2", **even)
    np.testing.assert_allclose(one, eight, rtol=1e-4)


def test_draw_0_is_the_constant_one():
    """Red if evaluation and the first steps of training see other features."""
    config = model.ModelConfig(
        8,
        16,
        3,
        2,
        32,
        mixer="performer",
        code_bits=4,
        mixer_options={"redraw_every": 2},
    )
    drawn = mixers.draw(config, jnp.int32(0), jnp.int32(2))
    np.testing.assert_array_equal(drawn, mixers.draw(config, 0, 2))
    network = model.merge(config, model.init(config))
    nothing = mixers.SeqInfo(None, None)
    for i, block in enumerate(network.blocks):
        np.testing.assert_array_equal(drawn[i], block.mixer.rows(nothing))
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1


def test_a_run_adds_its_seed_and_its_schedule():
    """Mutation: `step // redraw_every`, which changes the features after the last step."""
    config = model.ModelConfig(
        8,
        16,
        3,
        2,
        32,
        mixer="performer",
        code_bits=4,
        mixer_options={"redraw_every": 3},
    )
    draws = [mixers.with_draw(config, 5, step).performer_draw for step in range(8)]
    assert draws == [0, 0, 0, 0, 1, 1, 1, 2]
    later = mixers.with_draw(config, 5, 4)
    assert later.performer_seed == 5
    # What goes on from there, as step 0 of another run, has them still.
    np.testing.assert_array_equal(
        mixers.draw(later, 0, 0), mixers.draw(config, 5, jnp.int32(4))
    )
    same = model.ModelConfig(8, 16, 3, 2, 32, code_bits=4)
    assert mixers.with_draw(same, 5, 4) is same and mixers.draw(same, 5, 4) is None


@pytest.fixture(scope="module")
def performer_run(tmp_path_factory):
    """Six steps with seed 3, features redrawn after three."""
    folder = tmp_path_factory.mktemp("performer")
    fields = {"train.num_steps": 6, "train.seed": 3, "eval.num_batches": 0}
    return toy.trained(folder, **PERFORMER, **fields)


def test_a_checkpoint_is_evaluated_with_its_features(performer_run):
    """Mutation: `experiment.load` without `with_draw`, or `_evaluate` without features."""
    logged = [r["val/loss"] for r in metrics.read(performer_run) if "val/loss" in r][-1]
    later = evaluate_run.evaluate_checkpoint(performer_run)
    config = toy.run_config(performer_run.parent, **PERFORMER)
    config.train.seed, config.train.num_steps, config.eval.batch_size = 7, 6, 4
    given = evaluate_run.evaluate_checkpoint(performer_run, config=config)
    np.testing.assert_allclose(
        [later["val/loss"], given["val/loss"]], logged, rtol=1e-6
    )
    run, params, facts = experiment.load(performer_run)
    assert (run.model.performer_seed, run.model.performer_draw) == (3, 1)
    stored = experiment.resolve(facts["config"]).model
    batch = toy.batch(stored, seq_len=16)
    nats = [
        losses.batch_nats(m, params, batch, features)
        for m, features in [
            (run.model, None),
            (stored, mixers.draw(stored, 3, 6)),  # what the last step was computed with
            (stored, None),
        ]
    ]
    np.testing.assert_array_equal(nats[0], nats[1])
    assert np.abs(nats[0] - nats[2]).max() > 1e-3


def test_generation_and_exports_have_the_features(performer_run, tmp_path):
    """Mutation: `open_run` or `export_run` with the stored config; `import_run` as well."""
    generator, _, run = text_lib.open_run(performer_run)
    _, params = run_steps.load(performer_run)
    prompt = np.arange(40, 50)[None]
    sampling = sampler.SamplingConfig(max_tokens=1, temperature=0)
    logits = model.forward(run.model, params, prompt)[0, -1]
    assert list(generator.stream(prompt[0].tolist(), sampling)) == [np.argmax(logits)]
    assert generator.model_config.performer_draw == 1
    runs.export_run(performer_run, tmp_path / "export")
    assert export.load_export(tmp_path / "export")[0] == run.model
    runs.import_run(tmp_path / "export", tmp_path / "back")
    again = experiment.load(tmp_path / "back")[0]
    assert again.model == run.model


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
    programs = programs_lib.programs(run, single)
    state, batch = programs.draw(0), toy.batch(run.model, seq_len=16)
    norms = [
        float(programs.train_step(state, batch, h)[1]["grad_norm"]) for _, h in made
    ]
    assert norms[0] != norms[1] and programs.train_step._cache_size() == 1


def test_two_sided_training_of_a_language_model_is_refused(tmp_path):
    """Mutation: no such check; the loss then falls to the loss of copying."""
    config = toy.run_config(tmp_path, **{"model.causal": False})
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
