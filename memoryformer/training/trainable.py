"""Which parameters a run trains: `train.trainable`.

    all          every one, but what a module declares fixed
    converted    those of memory layers, and the norm between the two of a feed-forward layer
    PATTERNS     paths, `*` for any text: 'blocks.*.ffn.*,head.*'

The others stay bit for bit: they have no gradient, no decay and no state of the optimizer.
Start at `groups`.
"""

import fnmatch
from typing import Any

from flax import traverse_util

from memoryformer import model as model_lib
from memoryformer.errors import ConfigError
from memoryformer.model import parts
from memoryformer.training import experiment


def groups(run: experiment.Experiment) -> dict[str, Any]:
    """`model.param_groups`, with 'fixed' for what the run does not train.

    Raises `ConfigError` where nothing is left to train, or a pattern names nothing.
    """
    every = model_lib.param_groups(run.model)
    choice = run.train.trainable
    if choice == "all":
        return every
    flat = traverse_util.flatten_dict(every)
    paths = {".".join(path): path for path in flat}
    chosen: set[str] = set()
    for pattern in _patterns(run):
        matched = {
            p for p in fnmatch.filter(paths, pattern) if flat[paths[p]] != "fixed"
        }
        if not matched:
            raise ConfigError(
                f"train.trainable={choice!r}: {pattern!r} names no parameter that can be "
                f"trained; a path is like {_example(flat)}."
            )
        chosen |= matched
    kept = {path: flat[path] if p in chosen else "fixed" for p, path in paths.items()}
    return traverse_util.unflatten_dict(kept)


def split(run: experiment.Experiment, tree: Any) -> tuple[Any, Any]:
    """Part a tree like the parameters into what the run trains and what it does not."""
    return model_lib.split_groups(groups(run), tree)


def _patterns(run):
    choice = run.train.trainable
    if choice != "converted":
        return [word.strip() for word in choice.split(",")]
    specs = traverse_util.flatten_dict(model_lib.param_specs(run.model))
    layers = [path[:-1] for path, spec in specs.items() if spec == "tables"]
    for i in range(run.model.num_layers):
        if parts.of_layer(run.model, i).ffn.kind == "memory":
            layers.append(("blocks", str(i), "ffn"))
    if not layers:
        raise ConfigError(
            "train.trainable='converted': the model has no memory layers; use 'all'."
        )
    return [".".join((*layer, "*")) for layer in layers]


def _example(flat):
    return repr(".".join(next(path for path, g in flat.items() if g != "fixed")))
