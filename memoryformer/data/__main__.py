"""Look at data from a shell.

    python -m memoryformer.data prepare    --config=configs/quickstart.py
    python -m memoryformer.data inspect    --config=configs/quickstart.py [--verify] [--json]
    python -m memoryformer.data yardsticks --config=configs/quickstart.py [--json]

`inspect` prints the manifest, counts, the most frequent tokens and the first training
batch decoded segment by segment: what the model will really see. Without --config the
default corpus is meant. Where documents come from is --config.data.source:

    stdlib    the Python standard library's own sources
    text      text or JSON-lines files: --config.data.path=FILE, FOLDER or GLOB
    c4        downloaded C4/Pile-style shards (.jsonl.gz): the same
    tfds      a TFDS data set: --config.data.name=NAME
    prepared  what `prepare` made elsewhere: --config.data.path=FOLDER
"""

import json
from collections.abc import Sequence

import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from memoryformer import config as config_lib
from memoryformer import data, errors
from memoryformer.data import manifest as manifest_lib
from memoryformer.data import yardsticks

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment's config file."
)
_VERIFY = flags.DEFINE_bool("verify", False, "Hash the token files (reads them).")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead.")
_ROWS = flags.DEFINE_integer("rows", 2, "Rows of the first batch to decode.")

_COMMANDS = ("prepare", "inspect", "yardsticks")
_COUNTED = 50_000_000  # tokens behind the frequency list


def main(argv: Sequence[str]) -> None:
    """Run one command."""
    if len(argv) != 2:
        raise errors.ConfigError(
            f"python -m memoryformer.data: give one command of {', '.join(_COMMANDS)}."
        )
    command = config_lib.choose(argv[1], _COMMANDS, "command")
    config = _CONFIG.value
    if config is None:
        config = ml_collections.ConfigDict()
    elif not isinstance(config, ml_collections.ConfigDict):
        raise errors.ConfigError("--config: there is no such file.")
    data_config = config_lib.build(data.DataConfig, config.get("data", {}), "data")
    directory = data.prepare(data_config)
    if command == "prepare":
        print(directory)
        return
    dataset = data.open_directory(directory, verify=_VERIFY.value)
    if command == "inspect":
        inspect(dataset, config)
    else:
        result = yardsticks.measure(dataset)
        print(json.dumps(result) if _JSON.value else yardsticks.table(result))


def inspect(dataset: data.Dataset, config: ml_collections.ConfigDict) -> None:
    """Print what a data set holds and how its first batch looks."""
    if _JSON.value:
        print(json.dumps({"directory": str(dataset.directory), **dataset.manifest}))
        return
    manifest, tokenizer = dataset.manifest, dataset.tokenizer
    used = manifest["tokenizer"]
    print(f"directory    {dataset.directory}")
    print(f"fingerprint  {dataset.fingerprint}" + " (verified)" * _VERIFY.value)
    print(f"source       {' '.join(v for v in manifest['source'].values() if v)}")
    print(
        f"tokenizer    {used['name']}: {used['vocab_size']} tokens, end of document "
        f"{used['eot_id']}, sha256 {used['sha256'][:16]}"
    )
    for name, split in manifest["splits"].items():
        ratio = split["bytes"] / split["tokens"]
        print(
            f"{name:12s} {split['documents']:,} documents, {split['tokens']:,} tokens, "
            f"{split['ends_of_document']:,} ends of document, {split['bytes']:,} bytes "
            f"({ratio:.3f} bytes/token); dropped {split['empty_dropped']} empty, "
            f"{split['duplicates_of_validation_dropped']} also in validation"
        )
    if note := manifest_lib.byte_note(manifest):
        print(f"note         {note}")
    _print_frequencies(dataset)
    model, train = config.get("model", {}), config.get("train", {})
    seq_len, batch_size = model.get("seq_len", 256), train.get("batch_size", 4)
    seed = train.get("seed", 0)
    batches = dataset.train.batches(seq_len, batch_size, seed)
    print(
        f"\nfirst batch: {batch_size} x {seq_len}, seed {seed}, "
        f"{batches.windows_per_epoch:,} windows per epoch"
    )
    batch = batches.batch(0)
    for row in range(min(_ROWS.value, batch_size)):
        _print_row(batch, row, tokenizer)


def _print_frequencies(dataset: data.Dataset) -> None:
    tokens = dataset.train.tokens[:_COUNTED]
    counts = np.bincount(tokens, minlength=dataset.tokenizer.vocab_size)
    top = np.argsort(-counts, kind="stable")[:12]
    pieces = (
        f"{_show(dataset.tokenizer, i)} {counts[i] / len(tokens):.1%}" for i in top
    )
    print(f"most frequent {'  '.join(pieces)}")
    print(f"never seen   {int((counts == 0).sum())} of {len(counts)} tokens in train")


def _print_row(batch: data.Batch, row: int, tokenizer: data.Tokenizer) -> None:
    segment_ids = batch["segment_ids"][row]
    for segment in range(1, segment_ids.max() + 1):
        where = np.flatnonzero(segment_ids == segment)
        inputs = batch["inputs"][row, where]
        text = tokenizer.decode(inputs, start=False)
        first = "<eot> " if inputs[0] == tokenizer.eot_id else "... "
        last = _show(tokenizer, batch["targets"][row, where[-1]])
        shown = repr(text) if len(text) <= 160 else f"{text[:100]!r} .. {text[-50:]!r}"
        positions = batch["positions"][row, where]
        print(
            f"row {row} segment {segment}: columns {where[0]}..{where[-1]}, positions "
            f"{positions[0]}..{positions[-1]}, {first}{shown} -> {last}"
        )


def _show(tokenizer: data.Tokenizer, token: int) -> str:
    return (
        "<eot>"
        if token == tokenizer.eot_id
        else repr(tokenizer.decode([token], start=False))
    )


if __name__ == "__main__":
    errors.run_main(main)
