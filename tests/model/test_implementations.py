"""What a config names and cannot have is refused; what is only read takes what there is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import errors, model, sharding
from memoryformer.dryrun import examine as dryrun
from memoryformer.generation import sampler
from memoryformer.model import implementations
from memoryformer.ops.lookup import native as lookup_native
from memoryformer.training import evaluate_run, experiment, loop

REFUSED = [
    ({"lookup": "gpu"}, "cpu", "model.lookup='gpu' cannot run: the platform is cpu"),
    ({"lookup": "gpu"}, "tpu", "the platform is tpu, not gpu"),
    ({"lookup": "gpu"}, 8.0, "compute capability is 8.0, below 9.0"),
    ({"lookup": "gpu", "dtype": "float64"}, 9.0, "it takes no float64 tables"),
    (
        {"lookup": "native"},
        "gpu",
        "model.lookup='native' cannot run: the platform is gpu",
    ),
    ({"lookup": "native", "dtype": "float64"}, "cpu", "not float64"),
    (
        {"mixer_options": {"attention": "cudnn"}},
        "cpu",
        "model.mixer_options.attention='cudnn' cannot run: the platform is",
    ),
    (
        {"mixer_options": {"attention": "cudnn"}},
        9.0,
        "the dtype is float32, not bfloat16",
    ),
    (
        {"mixer_options": {"attention": "cudnn"}, "dtype": "bfloat16", "seq_len": 13},
        9.0,
        "length 13 is odd",
    ),
    (
        {"mixer_options": {"attention": "cudnn"}, "dtype": "bfloat16", "embed_dim": 24},
        9.0,
        "width 12 is not a multiple of 8 up to 128",
    ),
    (
        {
            "mixer_options": {"attention": "cudnn"},
            "dtype": "bfloat16",
            "embed_dim": 272,
        },
        9.0,
        "width 136 is not a multiple of 8 up to 128",
    ),
    ({"mixer_options": {"attention": "splash"}}, "gpu", "the platform is gpu, not tpu"),
    (
        {"mixer_options": {"attention": "splash"}},
        "tpu",
        "the length 12 is not a multiple of 128",
    ),
]


@pytest.mark.parametrize("fields, where, message", REFUSED)
def test_refused_in_one_line(fields, where, message):
    """Mutation tried: a field left out of `_refusals`; the capability not passed on."""
    config = toy.model_config("memory", **fields)
    platform, capability = where, None
    if isinstance(where, float):
        platform, capability = "gpu", where
    with pytest.raises(errors.ConfigError) as caught:
        implementations.check(config, platform, capability)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    (field,) = {"lookup", "mixer_options"} & fields.keys()
    name = "lookup" if field == "lookup" else "mixer_options.attention"
    assert f"use model.{name}='auto'" in str(caught.value)
    for anywhere in ("cpu", "gpu", "tpu"):  # and what it advises can run
        implementations.check(_with(config, name, "auto"), anywhere)


def _with(config, name, value):
    if name == "lookup":
        return dataclasses.replace(config, lookup=value)
    return implementations.with_attention(config, value)


def test_what_can_run_is_accepted():
    """Also on platforms that are not here, and where nothing is known of one."""
    able = {"dtype": "bfloat16", "seq_len": 128}
    for fields, platform in (
        ({"lookup": "gpu"}, "gpu"),
        ({"lookup": "gpu"}, "cuda"),
        ({"lookup": "onehot", "mixer_options": {"attention": "splash"}}, "tpu"),
        ({"mixer_options": {"attention": "cudnn"}}, "gpu"),
        ({"lookup": "gpu", "mixer_options": {"attention": "splash"}}, "abstract"),
    ):
        config = toy.model_config("memory", **able | fields)
        implementations.check(config, platform, 9.0)
    dense = toy.model_config("dense", lookup="gpu")  # which looks nothing up
    implementations.check(dense, "cpu")


def test_without_a_compiler(monkeypatch):
    """'native' says what is missing; 'auto' goes on without."""
    monkeypatch.setattr(lookup_native, "_load", lambda: (None, "no C++ compiler found"))
    with pytest.raises(
        errors.ConfigError, match=r"'native' cannot run: no C\+\+ compiler"
    ):
        implementations.check(toy.model_config("memory", lookup="native"), "cpu")


@pytest.mark.parametrize(
    "field, value", [("lookup", "gpu"), ("mixer_options.attention", "cudnn")]
)
def test_at_every_door(field, value, tmp_path, toy_run):
    """Training, its dry run and an evaluation that asks for it refuse it; a run that was
    trained with it elsewhere is evaluated and sampled all the same.

    Mutation tried: `check` left out of `_check_fit`; `readable` left out of the generator.
    """
    fields = {f"model.{field}": value}
    config = toy.run_config(toy_run.parent, **fields)
    message = f"model.{field}='{value}' cannot run"
    with pytest.raises(errors.ConfigError, match=message):
        loop.train(config, tmp_path / "run")
    with pytest.raises(errors.ConfigError, match=message):
        dryrun.examine(experiment.resolve(config), "cpu")
    with pytest.raises(errors.ConfigError, match=message):
        evaluate_run.evaluate_checkpoint(toy_run, None, config)
    elsewhere = _with(toy.model_config("memory"), field, value)
    params = model.init(elsewhere)
    here = _with(elsewhere, field, "auto")
    outputs = [
        sampler.Generator(c, params)._prefill(
            params,
            model.merge(here, params).init_state(1, 8),
            jnp.zeros((1, 4), jnp.int32),
            _seq(4),
        )[0]
        for c in (elsewhere, here)
    ]
    np.testing.assert_array_equal(*outputs)
    assert implementations.readable(elsewhere) == here


def _seq(length):
    from memoryformer.model import mixers

    return mixers.SeqInfo.of_tokens(jnp.zeros((1, length), jnp.int32))


def test_a_run_of_another_machine_is_evaluated(toy_run, monkeypatch):
    """Without a config of the reader's own. Mutation tried: `readable` left out."""
    load = experiment.load

    def of_a_gpu(workdir, step=None):
        run, params, facts = load(workdir, step)
        named = dataclasses.replace(
            implementations.with_attention(run.model, "cudnn"), lookup="gpu"
        )
        return dataclasses.replace(run, model=named), params, facts

    want = evaluate_run.evaluate_checkpoint(toy_run)["val/loss"]
    monkeypatch.setattr(experiment, "load", of_a_gpu)
    got = evaluate_run.evaluate_checkpoint(toy_run)["val/loss"]
    assert got == pytest.approx(want, rel=1e-5)


def test_the_model_itself_refuses():
    """Where no door was passed: as it is lowered, never another lookup in silence."""
    config = toy.model_config("memory", lookup="gpu", num_layers=1)
    params = model.init(config)
    with pytest.raises(
        ValueError, match="lookup 'gpu' cannot run: the platform is cpu"
    ):
        model.forward(config, params, jnp.zeros((1, 12), jnp.int32))
    assert sharding.make("single").platform == jax.default_backend() == "cpu"


def test_what_a_model_is_read_with():
    """'auto' for what cannot run here, and for fused attention wherever it runs.

    Mutations: `==` for `!=`; another platform than the one that is named; a mixer without
    attention refused for it; the length of a row for that of a chunk.
    """
    for fields, platform, lookup, attention in (
        ({}, "cpu", "reference", "xla"),
        ({"lookup": "gpu"}, "cpu", "auto", "xla"),
        ({"lookup": "gpu"}, "gpu", "gpu", "xla"),
        ({"lookup": "gpu"}, "abstract", "gpu", "xla"),
        (
            {"mixer_options": {"attention": "splash"}, "seq_len": 128},
            "tpu",
            "reference",
            "auto",
        ),
        (
            {"mixer_options": {"attention": "splash"}, "seq_len": 128},
            None,
            "reference",
            "auto",
        ),
    ):
        config = toy.model_config("memory", **fields)
        found = implementations.readable(config, platform)
        assert (found.lookup, found.mixer_options.attention) == (lookup, attention)
    config = toy.model_config(
        "memory",
        seq_len=256,
        mixer_options={"attention": "splash"},
        lookup="xla",
        recurrence="rmt",
        recurrence_options={"num_slots": 32, "chunk_size": 64},
    )
    implementations.check(config, "tpu")  # 64 + 2 * 32 places of the trunk
    longer = dataclasses.replace(
        config, recurrence_options={"num_slots": 16, "chunk_size": 64}
    )
    with pytest.raises(errors.ConfigError, match="the length 96 is not a multiple"):
        implementations.check(longer, "tpu")
