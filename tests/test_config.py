"""From a ConfigDict at the door to frozen dataclasses, and the configs that ship."""

import dataclasses
import json
import operator
import pathlib

import jax
import ml_collections
import pytest
import toy

from memoryformer import config as config_lib
from memoryformer import model, sharding
from memoryformer.accounting import __main__ as accounting_command
from memoryformer.data import options as data_options
from memoryformer.errors import ConfigError
from memoryformer.tasks import experiment as task_experiment
from memoryformer.training import experiment, programs

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
ARGUMENTS = {  # every argument that a shipped config takes
    "quickstart": ("", "dense"),
    "studies": ("", "mini"),
    "listops": ("", "softmax", "linformer", "conv_luna"),
    "shared_memory": ("texts", "pathfinder", "listops"),
    "pmi": ("relations", "relations-none", "stories", "triangles-no-sharing"),
    "memoryformer_tiny": ("", "released"),
    "memoryformer_small": ("", "released"),
}
SHIPPED = [
    f"{path}:{argument}" if argument else str(path)
    for path in sorted(CONFIGS.glob("*.py"))
    for argument in ARGUMENTS.get(path.stem, ("",))
]
every_config = pytest.mark.parametrize(
    "path", SHIPPED, ids=lambda p: pathlib.Path(p).name
)


@every_config
def test_shipped_config(path):
    """It resolves, its model builds (shapes only) and its batch divides over its mesh.

    Mutations: a misspelt field; embed_dim 130 in configs/quickstart.py.
    """
    config = config_lib.load(path)
    if "task" in config:  # not for train.py
        task = task_experiment.resolve(config).task
        assert jax.eval_shape(lambda: task.init(0))
        return
    run = experiment.resolve(config)
    params = jax.eval_shape(lambda: model.init(run.model))
    assert params["embed"]["embedding"].shape == (
        run.model.vocab_size,
        run.model.embed_dim,
    )
    programs.check_fit(run, sharding.make("single"))
    programs.check_fit(run, sharding.make("data", jax.devices()[:4]))


@every_config
def test_every_field_can_be_overridden(path):
    """No list, which ml_collections cannot override, and None only where its type is known;
    files run twice alike.

    Mutation: `path: str | None = None` in DataConfig.
    """
    first, second = config_lib.load(path), config_lib.load(path)
    assert first.to_dict() == second.to_dict()
    for name, value in config_lib.flatten(first).items():
        if value is None and "_options." in name:
            section, _, option = name.rpartition(".")
            options = operator.attrgetter(section)(first)
            assert options.get_type(option) in (bool, int, float, str, tuple), name
        else:
            assert isinstance(value, bool | int | float | str | tuple), (name, value)


def test_a_shipped_config_documents_itself():
    """A docstring with its command, and `get_config` documented.

    Mutation: no docstring in configs/pythia_70m.py.
    """
    for path in CONFIGS.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        docstring = text.split('"""')[1]
        assert f"configs/{path.name}" in docstring or "make " in docstring, path


@dataclasses.dataclass(frozen=True)
class Section:
    size: int
    rate: float = 0.5
    name: str = "a"
    flag: bool = False
    sizes: tuple[int, ...] = (1, 2)


def build(**values):
    return config_lib.build(Section, values, "section")


def test_build():
    """Defaults, an int for a float, a list for a tuple, a placeholder not filled.

    Mutation: `return float(value)` left out of `_checked`.
    """
    assert build(size=3) == Section(3)
    made = build(size=3, rate=1, sizes=[4], name=None)
    assert made == Section(3, rate=1.0, sizes=(4,)) and isinstance(made.rate, float)
    defaults = config_lib.defaults(Section)
    assert set(defaults) == {f.name for f in dataclasses.fields(Section)}
    with pytest.raises(ConfigError, match=r"section\.size: missing"):
        config_lib.build(Section, defaults, "section")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"size": 1, "rat": 1.0}, "section.rat: unknown field; did you mean 'rate'?"),
        ({"size": 1, "zzz": 1}, "section.zzz: unknown field; known: flag, name"),
        ({}, "section.size: missing"),
        ({"size": 1.5}, "section.size=1.5: expected int, got float"),
        ({"size": True}, "section.size=True: expected int, got bool"),
        ({"size": 1, "flag": 1}, "section.flag=1: expected bool, got int"),
        ({"size": 1, "name": 3}, "section.name=3: expected str, got int"),
        ({"size": 1, "rate": "x"}, "section.rate='x': expected float, got str"),
    ],
)
def test_mistakes_are_one_line(values, message):
    """Mutation: no `wrong_bool` in `_checked`."""
    with pytest.raises(ConfigError) as caught:
        build(**values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def whole(**fields):
    config = experiment.default_config()
    small = {"vocab_size": 8, "embed_dim": 16, "num_layers": 1, "num_heads": 2}
    values = {f"model.{k}": v for k, v in small.items()}
    values |= {"model.seq_len": 8, "train.num_steps": 4, "train.batch_size": 8}
    config.update_from_flattened_dict(values | fields)
    return config


def test_resolve_fills_in_every_default():
    """What is written beside a run says all; sections may be left out.

    Mutation: a section missing from `Experiment`.
    """
    run = experiment.resolve(whole())
    plain = experiment.as_dict(run)
    assert plain["model"]["code_bits"] == 8 and plain["mesh"] == "data"
    assert experiment.resolve(ml_collections.ConfigDict(plain)) == run
    few = {name: plain[name] for name in ("model", "train")}
    assert experiment.resolve(few) == run
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.model.embed_dim = 3


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train.num_steps": 0}, "train.num_steps=0: must be >= 1"),
        ({"train.num_microbatches": 0}, "train.num_microbatches=0: must be >= 1"),
        ({"train.max_skipped": -1}, "train.max_skipped=-1: must be >= 0"),
        ({"eval.batch_size": 0}, "eval.batch_size=0: must be >= 1"),
        ({"model.embed_dim": 20}, "model.embed_dim=20 is not a multiple"),
        ({"data.source": "texts"}, "did you mean 'text'"),
        ({"checkpoint.keep": 0}, "checkpoint.keep=0"),
        ({"optimizer.b1": 1.0}, "optimizer.b1=1.0"),
    ],
)
def test_mistakes_in_sections(fields, message):
    """Mutation: no `__post_init__` in EvalConfig."""
    with pytest.raises(ConfigError) as caught:
        experiment.resolve(whole(**fields))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_section_and_mesh_of_another_type():
    """Mutation: unknown sections ignored."""
    config = whole()
    with config.unlocked():
        config.trian = {"x": 1}
    with pytest.raises(
        ConfigError, match="trian: unknown section; did you mean 'train'"
    ):
        experiment.resolve(config)
    with pytest.raises(ConfigError, match="mesh=8: expected a preset's name"):
        experiment.resolve({**dict(whole()), "mesh": 8})


@pytest.mark.parametrize(
    "fields, devices, message",
    [
        ({"train.batch_size": 6}, 4, "batch_size=6 does not divide over 4 devices"),
        ({"train.num_microbatches": 3}, 4, "num_microbatches=3 does not divide the 2"),
        ({"mesh": "tensor", "model.num_heads": 2}, 4, "model.num_heads=2"),
        ({"optimizer.warmup_steps": 9}, 1, "optimizer.warmup_steps=9"),
    ],
)
def test_what_does_not_fit_the_devices(fields, devices, message):
    """Found before anything is read or written.

    Mutation: `_check_fit` without its loop over batch sizes.
    """
    run = experiment.resolve(whole(**fields))
    made = sharding.make(run.mesh, jax.devices()[:devices])
    with pytest.raises(ConfigError) as caught:
        programs.check_fit(run, made)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_load():
    """A file, an argument, overrides; a file that is not there.

    Mutation: overrides applied before the argument.
    """
    path = str(CONFIGS / "quickstart.py")
    config = config_lib.load(f"{path}:dense", **{"model.num_layers": 7})
    assert (config.model.projection, config.model.num_layers) == ("dense", 7)
    with pytest.raises(ConfigError, match=r"there is no file 'configs/none\.py'"):
        config_lib.load("configs/none.py")


def test_every_field_says_what_it_means():
    """Mutation: `doc=""` at optimizer.b1."""
    sections = [
        item.type
        for item in dataclasses.fields(experiment.Experiment)
        if dataclasses.is_dataclass(item.type)
    ]
    for section in sections:
        for item in dataclasses.fields(section):
            doc = item.metadata.get("doc", "")
            assert doc.endswith(".") and "\n" not in doc, (section, item.name)


def test_how_many_fields_there_are():
    """Beside the options of a choice. A new one makes another go."""
    flat = config_lib.flatten(experiment.default_config())
    assert len([name for name in flat if "_options." not in name]) <= 64


@dataclasses.dataclass(frozen=True)
class Mine:
    stride: int = config_lib.field("numbers", 2)


class Theirs:
    @dataclasses.dataclass(frozen=True)
    class Options:
        stride: int = config_lib.field("numbers", 3)
        mirror: str = config_lib.field("nothing", "", local=True)


def test_two_choices_of_somebody_else(monkeypatch):
    """Sources that another file registers, a dataclass and a class with one, have options.

    Mutations: `kind.Options` in any place; the first class's options alone in `_no_options`.
    """
    monkeypatch.setitem(data_options.SOURCES, "mine", Mine)
    monkeypatch.setitem(data_options.SOURCES, "theirs", Theirs)
    config = config_lib.load("configs/quickstart.py")
    config_lib.override(
        config, {"data.source": "theirs", "data.source_options.mirror": "x"}
    )
    options = experiment.resolve(config).data.source_options
    assert options == Theirs.Options(3, "x")
    assert "data.source_options.mirror" in experiment.may_change()
    assert "data.source_options.mirror" in experiment.may_differ()
    config_lib.override(config, {"data.source": "mine"})
    assert experiment.resolve(config).data.source_options == Mine(2)
    with pytest.raises(ConfigError, match=r"mirror: source='mine' has .* of theirs"):
        data_options.DataConfig("mine", {"mirror": "x"})


def counted(capsys, *words):
    """What `python -m memoryformer.accounting` says of the options of a model: (code, text)."""
    config = f"--config={CONFIGS}/pythia_70m.py:performer"
    with pytest.raises(SystemExit) as ended:
        accounting_command.main(["accounting", config, "--json", *words])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out or err


def slots(capsys, *words):
    """Slots of a layer of luna, from its parameters P [m, D]."""
    code, text = counted(capsys, *words)
    assert code == 0, text
    return json.loads(text)["parameters"]["mixers"] // 6 // 512


def test_options_on_the_command_line(capsys):
    """The mixer alone, with options in either order, and beside what the file sets for another.

    Mutations: `forget_options` not called by the parser; a section of the file's mixer alone.
    """
    luna, five = "--config.model.mixer=luna", "--config.model.mixer_options.num_slots=5"
    assert slots(capsys, luna) == 64
    assert slots(capsys, luna, five) == slots(capsys, five, luna) == 5
    assert slots(capsys, *luna.split("="), *five.split("=")) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--config.model.mixer_options.num_slots=5"],
            "an option of linformer, luna, co",
        ),
        (
            ["--config.model.mixer_options.num_slot=5"],
            "did you mean 'model.mixer_options",
        ),
        (["--config.model.mixer_options.num_features=x"], "invalid literal"),
        (["--config.model.luna_slots=5"], "set model.mixer_options.num_slots, of luna"),
        (["--config.model.mixer=lunar"], "did you mean 'luna'"),
    ],
)
def test_options_that_cannot_be_set(words, message, capsys):
    """One line each. Mutation: no `MOVED` in the command line's errors."""
    code, text = counted(capsys, *words)
    assert code == 2 and message in text and text.count("\n") == 1


def test_options_of_a_file_go_with_its_mixer():
    """For a sweep and for `load`. Mutation: `override` without `forget_options`."""
    path = f"{CONFIGS}/pythia_70m.py:performer"
    same = config_lib.load(path, **{"model.mixer_options.num_features": 9})
    assert same.model.mixer_options.redraw_every == 1000
    other = config_lib.load(path, **{"model.mixer": "cosformer"})
    assert experiment.resolve(other).model.mixer_options.prefix_chunk == 64
    assert other.model.mixer_options.redraw_every is None


def test_a_model_with_options_can_be_a_static_argument():
    """Mutation: options left a dict."""
    config = toy.model_config(mixer="luna", mixer_options={"num_slots": 3})
    again = toy.model_config(mixer="luna", mixer_options={"num_slots": 3})
    other = toy.model_config(mixer="luna", mixer_options={"num_slots": 4})
    assert hash(config) == hash(again) and config == again != other
    with pytest.raises(ConfigError, match="not the options of mixer='linear'"):
        dataclasses.replace(config, mixer="linear")
