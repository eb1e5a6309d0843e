"""The tokenizer of a run lies in its folder, and whatever reads the run uses that one.

    workdir/tokenizer.json                 written once, when training starts
    workdir/checkpoints/<step>/MANIFEST    its sha256 and end token, with every step

Runs of before there was such a file: the data of the recorded fingerprint has it.
Start at `load` (to read a run) and `keep` (to train).
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from memoryformer import data
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.errors import ConfigError, DataError, MemoryFormerError
from memoryformer.files import paths

FILE = "tokenizer.json"


def identity(tokenizer: data.Tokenizer) -> dict[str, str]:
    """What a checkpoint's manifest says of its tokenizer: {'sha256', 'end_token'}."""
    return {"sha256": tokenizer.fingerprint, "end_token": tokenizer.end_token}


def load(
    workdir: str | os.PathLike,
    data_config: data.DataConfig,
    facts: Mapping[str, Any],
    vocab_size: int,
) -> data.Tokenizer:
    """The tokenizer that a checkpoint was trained with; `facts` are of its manifest.

    Needs no corpus where the folder holds it. Raises `DataError` if it is there no longer,
    or is another one, `ConfigError` if it has more tokens than `vocab_size`.
    """
    path = pathlib.Path(workdir) / FILE
    recorded = facts.get("tokenizer")
    if recorded is None:  # written before runs kept theirs
        return dataset(workdir, data_config, facts, vocab_size).tokenizer
    if not path.is_file():
        try:
            return dataset(workdir, data_config, facts, vocab_size).tokenizer
        except MemoryFormerError as error:
            raise DataError(f"{path}: is missing; put it back ({error})") from error
    tokenizer = tokenizer_lib.load_recorded(
        path, recorded["sha256"], recorded["end_token"], "this run"
    )
    data.check_vocab_size(tokenizer.vocab_size, vocab_size, str(path))
    return tokenizer


def keep(workdir: str | os.PathLike, tokenizer: data.Tokenizer, *, begun: bool) -> None:
    """Write the run's tokenizer.json unless it is there; see `check`."""
    path = pathlib.Path(workdir) / FILE
    if _fingerprint(path, tokenizer.end_token) == tokenizer.fingerprint:
        return
    check(workdir, tokenizer, begun=begun)
    tokenizer.save(path)


def check(
    workdir: str | os.PathLike, tokenizer: data.Tokenizer, *, begun: bool
) -> None:
    """Raise `ConfigError` if another tokenizer.json lies in the run's folder.

    Unless it is that of a start which was given up: a config.json beside it, and no
    checkpoint yet (not `begun`).
    """
    path = pathlib.Path(workdir) / FILE
    if not path.exists() or (not begun and (path.parent / "config.json").exists()):
        return
    if _fingerprint(path, tokenizer.end_token) != tokenizer.fingerprint:
        raise ConfigError(
            f"{path}: is not the tokenizer of this run; move it away, or name another "
            "--workdir."
        )


def located(
    data_config: data.DataConfig, workdir: str | os.PathLike
) -> data.DataConfig:
    """`data_config`, with the run's own tokenizer.json for one that has been moved away."""
    kept, spec = pathlib.Path(workdir) / FILE, data_config.tokenizer
    local = tokenizer_lib.is_file(spec) and not spec.startswith("hub:")
    if not local or not kept.is_file() or _is_there(spec):
        return data_config
    return dataclasses.replace(data_config, tokenizer=str(kept))


def dataset(
    workdir: str | os.PathLike,
    data_config: data.DataConfig,
    facts: Mapping[str, Any],
    vocab_size: int = 0,
) -> data.Dataset:
    """The data that a checkpoint was trained on, wherever its tokenizer lies by now."""
    there = located(data_config, workdir)
    return data.find(there, facts["data_fingerprint"], vocab_size)


def check_same_tokens(
    theirs: data.Tokenizer | None, ours: data.Tokenizer, directory: str | os.PathLike
) -> None:
    """Raise `ConfigError` if the tokens of a model are not those of the data.

    Published files of one tokenizer differ in what makes no difference here, so bytes and
    the end of a document are compared, not fingerprints.
    """
    if theirs is None:
        return
    pairs = enumerate(itertools.zip_longest(theirs.pieces, ours.pieces, fillvalue=b""))
    differs = next((i for i, (old, new) in pairs if old != new), -1)
    if differs >= 0 or theirs.eot_id != ours.eot_id:
        what = f"token {differs} is" if differs >= 0 else "the end of a document is"
        old, new = (
            repr(t.piece(differs)) if differs >= 0 else t.eot_id for t in (theirs, ours)
        )
        raise ConfigError(
            f"--config: data.tokenizer is not the tokenizer of {directory}: {what} {new}, "
            f"there {old}."
        )


def _is_there(spec: str) -> bool:
    try:
        return paths.local(spec, "data.tokenizer").exists()
    except (ConfigError, OSError):  # data preparation says what is wrong with it
        return False


def _fingerprint(path: pathlib.Path, end_token: str) -> str:
    """'' where there is no tokenizer with this end token."""
    try:
        return tokenizer_lib.load(str(path), end_token).fingerprint
    except MemoryFormerError:
        return ""
