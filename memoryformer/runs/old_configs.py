"""Configs that runs and exports stored under other names of their fields.

`upgraded` reads them; `refuse` names the new field to whoever still writes an old one in a config
file. What became an option of a choice is in `CHOOSERS`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from memoryformer import config as config_lib
from memoryformer.cluster import watchdog
from memoryformer.errors import ConfigError

# Old field: (whose options it is one of now, its name there).
_KERNELS = ("linear", "cosformer", "trained_kernel", "performer")
_ALL_SUMS = (*_KERNELS, "linformer", "luna", "conv_luna")
_MEMORIES = ("rmt", "memformer")
MIXER_OPTIONS = {
    "attention": (("softmax",), "attention"),
    "logit_transform": (("softmax",), "logit_transform"),
    "dape_width": (("softmax",), "dape_width"),
    "prefix_chunk": (_ALL_SUMS, "prefix_chunk"),
    "cosformer_max_len": (("cosformer",), "max_len"),
    "trained_kernel_layers": (("trained_kernel",), "depth"),
    "performer_features": (("performer",), "num_features"),
    "performer_redraw_every": (("performer",), "redraw_every"),
    "linformer_slots": (("linformer",), "num_slots"),
    "linformer_max_len": (("linformer",), "max_len"),
    "luna_slots": (("luna", "conv_luna"), "num_slots"),
    "conv_luna_filter": (("conv_luna",), "filter"),
    "conv_luna_width": (("conv_luna",), "width"),
}
RECURRENCE_OPTIONS = {
    "recurrence_chunk": (_MEMORIES, "chunk_size"),
    "recurrence_slots": (_MEMORIES, "num_slots"),
    "recurrence_bptt": (_MEMORIES, "bptt_chunks"),
    "memformer_temperature": (("memformer",), "temperature"),
}
_Moved = dict[str, tuple[tuple[str, ...], str]]
_DOCUMENTS = ("stdlib", "text", "c4", "tfds")


def _moved(**owners: tuple[str, ...]) -> _Moved:
    """Fields that kept their names."""
    return {name: (choices, name) for name, choices in owners.items()}


PROJECTION_OPTIONS = _moved(
    extra_bits=("memory",),
    temperature=("memory",),
    memory_bias=("memory",),
    bias_std=("memory",),
    ffn_multiple=("dense",),
    output_std=("dense", "mixed"),
)
SOURCE_OPTIONS = _moved(
    name=("tfds",),
    text_field=("text", "c4", "tfds"),
    separator=("text",),
    validation_path=("text", "c4"),
    validation_every=_DOCUMENTS,
    max_documents=_DOCUMENTS,
)
SCHEDULE_OPTIONS = _moved(
    end_fraction=("cosine", "wsd"),
    decay_steps=("cosine", "wsd"),
    cooldown_fraction=("wsd",),
)
TABLE_OPTIONS: _Moved = {
    "table_second_moment": (("lean",), "second_moment"),
    "table_moment_dtype": (("lean",), "moment_dtype"),
    "table_dtype": (("lean",), "dtype"),
    "table_rounding": (("lean",), "rounding"),
}
SPIKE_OPTIONS: _Moved = {
    "spike_sigmas": (("skip",), "sigmas"),
    "spike_window": (("skip",), "window"),
}
# 'section.X' -> (its default, old fields of the section that are in X_options now).
CHOOSERS: dict[str, tuple[str, _Moved]] = {
    "model.mixer": ("softmax", MIXER_OPTIONS),
    "model.recurrence": ("none", RECURRENCE_OPTIONS),
    "model.projection": ("memory", PROJECTION_OPTIONS),
    "data.source": ("stdlib", SOURCE_OPTIONS),
    "optimizer.schedule": ("cosine", SCHEDULE_OPTIONS),
    "optimizer.table_state": ("full", TABLE_OPTIONS),
    "train.spikes": ("keep", SPIKE_OPTIONS),
}
# What left the default of a chooser that there was not; other values were its other choice.
PLAIN = {
    "table_second_moment": "full",
    "table_moment_dtype": "float32",
    "table_dtype": "float32",
    "table_rounding": "nearest",
    "spike_sigmas": 0.0,
    "spike_window": 128,
}
NEW_CHOOSERS = {"optimizer.table_state": "lean", "train.spikes": "skip"}
RETIRED = ("performer_seed", "performer_draw")  # see `model.older`
_TIMEOUTS = {f"{phase}_timeout": size for phase, size in watchdog.TIMEOUTS.items()}
MOVED = {
    **{
        f"{key.partition('.')[0]}.{old}": f"{key}_options.{new}, of {', '.join(owners)}"
        + (f" ({key}={owners[0]})" if key in NEW_CHOOSERS else "")
        for key, (_, moved) in CHOOSERS.items()
        for old, (owners, new) in moved.items()
    },
    **{
        f"train.{name}": f"train.timeout_scale, times {seconds:g} seconds"
        for name, seconds in _TIMEOUTS.items()
    },
    **{
        f"model.{name}": "train.seed, of which random features are drawn"
        for name in RETIRED
    },
    "train.nonfinite": "train.max_skipped, where 0 is to halt at the first",
    "metrics.tensorboard": "metrics.trackers, to tensorboard or to nothing",
    "metrics.wandb": "metrics.trackers, to wandb:PROJECT",
}


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored config with the fields of today; one of today stays as it is.

    What no choice ever read is left out.
    """
    config = dict(config)
    for name, section in config.items():
        if isinstance(section, Mapping):
            config[name] = _upgraded(name, section)
    return config


def upgraded_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `model` section of a stored config with the fields of today."""
    return _upgraded("model", model)


def _upgraded(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    section = dict(section)
    if name == "model":
        section = {key: v for key, v in section.items() if key not in RETIRED}
    elif name == "train":
        section = _upgraded_train(section)
    elif name == "metrics" and {"tensorboard", "wandb"} & section.keys():
        board, project = section.pop("tensorboard", True), section.pop("wandb", "")
        words = ["tensorboard"] * bool(board) + [f"wandb:{project}"] * bool(project)
        section["trackers"] = ",".join(words)
    for key, (default, moved) in CHOOSERS.items():
        parent, _, chooser = key.partition(".")
        if parent != name or not moved.keys() & section.keys():
            continue
        stale = {old: section.pop(old) for old in moved if old in section}
        if key in NEW_CHOOSERS:
            plain = {old: PLAIN[old] for old in moved}
            stale = plain | stale
            other = default if stale == plain else NEW_CHOOSERS[key]
            section.setdefault(chooser, other)
        choice = section.get(chooser, default)
        options = {
            new: stale[old]
            for old, (owners, new) in moved.items()
            if old in stale and choice in owners
        }
        nested = section.get(f"{chooser}_options")
        nested = {} if nested is None else nested
        if isinstance(nested, Mapping):  # anything else is refused as it is
            section[f"{chooser}_options"] = options | dict(nested)
    return section


def retired(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `upgraded` drops of a stored config and `model.older` goes by."""
    model = config.get("model")
    if not isinstance(model, Mapping) or not any(key in model for key in RETIRED):
        return {}
    fields = {key: model.get(key, 0) for key in RETIRED}
    for key, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"model.{key}={value!r}: expected an integer.")
    return fields


def _upgraded_train(train: Mapping[str, Any]) -> dict[str, Any]:
    train = dict(train)
    stale = {name: train.pop(name) for name in _TIMEOUTS if name in train}
    stale = {name: seconds for name, seconds in stale.items() if seconds is not None}
    for name, seconds in stale.items():
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise ConfigError(f"train.{name}={seconds!r}: expected seconds, a number.")
    if stale:  # the most patient of them, unless one had no limit
        scales = [seconds / _TIMEOUTS[name] for name, seconds in stale.items()]
        train["timeout_scale"] = max(scales) if all(scales) else 0.0
    if train.pop("nonfinite", "skip") == "halt":
        train["max_skipped"] = 0
    return train


def why_unknown(key: str, known: Iterable[str]) -> str:
    """Say, of a field 'section.key' that no config has, what to set instead."""
    if new := MOVED.get(key):
        return f"is no longer a field; set {new}."
    return f"the config has no such field{config_lib.suggest(key, known)}."


def refuse(section: Any, name: str) -> None:
    """Raise `ConfigError` for an old field of the section called `name`, saying the new one."""
    keys = section if isinstance(section, Mapping) or hasattr(section, "keys") else ()
    for key in (f"{name}.{key}" for key in keys):
        if key in MOVED:
            raise ConfigError(f"{key}: {why_unknown(key, ())}")
