"""Mixers with a largest number of positions. Start at `LimitedPositions`."""

from typing import TYPE_CHECKING

from memoryformer.errors import ConfigError
from memoryformer.model.mixers import base

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig


class LimitedPositions:
    """A mixer with the option `max_len`: so many positions, 0 being `model.seq_len`."""

    @classmethod
    def max_length(cls, config: "ModelConfig") -> int:
        """Return the positions that there are."""
        return config.mixer_options.max_len or config.seq_len

    @classmethod
    def check(cls, config: "ModelConfig") -> None:
        """Refuse rows longer than that."""
        check_length(cls.max_length(config), config.seq_len)


def check_length(max_len: int, length: int) -> None:
    """Raise `ConfigError` if `length` tokens are more than a mixer was made for."""
    if length > max_len:
        raise ConfigError(
            f"{base.OPTIONS}.max_len={max_len}: the mixer has no position beyond it, but {length} tokens "
            "are asked for; raise it (before training) or use fewer tokens."
        )
