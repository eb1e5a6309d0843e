"""What older checkpoints and exports lack.

Random features were not stored: they followed from two fields of a model's config, the seed and
the step of the run. Now they are parameters, and are drawn once for what was written before.
"""

from collections.abc import Mapping
from typing import Any

from memoryformer.errors import ConfigError
from memoryformer.model.config import ModelConfig
from memoryformer.model.mixers import kernel
from memoryformer.notation import Params


def random_features(
    model_config: ModelConfig, stored: Mapping[str, Any], seed: int = 0, step: int = 0
) -> Params:
    """Draw the parameters that a model had in use after `step` steps of a run with `seed`.

    `stored` has the two fields, if it was written with them (`old_configs.retired`). {} for
    what lacks none.
    """
    if model_config.mixer != "performer" or not stored:
        return {}
    number, every = stored["performer_draw"], model_config.mixer_options.redraw_every
    if every:
        number += max(step - 1, 0) // every
    seed = (stored["performer_seed"] + seed) & 0x7FFFFFFF
    return kernel.random_rows(model_config, seed, number)


def check_redraws(model_config: ModelConfig, stored: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a run whose redraws followed from a seed or a draw of its own.

    Redraws follow from train.seed and the step alone: it would go on as another run.
    """
    if model_config.mixer != "performer" or not model_config.mixer_options.redraw_every:
        return
    for name, value in stored.items():
        if value:
            raise ConfigError(
                f"model.{name}={value}: an older version trained this run, and no later one "
                "can redraw its random features; evaluate or export it, or train it anew."
            )
