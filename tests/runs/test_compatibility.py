"""What may change while a run goes on: said at the field, and true of every field that says so."""

import shutil

import jax
import numpy as np
import pytest
import toy

from memoryformer import config
from memoryformer.errors import ConfigError
from memoryformer.runs import compatibility
from memoryformer.training import evaluate_run, experiment, programs

BASE = {"optimizer.schedule": "constant", "train.num_steps": 3, "eval.every_steps": 0}
NOTHING = {
    "checkpoint.every_minutes": 50.0,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 3,
    "checkpoint.keep_every": 4,
    "data.data_dir": "elsewhere",  # below
    "data.end_token": "<eot>",  # that of the run's own tokenizer.json, below
    "data.path": "a copy",  # below
    "data.tokenizer": "tokenizer.json",  # the run's own, below
    "eval.batch_size": 16,
    "eval.every_steps": 2,
    "eval.num_batches": 1,
    "metrics.trackers": "tensorboard",
    "train.compilation_cache": "off",
    "train.log_every": 1,
    "train.max_skipped": 2,
    "train.teacher": "a copy",  # tests/training/test_distillation.py
    "train.timeout_scale": 0.5,
}
ROUNDING = {
    "mesh": "tensor:model=2",
    "model.mixer_options.attention": "auto",
    "model.lookup": "onehot",
    "model.mixer_options.prefix_chunk": 8,  # of another mixer: below
    "model.remat": "full",
    "model.scan_layers": True,
    "model.sequence_chunk": 4,
    "train.num_microbatches": 2,
}


def flat(run):
    return config.flatten(experiment.as_dict(run))


def test_every_field_that_may_change_is_tried():
    """A new one needs a line above. Mutation: `train.seed` declared to change nothing."""
    described = config.described(experiment.Experiment)
    said = {
        kind: {name for name, (changes, _) in described.items() if changes == kind}
        for kind in config.CHANGES
    }
    assert said["nothing"] == NOTHING.keys() and said["rounding"] == ROUNDING.keys()
    keys = set(config.flatten(experiment.default_config()))
    assert set(described) == keys | {"model.causal"}
    assert experiment.may_change() == said["nothing"] | said["rounding"]
    assert {"train.seed", "model.score", "optimizer.b1"} <= said["numbers"]
    assert experiment.may_differ() == {
        *("data.path", "data.data_dir", "metrics.trackers")
    }


@pytest.mark.parametrize("name", sorted((NOTHING | ROUNDING).keys()))
def test_each_alone_is_accepted_everywhere(name, tmp_path):
    """On resume, and where it is of the model or the data, by evaluation and by sharing.

    Mutation tried: a list of evaluation's own (attention and sequence_chunk were refused).
    """
    value = (NOTHING | ROUNDING)[name]
    # The built-in tokenizers have an end token of their own.
    given = {"data.tokenizer": "own.json"} if name == "data.end_token" else {}
    if name == "train.teacher":  # with one and without one is another run
        given = {name: "there"}
    if name == "model.mixer_options.prefix_chunk":  # which softmax has not
        given = {"model.mixer": "linear"}
    old = toy.run_config(tmp_path, **given)
    new = toy.run_config(tmp_path, **given | {name: value})
    saved, run = experiment.as_dict(experiment.resolve(old)), experiment.resolve(new)
    ours = experiment.as_dict(run)
    changes = compatibility.check(saved, ours, experiment.may_change())
    assert [change[0] for change in changes] == [name]
    evaluate_run.check_same_model(saved, run)
    shared = programs.program(run) == programs.program(experiment.resolve(old))
    assert shared == (name in NOTHING)
    with pytest.raises(ConfigError, match=name):
        compatibility.check(saved, ours)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of three steps, and what the next three make of it if nothing changes."""
    folder = tmp_path_factory.mktemp("fields")
    toy.trained(folder, "begun", **BASE)
    shutil.copytree(folder / "begun", folder / "straight")
    toy.trained(folder, "straight", **BASE | {"train.num_steps": 6})
    return folder


def resumed(folder, name, **changed):
    shutil.copytree(folder / "begun", folder / name)
    toy.trained(folder, name, **BASE | {"train.num_steps": 6} | changed)
    return experiment.load(folder / name)[1]


def test_nothing_means_not_a_bit(begun):
    """All of them changed at once, text and cache moved: the same parameters."""
    shutil.copytree(begun / "corpus", begun / "moved" / "corpus")
    shutil.copytree(begun / "cache", begun / "moved" / "cache")
    places = {
        "data.path": str(begun / "moved" / "corpus"),
        "data.data_dir": str(begun / "moved" / "cache"),
        "data.tokenizer": str(begun / "begun" / "tokenizer.json"),
        "train.teacher": "",  # it would be asked for
    }
    got = resumed(begun, "nothing", **NOTHING | places)
    want = experiment.load(begun / "straight")[1]
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_rounding_means_rounding(begun):
    """All of them changed at once, on another mesh; and evaluated under the change."""
    plain = {
        k: v for k, v in ROUNDING.items() if k != "model.mixer_options.prefix_chunk"
    }
    got = resumed(begun, "rounding", **plain)
    want = experiment.load(begun / "straight")[1]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # noqa: E731
    jax.tree.map(close, got, want)
    alone = evaluate_run.evaluate_checkpoint(begun / "straight")
    changed = toy.run_config(begun, **plain | {"eval.batch_size": 8})
    other = evaluate_run.evaluate_checkpoint(begun / "straight", None, changed)
    assert other["val/loss"] == pytest.approx(alone["val/loss"], rel=1e-5)


def test_a_linear_mixer_goes_on_with_other_chunks(tmp_path):
    """The one field that softmax does not read."""
    linear = BASE | {"model.mixer": "linear", "model.mixer_options.prefix_chunk": 16}
    workdir = toy.trained(tmp_path, **linear)
    before = evaluate_run.evaluate_checkpoint(workdir)
    other = linear | {"model.mixer_options.prefix_chunk": 4, "train.num_steps": 4}
    changed = toy.run_config(tmp_path, **other)
    after = evaluate_run.evaluate_checkpoint(workdir, None, changed)
    assert after["val/loss"] == pytest.approx(before["val/loss"], rel=1e-5)
    toy.trained(tmp_path, **other)


def test_another_tokenizer_is_told_by_twelve_digits():
    """Where both are known. Mutations: `or` for `and`; 13; old and new exchanged."""
    one, two = ({"sha256": c * 64, "end_token": f"<{c}>"} for c in "ab")
    for pair in ((None, one), (one, None), (None, None), (one, dict(one))):
        compatibility.check_tokenizer(*pair, 3)
    told = r"^checkpoint 3 was trained with the tokenizer a{12} \(<a>\), this data has b{12} "
    with pytest.raises(ConfigError, match=told):
        compatibility.check_tokenizer(one, two, 3)
    with pytest.raises(ConfigError, match="was trained with the tokenizer"):
        compatibility.check_tokenizer(one, one | {"end_token": "<c>"}, 3)


def test_what_differs_and_what_may():
    """By field, sorted; by patterns; a hint where the schedule's end has moved.

    Mutations: `all` for `any`; `and` for `or`; nothing allowed, or all, unless asked.
    """
    saved = {"a": {"x": 1, "y": (1, 2)}, "train": {"num_steps": 5}, "old": 1}
    new = {"a": {"x": 2, "y": [1, 2]}, "train": {"num_steps": 6}, "b": 3}
    changes = compatibility.drift(saved, new)
    assert [field for field, *_ in changes] == ["a.x", "b", "old", "train.num_steps"]
    assert changes[0] == ("a.x", 1, 2) and changes[1][1:] == (compatibility.ABSENT, 3)
    assert compatibility.describe(changes[:1]) == "  a.x: 1 -> 2"
    for allow in (
        ["a.*", "b", "old", "train.*"],
        ["*"],
        {"a.x", "b", "o?d", "train.n*"},
    ):
        assert compatibility.check(saved, new, allow) == changes
    with pytest.raises(
        ConfigError, match=r"schedule_options.decay_steps\); .*train.num_s"
    ):
        compatibility.check(saved, new, ["a.*", "b", "old"])
    with pytest.raises(ConfigError, match=r"--allow=a\.x,b,old,train\.num_steps$"):
        compatibility.check(saved, new)
    with pytest.raises(ConfigError, match=r"a\.x: 1 -> 2; start in a new") as caught:
        compatibility.check(saved, new, ["b", "old", "train.*"])
    assert "decay_steps" not in str(caught.value)
    options = {"schedule_options": {"decay_steps": 9}}
    fixed = {"optimizer": options, "train": {"num_steps": 5}}
    longer = fixed | {"train": {"num_steps": 6}}
    assert len(compatibility.check(fixed, longer)) == 1
    for either in (
        (fixed, {"train": {"num_steps": 6}}),
        ({"train": {"num_steps": 5}}, longer),
    ):
        with pytest.raises(ConfigError, match=r"train\.num_steps: 5 -> 6"):
            compatibility.check(*either, ["optimizer.*"])
    assert compatibility.check(saved, dict(saved)) == []
    text = compatibility.shared({"b": {"x": 1, "y": 2}, "a": 3}, {"b.x"})
    assert text == '{"a": 3, "b.y": 2}'
    with pytest.raises(ConfigError, match="the config must hold JSON values only"):
        compatibility.plain({"a": object()})
