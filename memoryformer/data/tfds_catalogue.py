"""TFDS catalogue names without TensorFlow: `tfds.builder` and `as_data_source`.

What works: data sets already prepared as array_record in a TFDS data_dir, a directory
that holds one version of a prepared data set, and builders whose own code needs neither
TensorFlow nor Beam. Many stock text builders do need them, and say so in one line.
"""

import contextlib
import importlib
import io
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

# TFDS 4.9.10 imports importlib_resources without declaring it: see requirements.txt.
import tensorflow_datasets as tfds

from memoryformer import errors
from memoryformer.data import options
from memoryformer.files import paths

_WAYS_OUT = (
    "prepare it where TensorFlow is installed with file_format='array_record' and point "
    "data.path at that TFDS data_dir, or use data.source='c4' on downloaded JSON lines"
)
_HELD_OUT = ("validation", "valid", "val", "dev")


def builder(data_config: options.DataConfig) -> tfds.core.DatasetBuilder:
    """The builder of `data_config.name`; from `path` if that is a prepared data set."""
    name, path = data_config.name, data_config.path
    path = str(paths.local(path, "data.path")) if path else ""
    with _explained(name):
        if path and (pathlib.Path(path) / "dataset_info.json").is_file():
            return tfds.builder_from_directory(path)
        arguments = {"data_dir": path} if path else {}
        _register(name.split("/")[0].split(":")[0])
        # Prepared data keeps its own format; only new data needs one chosen.
        prepared = tfds.builder(name, **arguments)
        if prepared.is_prepared():
            return prepared
        return tfds.builder(name, file_format="array_record", **arguments)


class Source(Protocol):
    """Records by their places, several at once, as TFDS's data sources have them."""

    def __len__(self) -> int: ...

    def __getitems__(self, record_keys: Sequence[int], /) -> Sequence[Any]: ...


def sources(
    dataset: tfds.core.DatasetBuilder, data_config: options.DataConfig
) -> dict[str, Source]:
    """Random-access examples by split: 'train', and 'validation' if there is one."""
    with _explained(data_config.name):
        if not dataset.is_prepared():
            dataset.download_and_prepare()
        splits = {"train": dataset.as_data_source(split="train")}
        held_out = next((name for name in _HELD_OUT if name in dataset.info.splits), "")
        if held_out:
            splits["validation"] = dataset.as_data_source(split=held_out)
    field = data_config.source_options.text_field
    if field not in dataset.info.features:
        raise errors.DataError(
            f"data.source_options.name={data_config.name!r}: has no feature {field!r} (found: "
            f"{', '.join(sorted(dataset.info.features))}); set "
            "data.source_options.text_field."
        )
    return splits


def _register(name: str) -> None:
    # c4, wikipedia and a few more are found only once their module is imported.
    if name not in tfds.list_builders(with_community_datasets=False):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"tensorflow_datasets.text.{name}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep TFDS's notices off stdout, which is for results, and its warnings away."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """TFDS's many-line failures as one line that says what to do."""
    try:
        with quiet():
            yield
    except errors.MemoryFormerError:
        raise
    except tfds.core.DatasetNotFoundError as error:
        raise errors.ConfigError(
            f"data.source_options.name={name!r}: TFDS knows no such data set; see "
            "tfds.list_builders(), or use data.source='text' for local files."
        ) from error
    except (ImportError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise errors.ConfigError(
            f"data.source_options.name={name!r}: its TFDS builder cannot run without TensorFlow or "
            f"Beam here ({type(error).__name__}: {reason}); {_WAYS_OUT}."
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise errors.DataError(
            f"data.source_options.name={name!r}: TFDS could not prepare it "
            f"({type(error).__name__}: {reason}); {_WAYS_OUT}."
        ) from error
