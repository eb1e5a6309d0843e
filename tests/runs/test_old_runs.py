"""Runs and an export that older code wrote: read, evaluated and gone on with by this one.

tests/data/runs_of_old.tar.xz has what it computed from them: logits.npz and eval_*.json.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest
import toy

from memoryformer import config as config_lib
from memoryformer import model
from memoryformer.convert import export
from memoryformer.errors import ConfigError
from memoryformer.runs import compatibility, directory, old_configs
from memoryformer.runs import steps as run_steps
from memoryformer.sweep import old_names, points
from memoryformer.training import evaluate_run, experiment, loop

ARCHIVE = pathlib.Path(__file__).parents[1] / "data" / "runs_of_old.tar.xz"
each_run = pytest.mark.parametrize("name", ["softmax", "performer"])


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder of the runs, in which their configs name the corpus."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def close_to_old(got, name, old):
    want = np.load(old / "logits.npz")[name]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def stored(workdir):
    """Its config, for one of the devices that there are here."""
    config = experiment.complete(directory.read_json(workdir / "config.json"))
    return config | {"mesh": "single"}


@each_run
def test_a_run_gives_the_same_logits(name, old):
    """Mutations: an option of the mixer dropped by `upgraded`; another draw of the features."""
    run, params, _ = experiment.load(old / name)
    tokens = np.load(old / "logits.npz")["tokens"]
    close_to_old(toy.forward(run.model, params, tokens), name, old)


@each_run
def test_a_run_is_evaluated_to_the_same_figures(name, old):
    """Mutation: `manifest.facts` of the config as it was written."""
    want = json.loads((old / f"eval_{name}.json").read_text("utf-8"))
    got = evaluate_run.evaluate_checkpoint(old / name, config=stored(old / name))
    # A performer's fingerprint is that of its random features too, which were no parameters.
    differing = {"model_fingerprint"} if name == "performer" else set()
    for key in want.keys() - {"val/seconds"} - differing:
        is_text = isinstance(want[key], str)
        same = want[key] if is_text else pytest.approx(want[key], rel=1e-5)
        assert got[key] == same, key


@each_run
def test_a_run_goes_on(name, old):
    """Two more steps. Mutation: `Checkpointer._compare` with the config as it was written."""
    config = stored(old / name)
    config["train"]["num_steps"] = 6
    loop.train(config, old / name, allow=["train.num_steps"])
    assert run_steps.facts(old / name)["step"] == 6


def test_what_a_run_was_told_is_kept(old):
    """Where each field of old went. Mutation: any entry of MIXER_OPTIONS or _TIMEOUTS."""
    run = experiment.resolve(stored(old / "performer"))
    performer = model.mixers.MIXERS["performer"].Options
    assert run.model.mixer_options == performer(64, num_features=8, redraw_every=3)
    assert run.train.max_skipped == 0
    assert run.train.timeouts["first_step"] == 7200
    flat = {name: 3 for name in old_configs.MIXER_OPTIONS}
    flat |= {
        "attention": "auto",
        "logit_transform": "dape_v2",
        "conv_luna_filter": "pool",
    }
    then = {option for _, option in old_configs.MIXER_OPTIONS.values()}
    for mixer in model.mixers.MIXERS.keys() - {"mamba2", "recurformer"}:
        cls = model.mixers.MIXERS[mixer]
        section = old_configs.upgraded_model({"mixer": mixer} | flat)
        assert section.keys() == {"mixer", "mixer_options"}
        known = cls.Options.__dataclass_fields__.keys() & then
        assert section["mixer_options"].keys() == known
    for kind in ("rmt", "memformer"):  # those that there were
        cls = model.recurrence.KINDS[kind]
        flat = dict.fromkeys(old_configs.RECURRENCE_OPTIONS, 2)
        section = old_configs.upgraded_model({"recurrence": kind} | flat)
        assert (
            section["recurrence_options"].keys()
            == cls.Options.__dataclass_fields__.keys()
        )


# What the configs of tests/data/configs_of_old.json say, in the fields of today.
OF_OLD = {
    "quickstart": ("quickstart.py", {}),
    "lean": (
        "quickstart.py",
        {
            "optimizer.table_state": "lean",
            "optimizer.table_state_options.moment_dtype": "float32",
            "optimizer.table_state_options.dtype": "bfloat16",
            "optimizer.table_state_options.rounding": "stochastic",
            "optimizer.schedule": "wsd",
            "optimizer.schedule_options.decay_steps": 40,
            "optimizer.schedule_options.end_fraction": 0.05,
            "optimizer.schedule_options.cooldown_fraction": 0.5,
            "train.spikes": "skip",
            "train.spikes_options.window": 32,
            "metrics.trackers": "tensorboard,wandb:mine",
        },
    ),
    "dense": (
        "pythia_70m.py:luna",
        {
            "model.projection_options.ffn_multiple": 3,
            "data.source_options.text_field": "meta.text",
            "data.source_options.validation_path": "held",
            "data.source_options.validation_every": 7,
            "optimizer.schedule": "constant",
            "metrics.trackers": "",
        },
    ),
    "tfds": (
        "memoryformer_tiny.py:released",
        {
            "data.source": "tfds",
            "data.source_options.name": "lm1b",
            "data.source_options.max_documents": 9,
            "model.projection_options.temperature": 0.5,
            "model.projection_options.extra_bits": 1,
            "metrics.trackers": "wandb:mine",
        },
    ),
    "text": (
        "studies.py:mini",
        {
            "data.source": "text",
            "data.path": "x",
            "data.source_options.separator": "@@",
            "data.align_documents": 32,
            "model.recurrence": "rmt",
        },
    ),
    "prepared": (  # of which a spike is none, but the window is a shape of the state
        "studies.py:mini",
        {
            "data.source": "prepared",
            "data.path": "x",
            "train.spikes": "skip",
            "train.spikes_options.sigmas": 0.0,
            "train.spikes_options.window": 64,
        },
    ),
}
OLD_CONFIGS = json.loads(
    (ARCHIVE.parent / "configs_of_old.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", OF_OLD)
def test_a_config_of_old_says_the_same(name):
    """And without the fields that its code did not have yet, the same but for defaults.

    Mutations: any entry of CHOOSERS or NEW_CHOOSERS; trackers not joined; lean tables with the
    defaults of today where a field was left out.
    """
    file, fields = OF_OLD[name]
    today = config_lib.load(f"configs/{file}")
    config_lib.override(today, fields)
    want = compatibility.plain(experiment.as_dict(experiment.resolve(today)))
    old = OLD_CONFIGS[name]
    assert compatibility.plain(experiment.complete(old)) == want
    assert compatibility.plain(experiment.complete(want)) == want
    section = {"table_dtype": "bfloat16"}  # of code that had no other
    upgraded = old_configs.upgraded({"optimizer": section})["optimizer"]
    assert upgraded["table_state_options"]["second_moment"] == "full"


@pytest.mark.parametrize("name", OF_OLD)
def test_points_of_old_configs_are_found(name):
    """The digest of a point is of what older code resolved, field by field.

    Mutations: the defaults of lean tables for those of full ones; fields that came later named
    at their defaults; the last field that moved left where it is.
    """
    old = OLD_CONFIGS[name]
    unnamed = points.bookkeeping() | {"metrics.tensorboard", "metrics.wandb"}
    today, want = (
        {k: v for k, v in config_lib.flatten(c).items() if k not in unnamed}
        for c in (compatibility.plain(experiment.complete(old)), old)
    )
    today = old_names.without_later_fields(today)
    assert old_names.spellings(today)[0] == want
    moved = "model.projection_options.output_std"
    last = {k: v for k, v in today.items() if k != moved}
    assert old_names.last_spelling(today) == last | {
        "model.output_std": want["model.output_std"]
    }


def test_a_config_of_today_stays_as_it_is(tmp_path):
    """Mutation: `max_skipped` forgotten for every run."""
    fields = {"train.max_skipped": 4, "train.timeout_scale": 0.5, "model.mixer": "luna"}
    today = experiment.as_dict(experiment.resolve(toy.run_config(tmp_path, **fields)))
    assert old_configs.upgraded(today) == today


def test_an_export_is_read(old):
    """Mutation: `load_export` without `upgraded_model`."""
    config, params = export.load_export(old / "export")
    tokens = np.load(old / "logits.npz")["tokens"]
    close_to_old(toy.forward(config, params, tokens), "export", old)


@pytest.mark.parametrize("value", [3, 0, [1, 2], [], "ab", True])
@pytest.mark.parametrize("stale", [{}, {"performer_features": 8}])
def test_an_export_with_options_of_no_kind_is_refused(value, stale, old):
    """In one line. Mutations: `dict(values)` of whatever there is, here or in `upgraded_model`."""
    path = old / "export" / "config.json"
    fields = json.loads(path.read_text("utf-8"))
    fields["model"] |= stale | {"mixer_options": value}
    path.write_text(json.dumps(fields), "utf-8")
    with pytest.raises(
        ConfigError, match=r"model\.mixer_options=.*: expected"
    ) as caught:
        export.load_export(old / "export")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["x", None, 1.5, True])
def test_a_stored_draw_that_is_no_number_is_refused(value):
    """In one line; one of the two alone is enough. Mutation: the values as they are."""
    stored = {"model": {"performer_seed": value}}
    with pytest.raises(ConfigError, match=r"model\.performer_seed=.*: expected an int"):
        old_configs.retired(stored)
    want = {"performer_seed": 0, "performer_draw": 2}
    assert old_configs.retired({"model": {"performer_draw": 2}}) == want
    assert old_configs.retired({"model": {}}) == {}


def test_old_timeouts_that_are_no_numbers():
    """None was not set; a text is refused. Mutation: whatever it is, divided."""
    train = {"step_timeout": None, "first_step_timeout": 3600.0}
    assert old_configs.upgraded({"train": train})["train"] == {"timeout_scale": 0.5}
    assert old_configs.upgraded({"train": {"step_timeout": None}})["train"] == {}
    for value in ("1h", True, [3]):
        with pytest.raises(ConfigError, match=r"train\.step_timeout=.*: expected sec"):
            old_configs.upgraded({"train": {"step_timeout": value}})


@pytest.mark.parametrize(
    ("name", "value", "new"),
    [
        ("model.linformer_slots", 3, "model.mixer_options.num_slots, of linformer"),
        ("model.recurrence_chunk", 3, "model.recurrence_options.chunk_size, of rmt"),
        ("train.step_timeout", 9.0, "train.timeout_scale, times 1800 seconds"),
        ("train.nonfinite", "skip", "train.max_skipped"),
        ("model.extra_bits", 1, "model.projection_options.extra_bits, of memory"),
        ("data.separator", "@", "data.source_options.separator, of text"),
        ("optimizer.end_fraction", 0.1, "optimizer.schedule_options.end_fraction, of"),
        ("optimizer.table_dtype", "bfloat16", "of lean (optimizer.table_state=lean)"),
        ("train.spike_sigmas", 6.0, "train.spikes_options.sigmas, of skip"),
        ("metrics.wandb", "mine", "metrics.trackers, to wandb:PROJECT"),
        ("model.performer_seed", 7, "train.seed, of which random features are drawn"),
        ("model.performer_draw", 0, "train.seed, of which random features are drawn"),
    ],
)
def test_a_config_file_with_an_old_field_is_told_the_new_one(
    name, value, new, tmp_path
):
    """In one line. Mutation: `resolve` and `from_config` upgrade in silence."""
    config = toy.run_config(tmp_path)
    section, _, key = name.partition(".")
    config[section][key] = value
    with pytest.raises(ConfigError, match="no longer a field; set ") as caught:
        experiment.resolve(config)
    assert new in str(caught.value) and "\n" not in str(caught.value)
    flat = config_lib.flatten(experiment.default_config())
    assert name not in flat
