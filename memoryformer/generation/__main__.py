"""Continue text from a shell.

python -m memoryformer.generation --workdir=DIR --prompt="def main(" --stop="def "
python -m memoryformer.generation --workdir=DIR --prompts=FILE --output=FILE.jsonl
python -m memoryformer.generation --workdir=DIR --repl
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence

from absl import flags

from memoryformer import cli
from memoryformer.data import names
from memoryformer.errors import ConfigError
from memoryformer.generation import prompts as prompts_lib
from memoryformer.generation import sampler, speculation
from memoryformer.generation import text as text_lib
from memoryformer.model import narrow
from memoryformer.ops.lookup import screened
from memoryformer.runs import console
from memoryformer.runs import directory as directory_lib


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_path_flag("workdir", "The run.", in_store=True)
    cli.define_path_flag("export", "An exported model, instead of a run.")
    flags.DEFINE_string("prompt", "", "Text to continue.")
    cli.define_path_flag("prompts", "File of prompts, lines or JSONL.")
    cli.define_path_flag("output", "JSONL file for --prompts.")
    flags.DEFINE_string("tables", "float32", "float32, bfloat16 or int8.")
    flags.DEFINE_string(
        "head", "float32", "The same, int4, w8a8, w4a8 or int8-screened."
    )
    flags.DEFINE_string("dense", "float32", "Other dense layers: not screened.")
    flags.DEFINE_bool("repl", False, "Continue each line that is typed.")
    flags.DEFINE_multi_string(
        "stop", [], "Stop before this text (\\n: a line end); repeatable."
    )
    flags.DEFINE_integer("batch_size", 16, "Prompts at a time.", 1, 2**16)
    flags.DEFINE_integer("step", -1, "Which step; the newest if negative.")
    flags.DEFINE_float("temperature", 0.8, "0 = most likely token.")
    flags.DEFINE_float("top_p", 0.95, "Mass of the nucleus.")
    flags.DEFINE_integer("max_tokens", 200, "How many tokens.", upper_bound=2**20)
    flags.DEFINE_integer(
        "speculate",
        0,
        "Tokens to draft from the text and read in one pass; 0: none. Same text.",
        0,
        speculation.MAX_DRAFT,
    )
    flags.DEFINE_integer("seed", 0, "Of the sampling.", 0, 2**31 - 1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv):
    """Continue --prompt, the prompts of a file, or what is typed."""
    cli.check_arguments(argv, config=None, required=False)
    if bool(flags.FLAGS.workdir) == bool(flags.FLAGS.export):
        raise ConfigError("name one of --workdir=DIR and --export=DIR.")
    _refuse_unused_flags()
    output = flags.FLAGS.output
    if output:
        folder = flags.FLAGS.workdir or flags.FLAGS.export
        directory_lib.check_output(output, [flags.FLAGS.prompts], [folder])
    sampling = sampler.SamplingConfig(
        flags.FLAGS.max_tokens,
        flags.FLAGS.temperature,
        flags.FLAGS.top_p,
        flags.FLAGS.seed,
    )
    kinds = cli.chosen(narrow.WeightKinds)
    # Read before the model, which takes longer.
    path = flags.FLAGS.prompts
    prompts = prompts_lib.read(path) if path else []
    prompts_lib.check_seeds(sampling, prompts)
    if flags.FLAGS.export:
        loaded, tokenizer = text_lib.open_export(flags.FLAGS.export, kinds)
    else:
        step = None if flags.FLAGS.step < 0 else flags.FLAGS.step
        loaded, tokenizer, _ = text_lib.open_run(flags.FLAGS.workdir, step, kinds)
    generator: text_lib.Streams = loaded
    if flags.FLAGS.speculate:
        generator = speculation.Speculator(loaded, flags.FLAGS.speculate)
    # A shell passes \n on as two characters.
    stop = [names.unescaped(string) for string in flags.FLAGS.stop]
    if prompts:
        size = flags.FLAGS.batch_size
        _run_file(generator, tokenizer, sampling, stop, prompts, output, size)
        return
    if not flags.FLAGS.repl:
        _run_prompt(generator, tokenizer, flags.FLAGS.prompt, sampling, stop)
        return
    print("Type a beginning; an empty line ends.", file=sys.stderr)
    try:
        for line in sys.stdin:
            if not line.strip():
                return
            _run_prompt(generator, tokenizer, line.rstrip("\n"), sampling, stop)
            sampling = dataclasses.replace(sampling, seed=sampling.seed + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: is not UTF-8 text ({error}).") from error


def _refuse_unused_flags():
    if flags.FLAGS.export:
        cli.refuse_flags(["step"], "an export holds one step; leave it out")
    if flags.FLAGS.prompts:
        cli.refuse_flags(["prompt", "repl"], "--prompts names a file of prompts")
    else:
        cli.refuse_flags(["output", "batch_size"], "is of --prompts=FILE")
    if flags.FLAGS.prompts and flags.FLAGS.speculate and flags.FLAGS.batch_size > 1:
        raise ConfigError(
            f"--speculate={flags.FLAGS.speculate}: reads one text at a time; with "
            "--prompts use --batch_size=1."
        )
    if flags.FLAGS.repl:
        cli.refuse_flags(["prompt"], "with --repl, prompts are typed")


def _run_prompt(generator, tokenizer, prompt, sampling, stop):
    prompts_lib.check_text([prompt])
    seq_len = generator.model_config.seq_len
    size = 1 + len(tokenizer.encode(prompt))
    if size + sampling.max_tokens > seq_len:
        print(
            f"note: {size} + {sampling.max_tokens} tokens are more than the {seq_len} of "
            "training.",
            file=sys.stderr,
        )
    times = []

    def show(text):
        times.append(time.perf_counter())
        sys.stdout.write(text)
        sys.stdout.flush()

    sys.stdout.write(prompt)
    (reply,) = text_lib.complete(generator, tokenizer, [prompt], sampling, stop, show)
    print()
    speed = ""
    after = reply.num_tokens - sampler.LOOP  # tokens come LOOP at a time
    if after > 0:
        rate = after / (times[-1] - times[sampler.LOOP - 1])
        speed = (
            f", {console.short_number(rate)} tokens/s after the first {sampler.LOOP}"
        )
    print(
        f"[{reply.num_tokens} tokens{speed}, ended by {reply.finish}{_of_head()}]",
        file=sys.stderr,
    )
    _show_speculation(generator)


def _of_head():
    """What greedy decoding has read of a screened head, since the beginning."""
    if flags.FLAGS.head != narrow.SCREENED:
        return ""
    counts = screened.counts()
    if not counts.vectors:
        return (
            "; head: all rows read (screened for temperature 0 only, and from "
            f"{screened.FEWEST_WEIGHTS:,} weights on)"
        )
    rows, size = counts.rows / counts.vectors, counts.bytes / counts.vectors
    return (
        f"; head, for each token: {console.short_number(rows)} rows read whole, "
        f"{console.short_number(size)} bytes; all rows for {counts.whole} of "
        f"{counts.vectors} tokens"
    )


def _show_speculation(generator):
    if isinstance(generator, speculation.Speculator):
        print(f"[{generator.report}]", file=sys.stderr)


def _run_file(generator, tokenizer, sampling, stop, prompts, output, batch_size):
    started, count = time.perf_counter(), 0
    rows = text_lib.complete_all(
        generator, tokenizer, prompts, sampling, stop, batch_size
    )
    with contextlib.ExitStack() as stack:
        out = sys.stdout
        if output:
            out = stack.enter_context(open(output, "w", encoding="utf-8"))
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            count += row["num_tokens"]
    rate = console.short_number(count / (time.perf_counter() - started))
    print(
        f"[{count} tokens, {rate} tokens/s with compilation{_of_head()}]",
        file=sys.stderr,
    )
    _show_speculation(generator)


if __name__ == "__main__":
    main()
