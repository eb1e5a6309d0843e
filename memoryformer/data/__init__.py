"""Corpora, tokenizers and batches.

    directory = data.prepare(data_config)            # once; later calls find it
    dataset = data.load(data_config, expected_vocab_size=4096)
    batches = dataset.train.batches(seq_len=256, batch_size=4, seed=0)
    batch = batches.batch(step)                      # numpy, a pure function of step

Documents come from TFDS builders (`corpora`, `tfds_catalogue`), are tokenised once into flat
token files with a manifest (`preparation`, `token_files`, `manifest`), and are served as
windows through Grain (`batches`). TensorFlow is never imported. From a shell:

    python -m memoryformer.data inspect --config=configs/quickstart.py
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from memoryformer import errors
from memoryformer.data import manifest as manifest_lib
from memoryformer.data import megatron, streams
from memoryformer.data.batches import Batch, Batches, EvalBatches, Split
from memoryformer.data.identity import resolve_dir
from memoryformer.data.options import DataConfig, cache_root
from memoryformer.data.preparation import prepare
from memoryformer.data.tokenizer import TextStream, Tokenizer

__all__ = [
    "Batch",
    "Batches",
    "DataConfig",
    "Dataset",
    "EvalBatches",
    "Split",
    "TextStream",
    "Tokenizer",
    "cache_root",
    "check",
    "check_vocab_size",
    "find",
    "load",
    "load_directory",
    "prepare",
    "resolve_dir",
]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared corpus: `train` and `validation` streams and their tokenizer."""

    directory: pathlib.Path
    manifest: manifest_lib.Manifest = dataclasses.field(repr=False)
    tokenizer: Tokenizer
    train: Split
    validation: Split

    @property
    def fingerprint(self) -> str:
        """sha256 of contents and tokenizer; equal data has equal fingerprints."""
        return self.manifest.fingerprint

    @property
    def token_bytes(self) -> np.ndarray:
        """Bytes of the validation text that each token counts for: [V]."""
        validation = self.manifest.splits["validation"]
        return manifest_lib.text_bytes(validation, self.tokenizer.token_bytes)


def load(
    data_config: DataConfig,
    expected_vocab_size: int = 0,
    stop: Callable[[], bool] = lambda: False,
    verify: bool = False,
) -> Dataset:
    """Load what `prepare` made, preparing it first if need be.

    expected_vocab_size: the model's V; raises `ConfigError` if the tokenizer has more
    tokens (0: not checked). Raises `DataError` for a damaged directory, and `Preempted`
    when `stop` says so during a preparation.
    """
    if data_config.source == "megatron":
        manifest, tokenizer, splits = megatron.load(data_config, verify)
        check_vocab_size(tokenizer.vocab_size, expected_vocab_size, tokenizer.name)
        folder = splits["train"].path.parent
        return Dataset(folder, manifest, tokenizer, **splits)
    directory = prepare(data_config, stop=stop)
    return load_directory(
        directory, expected_vocab_size, verify, data_config.align_documents
    )


def find(
    data_config: DataConfig, fingerprint: str, expected_vocab_size: int = 0
) -> Dataset:
    """Load the data that a run was trained on, known by its fingerprint.

    Taken from the cache if it is there, whatever has become of the corpus and of
    data.tokenizer; else read anew. Raises `DataError` if that gives other data.
    """
    root = cache_root(data_config)
    directory = manifest_lib.directory_of(root, fingerprint)
    if directory is not None and data_config.source not in ("prepared", "megatron"):
        return load_directory(
            directory, expected_vocab_size, align=data_config.align_documents
        )
    dataset = load(data_config, expected_vocab_size)
    check(dataset, fingerprint)
    return dataset


def check(dataset: Dataset, fingerprint: str) -> None:
    """Raise `DataError` unless this is the data of a checkpoint's fingerprint."""
    if dataset.fingerprint != fingerprint:
        raise errors.DataError(
            f"the data in {dataset.directory} has fingerprint "
            f"{dataset.fingerprint[:12]}, the checkpoint was trained on "
            f"{fingerprint[:12]}: point data.path or data.data_dir at it."
        )


def load_directory(
    directory: pathlib.Path | str,
    expected_vocab_size: int = 0,
    verify: bool = False,
    align: int = 0,
) -> Dataset:
    """Load a prepared directory; with `verify`, hash its files first. For align see `Split`."""
    directory = pathlib.Path(directory)
    manifest = manifest_lib.read(directory, verify=verify)
    used = manifest.tokenizer
    check_vocab_size(used.vocab_size, expected_vocab_size, used.name)
    splits = {
        name: Split(
            name=name,
            path=directory / (facts.file or name),
            facts=facts,
            dtype=manifest.dtype,
            vocab_size=used.vocab_size,
            eot_id=used.eot_id,
            align=align,
            pieces=_pieces(directory, manifest, facts),
        )
        for name, facts in manifest.splits.items()
    }
    tokenizer = manifest_lib.load_tokenizer(directory, manifest)
    return Dataset(directory, manifest, tokenizer, **splits)


def _pieces(
    directory: pathlib.Path,
    manifest: manifest_lib.Manifest,
    facts: manifest_lib.SplitFacts,
) -> tuple[streams.Piece, ...]:
    """The files of a split in several, and the end behind the last."""
    if not isinstance(facts, manifest_lib.PartedFacts):
        return ()
    files = [
        streams.Piece(directory / part.file, manifest.dtype, part.tokens)
        for part in facts.parts
    ]
    return (*files, streams.end(manifest.tokenizer.eot_id))


def check_vocab_size(vocab_size: int, expected: int, name: str) -> None:
    """Raise `ConfigError` if a tokenizer has more tokens than a model (0: any)."""
    if expected and vocab_size > expected:
        raise errors.ConfigError(
            f"model.vocab_size={expected}: the tokenizer {name!r} has {vocab_size} "
            f"tokens; set --config.model.vocab_size={vocab_size} or more."
        )
