"""Files from the Hugging Face hub, from its cache where they are there. Start at `fetch`."""

import pathlib
from collections.abc import Sequence

from memoryformer.errors import ConfigError, DataError


def fetch(
    what: str,
    repository: str,
    files: str | Sequence[str],
    *,
    revision: str = "",
    instead: str,
) -> pathlib.Path:
    """Return the local path of one file of a repository, or the folder of several.

    what: begins each message, such as the flag and its value.  files: one name, or patterns.
    instead: what the user can do without the hub. Raises `ConfigError` without the package
    huggingface_hub, `DataError` if the files cannot be had.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ConfigError(
            f"{what}: needs the package huggingface_hub; `pip install huggingface_hub`, "
            f"or {instead}."
        ) from None
    try:
        if isinstance(files, str):
            path = huggingface_hub.hf_hub_download(
                repository, files, revision=revision or None
            )
        else:
            path = huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=list(files)
            )
    except Exception as error:  # network, authorisation, no such repository or file
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{what}: could not be fetched ({type(error).__name__}: {reason}); {instead}."
        ) from error
    return pathlib.Path(path)
