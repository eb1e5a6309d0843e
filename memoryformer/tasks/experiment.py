"""A task's config, checked and frozen, as `training.experiment` is for language models.

    config.task        which task (`name`), its options and the trainer's
    config.model       its model
    config.checkpoint, config.metrics        as for language models

Start at `resolve`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.runs import old_configs
from memoryformer.runs.metrics import MetricsConfig
from memoryformer.runs.retention import CheckpointConfig
from memoryformer.tasks import base, registry

SECTIONS = ("task", "model", "checkpoint", "metrics")


@dataclasses.dataclass(frozen=True)
class Run:
    """One config, frozen."""

    name: str  # of the task
    task: base.Task
    checkpoint: CheckpointConfig
    metrics: MetricsConfig

    @property
    def model(self) -> Any:
        """The task's model."""
        return self.task.model

    @property
    def train(self) -> base.TrainerConfig:
        """Steps, batch size and seed, by the names that other runs have."""
        return self.task.options


def default_config(name: str) -> ml_collections.ConfigDict:
    """Return a config with every field of a task: what config files start from."""
    cls = registry.TASKS[config_lib.choose(name, registry.TASKS, "task.name")]
    config = ml_collections.ConfigDict()
    config.task = config_lib.defaults(cls.Options)
    config.task.name = name
    config.model = config_lib.defaults(cls.Model, hidden=True)
    config.checkpoint = config_lib.defaults(CheckpointConfig)
    config.metrics = config_lib.defaults(MetricsConfig)
    return config


def resolve(config: Mapping[str, Any]) -> Run:
    """Check a whole config and freeze it; raises `ConfigError` at the first mistake."""
    for section in config:
        if section not in SECTIONS:
            near = config_lib.suggest(section, SECTIONS)
            raise ConfigError(f"{section}: unknown section of a task's config{near}.")
    options = dict(config.get("task", {}))
    name = (
        options.pop("name", None) or "listops"
    )  # configs from before there were others
    cls = registry.TASKS[config_lib.choose(name, registry.TASKS, "task.name")]
    section = config.get("model", {})
    old_configs.refuse(section, "model")
    return Run(
        name,
        cls(
            config_lib.build(cls.Model, section, "model"),
            config_lib.build(cls.Options, options, "task"),
        ),
        config_lib.build(CheckpointConfig, config.get("checkpoint", {}), "checkpoint"),
        config_lib.build(MetricsConfig, config.get("metrics", {}), "metrics"),
    )


def as_dict(run: Run) -> dict[str, Any]:
    """Return the resolved config, every default filled in, as plain values."""
    return {
        "task": {"name": run.name} | dataclasses.asdict(run.task.options),
        "model": dataclasses.asdict(run.task.model),
        "checkpoint": dataclasses.asdict(run.checkpoint),
        "metrics": dataclasses.asdict(run.metrics),
    }


def may_change(run: Run) -> frozenset[str]:
    """Return the fields, 'section.name', that may change while a run goes on."""
    sections = {"task": run.task.options, "model": run.task.model}
    sections |= {"checkpoint": run.checkpoint, "metrics": run.metrics}
    return frozenset(
        f"{section}.{name}"
        for section, value in sections.items()
        for name, (changes, _) in config_lib.described(type(value)).items()
        if changes != "numbers"
    )
