"""A mixer that is written here in one file, with one line in `MIXERS`, and all that follows."""

import dataclasses
import importlib.util
import math
import pathlib

import jax
import numpy as np
import oracle_mixers
import pytest
import test_mixers as battery
import toy

from memoryformer import accounting, model, presets
from memoryformer import config as config_lib
from memoryformer.dryrun import report
from memoryformer.errors import ConfigError
from memoryformer.model import mixers
from memoryformer.training import experiment

SOURCE = '''
"""Kernel attention with phi(x) = floor + x^2."""

import dataclasses
from typing import ClassVar

from memoryformer.config import field
from memoryformer.model.mixers import base, kernel


class Squares(kernel.KernelAttention):
    """phi(x) = floor + x^2, which is positive."""

    @dataclasses.dataclass(frozen=True)
    class Options(base.PrefixOptions):
        """And the floor."""

        floor: float = field("numbers", 1.0, doc="phi(0).")

    EXAMPLES: ClassVar = {"squares": {}, "squares_low": {"floor": 0.5}}
    ABOUT = base.About("floor + x^2 features", "2 E D", "E (E + 1)", "none")

    def __init__(self, config, project, *, rngs, layer):
        super().__init__(config, project, rngs=rngs, layer=layer)
        self.floor = config.mixer_options.floor

    def features(self, q, k, seq, state):
        """Both are positive: sums need no shift."""
        return self.floor + q**2, self.floor + k**2, None
'''
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "mixers.md"


def oracle(config, params, x, positions, segment_ids):
    """The same, from the definition."""
    q, k, v = oracle_mixers.split(config, params, x)
    floor = config.mixer_options.floor
    scores = np.einsum("bthe,bshe->bhts", floor + q**2, floor + k**2)
    guard = oracle_mixers._unguarded
    return oracle_mixers._kernel(config, params, scores, v, segment_ids, guard)


@pytest.fixture(scope="module", autouse=True)
def squares(tmp_path_factory):
    """Register the mixer, and take it away again."""
    path = tmp_path_factory.mktemp("mixer") / "squares.py"
    path.write_text(SOURCE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("squares", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mixers.MIXERS, "squares", module.Squares)
        patch.setitem(battery.CASES, "squares", ("squares", {"floor": 0.5}, {}))
        patch.setitem(oracle_mixers.ORACLES, "squares", oracle)
        yield


@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        (battery.test_oracle, ()),
        (battery.test_no_future, ()),
        (battery.test_chunks_of_a_sequence_continue_each_other, ((7, 1, 7, 7, 1, 1),)),
        (battery.test_packed_documents_are_separate, ()),
        (battery.test_padding_is_irrelevant, ()),
        (battery.test_padding_takes_no_place, ()),
        (battery.test_gradient, ()),
        (battery.test_eight_devices, ()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_battery_of_mixers(test, arguments):
    """Mutation: `self.floor = 1.0` in the source above, which the oracle does not say."""
    test(battery._case("squares", "dense"), *arguments)


def test_it_works_with_memory_layers():
    """Mutation: `make_projection` of the mixer's own."""
    battery.test_oracle(battery._case("squares", "memory"))


def test_its_options_are_set_and_refused(tmp_path):
    """Mutation: a section of options made once, when the module is loaded."""
    config = toy.run_config(tmp_path)
    config_lib.override(
        config, {"model.mixer_options.floor": 2.0, "model.mixer": "squares"}
    )
    assert experiment.resolve(config).model.mixer_options.floor == 2
    config = presets.with_mixer(presets.pythia("70m"), "squares_low")
    assert experiment.resolve(config).model.mixer_options.floor == 0.5
    config.model.mixer = "linear"
    with pytest.raises(ConfigError, match="an option of squares"):
        experiment.resolve(config)
    assert "model.mixer_options.floor" in config_lib.described(experiment.Experiment)
    with pytest.raises(ConfigError, match="has only a causal form"):
        toy.model_config(mixer="squares", causal=False)


def test_its_cost_is_counted():
    """Parameters against the model's, operations by hand. Mutation: no `cost` of its base."""
    config = toy.model_config("dense", mixer="squares")
    counted = accounting.count(config, value_bytes=4)
    shapes = jax.eval_shape(lambda: model.init(config))
    assert counted.parameters.total == sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)
    )
    assert counted.block.mixing == 12 * 2 * 8 * 16  # L 2 E D
    assert counted.decode_state_bytes == 4 * 2 * 2 * 8 * 9  # 2 layers, 2 heads


def test_a_dry_run_of_it(tmp_path):
    """Mutation: no line in MIXERS."""
    fields = {"model.mixer": "squares", "model.mixer_options.floor": 0.5}
    run = experiment.resolve(toy.run_config(tmp_path, **fields))
    assert "compiles" in str(report.examine(run, "cpu"))


def test_the_table_of_mixers_is_the_pages():
    """docs/mixers.md, and a row for the made-up one. Mutation: a row of the page edited."""
    row = "| `squares` | floor + x^2 features | 2 E D | E (E + 1) | none |\n"
    table = mixers.table()
    assert row in table
    assert table.replace(row, "") in PAGE.read_text("utf-8")


def test_every_mixer_is_described():
    """One meaning and one type for an option of one name. Mutation: `num_slots: float`."""
    kinds: dict[str, set] = {}
    for mixer in mixers.MIXERS.values():
        assert mixer.EXAMPLES and mixer.ABOUT
        for item in dataclasses.fields(mixer.Options):
            assert item.metadata["doc"].endswith(".")
            changes = item.metadata["changes"]
            kinds.setdefault(item.name, set()).add((item.type, changes))
    assert all(len(kind) == 1 for kind in kinds.values())
