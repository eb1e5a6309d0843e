"""A whole experiment: every section of a config as a frozen dataclass, checked together.

Nothing behind `resolve` sees a ConfigDict. Start there.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from memoryformer import config as config_lib
from memoryformer import data
from memoryformer.cluster import watchdog
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.files import paths
from memoryformer.model import ModelConfig, joined, older, recurrence
from memoryformer.notation import Params
from memoryformer.runs import old_configs
from memoryformer.runs import steps as run_steps
from memoryformer.runs.checkpoint import CheckpointConfig
from memoryformer.runs.metrics import MetricsConfig
from memoryformer.training import compilation_cache as compilation_cache_lib
from memoryformer.training import optimizer as optimizer_lib
from memoryformer.training import spikes as spikes_lib


@dataclasses.dataclass(frozen=True)
class TeacherOptions:
    """What is learnt of a teacher; the equations are those of `model.distillation`."""

    temperature: float = field(
        "numbers", 1.0, doc="T, that softens both distributions."
    )
    weight: float = field(
        "numbers", 1.0, doc="Of the divergence; the text's nats weigh 1 - weight."
    )
    hidden: float = field(
        "numbers", 0.0, doc="Of the distance of what the head reads; 0: not looked at."
    )

    def __post_init__(self):
        name = "train.teacher_options"
        if self.temperature <= 0:
            raise ConfigError(f"{name}.temperature={self.temperature}: must be > 0.")
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"{name}.weight={self.weight}: must be in [0, 1].")
        config_lib.at_least(self, name, 0, "hidden")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and what to do about numbers that are not finite."""

    num_steps: int = field("numbers", doc="Optimizer steps of the whole run.")
    batch_size: int = field(
        "numbers", doc="Sequences of one optimizer step, over all devices."
    )
    num_microbatches: int = field(
        "rounding",
        1,
        doc="Parts of a batch worked on in turn; must divide each device's share.",
    )
    seed: int = field(
        "numbers", 0, doc="Of the parameters and of the order of the data."
    )
    log_every: int = field("nothing", 10, doc="Steps between two rows of metrics.")
    # The state never takes an update that is not finite: this says when to give up.
    max_skipped: int = field(
        "nothing",
        0,
        doc="Updates in a row that may be left out as not finite; one more halts the run.",
    )
    spikes: str = field(
        "numbers",
        "keep",
        doc="keep | skip: updates whose loss or norm leaps out of the recent ones.",
    )
    spikes_options: Any = field(
        "numbers", None, doc="What leaps out.", options=spikes_lib.KINDS
    )
    # Which teacher it is, its fingerprint says (`training.teacher`).
    teacher: str = field(
        "nothing",
        "",
        doc="Folder of a run whose outputs are learnt; '': the text alone.",
    )
    teacher_options: Any = field(
        "numbers",
        None,
        doc="What is learnt of it.",
        options={config_lib.ANY: TeacherOptions},
    )
    trainable: str = field(
        "numbers",
        "all",
        doc="all | converted (memory layers) | paths such as 'blocks.*.ffn.*,head.*'.",
    )
    compilation_cache: str = field(
        "nothing",
        compilation_cache_lib.DEFAULT,
        doc="Folder of compiled programs for the next start; 'off': none.",
    )
    timeout_scale: float = field(
        "nothing",
        1.0,
        doc="Times `watchdog.TIMEOUTS`, seconds before a phase counts as hanging; 0: never.",
    )

    def __post_init__(self):
        positive = ("num_steps", "batch_size", "num_microbatches", "log_every")
        config_lib.at_least(self, "train", 1, *positive)
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"train.seed={self.seed}: must be in [0, 2^31).")
        if not self.compilation_cache:
            raise ConfigError(
                "train.compilation_cache='': name a directory, or 'off' for none."
            )
        if self.compilation_cache != compilation_cache_lib.DEFAULT:
            paths.local(self.compilation_cache, "train.compilation_cache")
        config_lib.at_least(self, "train", 0, "max_skipped", "timeout_scale")
        config_lib.freeze(self, "train")

    @property
    def timeouts(self) -> dict[str, float]:
        """Seconds that each phase of the loop may take; 0: no limit."""
        return {
            name: self.timeout_scale * size for name, size in watchdog.TIMEOUTS.items()
        }


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When to evaluate during training, and on how much; eval.py reads all the text."""

    every_steps: int = field(
        "nothing", 0, doc="Steps between two evaluations; 0: only at the end."
    )
    batch_size: int = field("nothing", 16, doc="Sequences of one evaluation batch.")
    num_batches: int = field(
        "nothing", 0, doc="Batches, spread over the validation split; 0: all of it."
    )

    def __post_init__(self):
        config_lib.at_least(self, "eval", 1, "batch_size")
        config_lib.at_least(self, "eval", 0, "every_steps", "num_batches")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One config, frozen; each field is a section."""

    model: ModelConfig
    data: data.DataConfig
    train: TrainConfig
    optimizer: optimizer_lib.OptimizerConfig
    eval: EvalConfig = field("nothing")  # what is measured
    checkpoint: CheckpointConfig = field("nothing")  # when to save
    metrics: MetricsConfig = field("nothing", local=True)  # where values go
    mesh: str = field(
        "rounding", "data", doc="How devices share the work: a preset[:AXIS=SIZE,..]."
    )


_SECTIONS: dict[str, Any] = {
    f.name: f.type for f in dataclasses.fields(Experiment) if f.name != "mesh"
}


def may_change() -> frozenset[str]:
    """Return the fields, 'section.name', that may change while a run goes on (`config.field`)."""
    described = config_lib.described(Experiment)
    return frozenset(
        name for name, (changes, _) in described.items() if changes != "numbers"
    )


def may_differ() -> frozenset[str]:
    """Return the fields in which the processes of one run may differ."""
    described = config_lib.described(Experiment)
    return frozenset(name for name, (_, local) in described.items() if local)


def default_config() -> ml_collections.ConfigDict:
    """Return a config with every field of every section: what config files start from."""
    config = ml_collections.ConfigDict()
    for name, cls in _SECTIONS.items():
        config[name] = config_lib.defaults(cls)
    config.mesh = "data"
    return config


def resolve(config: Mapping[str, Any]) -> Experiment:
    """Check a whole config and freeze it; raises `ConfigError` at the first mistake."""
    given = dict(config)
    mesh = given.pop("mesh", "data")
    if not isinstance(mesh, str):
        raise ConfigError(f"mesh={mesh!r}: expected a preset's name, such as 'data'.")
    for name in given:
        if name not in _SECTIONS:
            near = config_lib.suggest(name, [*_SECTIONS, "mesh"])
            raise ConfigError(f"{name}: unknown section{near}.")
    for name in _SECTIONS:
        old_configs.refuse(given.get(name), name)
    sections = {
        name: config_lib.build(cls, given.get(name, {}), name)
        for name, cls in _SECTIONS.items()
    }
    run = Experiment(mesh=mesh, **sections)
    if not run.model.causal:
        raise ConfigError(
            "model.causal=False: a language model would see its targets; leave it True "
            "(two-sided models train in memoryformer.tasks)."
        )
    _check_documents(run)
    return run


def _check_documents(run: Experiment) -> None:
    """A document may not begin inside a chunk that shares one memory."""
    align, model = run.data.align_documents, run.model
    if align and model.seq_len % align:
        raise ConfigError(
            f"data.align_documents={align} does not divide model.seq_len="
            f"{model.seq_len}: choose a divisor."
        )
    if model.recurrence == "none":
        return
    chunk = recurrence.chunk_size(model)
    if not align or align % chunk:
        raise ConfigError(
            f"data.align_documents={align}: packed documents would begin inside a chunk "
            f"of model.recurrence={model.recurrence!r} and share its memory; set "
            f"--config.data.align_documents={chunk}."
        )


def load(
    workdir: str | os.PathLike, step: int | None = None
) -> tuple[Experiment, Params, dict[str, Any]]:
    """Load a run, the parameters and the manifest of a step (None: the newest).

    Raises as `runs.steps.load`.
    """
    config, params = run_steps.load(workdir, step)
    facts = run_steps.facts(workdir, step)
    run = resolve(config)
    return run, joined(params, absent_params(facts)), facts


def absent_params(facts: Mapping[str, Any]) -> Params:
    """Return the parameters that a step lacks because an older version wrote it.

    facts: what the step's manifest says.
    """
    run = resolve(complete(facts["config"]))
    drawn = older.random_features(
        run.model, facts.get("retired", {}), run.train.seed, facts["step"]
    )
    return jax.tree.map(np.asarray, drawn)


def params_to_go_on_with(facts: Mapping[str, Any]) -> Params:
    """`absent_params` of a step to train on from; raises `ConfigError` for what cannot."""
    if stored := facts.get("retired"):
        older.check_redraws(resolve(complete(facts["config"])).model, stored)
    return absent_params(facts)


def as_dict(experiment: Experiment) -> dict[str, Any]:
    """Return the resolved config, every default filled in, as plain values."""
    return dataclasses.asdict(experiment)


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the fields that a config stored by an older version lacks."""
    return as_dict(resolve(old_configs.upgraded(config)))
