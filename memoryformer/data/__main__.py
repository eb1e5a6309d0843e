"""Look at data from a shell.

    python -m memoryformer.data prepare    --config=configs/quickstart.py [--parallel=N]
        [--part=i/n]
    python -m memoryformer.data inspect    --config=configs/quickstart.py [--verify] [--json]
    python -m memoryformer.data yardsticks --config=configs/quickstart.py [--json]
    python -m memoryformer.data export     --config=configs/quickstart.py --format=megatron \
        --output=FOLDER

`inspect` prints the manifest, counts, the most frequent tokens and the first training
batch decoded segment by segment: what the model will really see. Without --config the
default corpus is meant. Where documents come from is --config.data.source:

    stdlib    the Python standard library's own sources
    text      text or JSON-lines files: --config.data.path=FILE, FOLDER or GLOB; documents
              inside of a file end at --config.data.source_options.separator='<|endoftext|>', and
              --config.data.source_options.text_field=meta.text is the text inside of meta
    c4        downloaded C4/Pile-style shards (.jsonl.gz): the same
    tfds      a TFDS data set: --config.data.source_options.name=NAME
    prepared  what `prepare` made elsewhere: --config.data.path=FOLDER
    megatron  tokens of Megatron-LM or GPT-NeoX as they are: --config.data.path=PREFIX, or
              0.7:PREFIX1,0.3:PREFIX2; data.tokenizer is the tokenizer.json that made them

`prepare` deals a large corpus to parts, the same however many processes work on them; killed,
it goes on with the parts that are missing. --parallel=N works on them in N processes, and
--part=i/n, i from 0, does every n-th part alone, as a task of a scheduler's array: the last
to end completes the data. --runner=DirectRunner -- BEAM OPTIONS has Apache Beam do the parts;
--workers_see=/mnt/c4=gs://bucket/c4 says what its workers call folders of this machine.

`export` writes the tokens as such pairs of files, train.bin and train.idx and so on.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np
from absl import flags

from memoryformer import cli, data, errors
from memoryformer import config as config_lib
from memoryformer.data import (
    export,
    megatron,
    part_beam,
    part_runner,
    preparation,
    token_files,
    yardsticks,
)
from memoryformer.data import manifest as manifest_lib
from memoryformer.runs import old_configs

# Which flags each command looks at.
_COMMANDS = {
    "prepare": ("parallel", "part", "runner", "workers_see"),
    "inspect": ("verify", "json", "rows"),
    "yardsticks": ("verify", "json"),
    "export": ("verify", "format", "output"),
}
_COUNTED = 50_000_000  # tokens behind the frequency list


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config_flag()
    flags.DEFINE_bool("verify", False, "Hash the token files (reads them).")
    flags.DEFINE_bool("json", False, "Print one JSON object instead.")
    flags.DEFINE_integer("rows", 2, "Rows of the first batch to decode.", lower_bound=0)
    flags.DEFINE_integer("parallel", 1, "Processes that prepare parts.", 1, 4096)
    flags.DEFINE_string("part", None, "i/n: only every n-th part, from i on; i < n.")
    flags.DEFINE_enum("runner", None, part_beam.RUNNERS, "Apache Beam does the parts.")
    flags.DEFINE_string(
        "workers_see", "", "FOLDER=NAME,..: what Beam's workers call folders."
    )
    flags.DEFINE_enum("format", "megatron", ["megatron"], "What `export` writes.")
    cli.define_path_flag("output", "Folder that `export` writes to.")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv: Sequence[str]) -> None:
    """Run one command."""
    if len(argv) < 2 or (len(argv) > 2 and not flags.FLAGS.runner):
        raise errors.ConfigError(
            f"python -m memoryformer.data: give one command of {', '.join(_COMMANDS)}."
        )
    command = config_lib.choose(argv[1], _COMMANDS, "command")
    for flag in sorted({flag for known in _COMMANDS.values() for flag in known}):
        if flags.FLAGS[flag].present and flag not in _COMMANDS[command]:
            raise errors.ConfigError(f"--{flag}: {command} does not look at it.")
    if flags.FLAGS.json:
        cli.refuse_flags(["rows"], "--json prints no rows; leave one of them out")
    config = flags.FLAGS.config or ml_collections.ConfigDict()
    section = _section(config, "data")
    old_configs.refuse(section, "data")
    data_config = config_lib.build(data.DataConfig, section, "data")
    if command == "export" and not flags.FLAGS.output:
        raise errors.ConfigError("--output: name the folder to write to.")
    if command == "prepare" and data_config.source != "megatron":
        _prepare(data_config, argv[2:])
        return
    dataset = data.load(data_config, verify=flags.FLAGS.verify)
    if command == "prepare":
        print(dataset.directory)
    elif command == "inspect":
        inspect(dataset, config)
    elif command == "export":
        for prefix in export.to_megatron(dataset, pathlib.Path(flags.FLAGS.output)):
            print(prefix)
    else:
        is_ours = data_config.source != "megatron"  # else nothing is kept beside it
        result = yardsticks.measure(dataset, cache=is_ours)
        print(json.dumps(result) if flags.FLAGS.json else yardsticks.table(result))


def inspect(dataset: data.Dataset, config: ml_collections.ConfigDict) -> None:
    """Print what a data set holds and how its first batch looks."""
    if flags.FLAGS.json:
        print(
            json.dumps(
                {"directory": str(dataset.directory), **dataset.manifest.to_json()}
            )
        )
        return
    manifest, tokenizer = dataset.manifest, dataset.tokenizer
    used = manifest.tokenizer
    print(f"directory    {dataset.directory}")
    print(f"fingerprint  {dataset.fingerprint}" + " (verified)" * flags.FLAGS.verify)
    print(f"source       {' '.join(v for v in vars(manifest.source).values() if v)}")
    print(
        f"tokenizer    {used.name}: {used.vocab_size} tokens, end of document "
        f"{used.eot_id}, sha256 {used.sha256[:16]}"
    )
    for name, split in manifest.splits.items():
        print(
            f"{name:12s} {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.ends_of_document:,} ends of document{_more(split)}"
        )
    if note := manifest_lib.byte_note(manifest):
        print(f"note         {note}")
    _print_frequencies(dataset)
    seq_len = _number(config, "model", "seq_len", 256)
    batch_size = _number(config, "train", "batch_size", 4)
    seed = _number(config, "train", "seed", 0)
    if not 0 <= seed < 2**31:
        raise errors.ConfigError(f"train.seed={seed}: must be in [0, 2^31).")
    batches = dataset.train.batches(seq_len, batch_size, seed)
    print(
        f"\nfirst batch: {batch_size} x {seq_len}, seed {seed}, "
        f"{batches.windows_per_epoch:,} windows per epoch"
    )
    batch = batches.batch(0)
    for row in range(min(flags.FLAGS.rows, batch_size)):
        _print_row(batch, row, tokenizer)


def _more(split: manifest_lib.SplitFacts) -> str:
    if isinstance(split, megatron.MegatronFacts):
        drawn = f"; weights {split.weights}" if split.weights else ""
        return f" (of {split.sampled_tokens:,} tokens looked at){drawn}"
    text = (
        f", {split.bytes:,} bytes ({split.bytes / split.tokens:.3f} bytes/token); "
        f"dropped {split.empty_dropped} empty, "
        f"{split.duplicates_of_validation_dropped} also in validation"
    )
    if isinstance(split, manifest_lib.PartedFacts):
        text += f", {split.duplicates_dropped} equal texts" * split.deduplicated
        text += f"; in {len(split.parts)} files"
    return text


def _prepare(data_config: data.DataConfig, beam_options: Sequence[str]) -> None:
    """Prepare, or do a share of it; print the directory once it is there."""
    share, spread = _share(flags.FLAGS.part), None
    if runner := flags.FLAGS.runner:
        cli.refuse_flags(["part", "parallel"], "--runner deals the parts itself")
        views = part_beam.views(flags.FLAGS.workers_see)

        def spread(job: part_runner.Job) -> None:
            part_beam.run(job, runner, beam_options, views)

    elif flags.FLAGS.workers_see:
        raise errors.ConfigError("--workers_see: only a --runner has workers.")

    directory = preparation.prepare(
        data_config, parallel=flags.FLAGS.parallel, share=share, spread=spread
    )
    if directory.exists():
        print(directory)


def _share(text: str | None) -> tuple[int, int]:
    """(i, n) of 'i/n'."""
    if text is None:
        return 0, 1
    number, _, count = text.partition("/")
    sound = number.isdecimal() and count.isdecimal() and len(text) < 20
    if not (sound and int(number) < int(count)):
        raise errors.ConfigError(
            f"--part={text!r}: write i/n with 0 <= i < n, as in --part=0/64."
        )
    return int(number), int(count)


def _section(config: ml_collections.ConfigDict, name: str) -> Mapping:
    section = config.get(name, {})
    if not isinstance(section, Mapping | ml_collections.ConfigDict):
        raise errors.ConfigError(f"{name}={section!r}: expected a section of fields.")
    return section


def _number(
    config: ml_collections.ConfigDict, section: str, field: str, default: int
) -> int:
    value = _section(config, section).get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise errors.ConfigError(f"{section}.{field}={value!r}: expected int.")
    return value


def _print_frequencies(dataset: data.Dataset) -> None:
    tokens = dataset.train.tokens[:_COUNTED]
    token_files.check_ids(tokens, dataset.train.vocab_size, str(dataset.train.path))
    counts = np.bincount(tokens, minlength=dataset.tokenizer.vocab_size)
    top = np.argsort(-counts, kind="stable")[:12]
    pieces = (
        f"{_show(dataset.tokenizer, i)} {counts[i] / len(tokens):.1%}" for i in top
    )
    print(f"most frequent {'  '.join(pieces)}")
    print(f"never seen   {int((counts == 0).sum())} of {len(counts)} tokens in train")


def _print_row(batch: data.Batch, row: int, tokenizer: data.Tokenizer) -> None:
    segment_ids = batch["segment_ids"][row]
    for segment in np.unique(segment_ids[segment_ids > 0]):
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
    main()
