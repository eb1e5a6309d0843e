"""Configs that runs and exports stored under other names of their fields.

`upgraded` reads them; `refuse` names the new field to whoever still writes an old one in a config
file. Fields that only moved are in `MOVED`; those that became one another are in `upgraded`.
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
RETIRED = ("performer_seed", "performer_draw")  # see `model.older`
_TIMEOUTS = {f"{phase}_timeout": size for phase, size in watchdog.TIMEOUTS.items()}
MOVED = {
    **{
        f"model.{old}": f"model.{chooser}_options.{new}, of {', '.join(owners)}"
        for chooser, moved in (
            ("mixer", MIXER_OPTIONS),
            ("recurrence", RECURRENCE_OPTIONS),
        )
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
}


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored config with the fields of today; one of today stays as it is.

    What the chosen mixer never read is left out.
    """
    config = dict(config)
    if isinstance(config.get("model"), Mapping):
        config["model"] = upgraded_model(config["model"])
    if isinstance(config.get("train"), Mapping):
        config["train"] = _upgraded_train(config["train"])
    return config


def upgraded_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `model` section of a stored config with the fields of today."""
    model = {key: value for key, value in model.items() if key not in RETIRED}
    for chooser, moved, default in (
        ("mixer", MIXER_OPTIONS, "softmax"),
        ("recurrence", RECURRENCE_OPTIONS, "none"),
    ):
        choice = model.get(chooser, default)
        stale = {old: model.pop(old) for old in moved if old in model}
        options = {
            new: stale[old]
            for old, (owners, new) in moved.items()
            if old in stale and choice in owners
        }
        name = f"{chooser}_options"
        nested = {} if model.get(name) is None else model[name]
        if stale and isinstance(nested, Mapping):  # anything else is refused as it is
            model[name] = options | dict(nested)
    return model


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
