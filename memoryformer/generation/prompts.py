"""Prompts: read from a file, and checked before a model is loaded. Start at `read`."""

import pathlib
from collections.abc import Sequence
from typing import cast

from memoryformer.data import blocks, jsonlines, names
from memoryformer.errors import ConfigError, DataError
from memoryformer.generation import sampler


def read(path: str) -> list[str]:
    """The prompts of a file; a line of plain text that is empty is an empty prompt."""
    file, shown = pathlib.Path(path), names.shown(path)
    try:
        if blocks.is_json_lines(file):
            fix = 'write every line as {"prompt": "text"}'
            prompts = [
                cast(str, jsonlines.text(value, "prompt", f"{shown}:{number}", fix))
                for number, value in jsonlines.values(file)  # none a `LongText`
            ]
        else:
            prompts = list(blocks.text_lines(file))
    except DataError as error:
        raise ConfigError(f"--prompts: {error}") from error
    if not prompts:
        raise ConfigError(f"--prompts: {shown}: holds no prompts.")
    return prompts


def check_seeds(sampling: sampler.SamplingConfig, prompts: Sequence[str]) -> None:
    """Raise `ConfigError` if the last prompt's seed would be no seed."""
    if sampling.seed + len(prompts) > 2**31:
        raise ConfigError(
            f"--seed={sampling.seed}: prompt i of {len(prompts)} has seed + i, which must "
            f"stay below 2^31; use at most {2**31 - len(prompts)}."
        )


def check_text(prompts: Sequence[str]) -> None:
    """Raise `ConfigError` for what UTF-8 cannot write."""
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"prompt {prompt!r}: is not UTF-8 text (character {error.start})."
            ) from error
