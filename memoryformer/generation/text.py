"""Text that continues text: prompts, stop strings, files and the command.

Tokens are `decoding`'s. Start at `complete`.

    python -m memoryformer.generation --workdir=DIR --prompt="def main(" --stop="def "
    python -m memoryformer.generation --workdir=DIR --prompts=FILE --output=FILE.jsonl
    python -m memoryformer.generation --workdir=DIR --repl
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from memoryformer import (
    data,
    decoding,
    errors,
    experiment,
    inference,
    metrics,
    paths,
    run_tokenizer,
    rundir,
)
from memoryformer.convert import export
from memoryformer.data import blocks, jsonlines, names
from memoryformer.errors import ConfigError, DataError

SamplingConfig = decoding.SamplingConfig
Generator = decoding.Generator


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt was continued with, and why it ended: 'stop', 'end' or 'length'."""

    text: str
    num_tokens: int
    finish: str


class _Reply:
    """The text of one row so far, cut before its stop strings (see `_before`)."""

    def __init__(
        self,
        tokenizer: data.Tokenizer,
        stop: Sequence[str],
        in_turn: bool = False,
        start: bool = False,
    ):
        self._stream = tokenizer.stream(start)
        self._eot_id = tokenizer.eot_id
        self._stop = [string for string in stop if string]
        self._in_turn = in_turn
        self.text, self.num_tokens, self.finish, self._shown = "", 0, "", 0

    def push(self, token: int) -> None:
        """Add one token, unless the reply is complete."""
        if self.finish:
            return
        if token == self._eot_id:
            self.close("end")
            return
        self.num_tokens += 1
        self._add(self._stream.push(token))

    def close(self, finish: str) -> None:
        """End the reply, if it has not ended."""
        if not self.finish:
            self._add(self._stream.finish())
            self.finish = self.finish or finish

    def new_text(self) -> str:
        """Return what can be shown now and was not: no beginning of a stop string."""
        end = len(self.text)
        if not self.finish:
            end -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        start, self._shown = self._shown, max(self._shown, end)
        return self.text[start : self._shown]

    def _add(self, text: str) -> None:
        self.text += text
        kept = _before(self.text, self._stop, self._in_turn)
        if kept != self.text:
            self.text, self.finish = kept, "stop"


def _before(text: str, stops: Sequence[str], in_turn: bool) -> str:
    """What stands before the stop string that begins first; or, `in_turn`, before the first
    of `stops`, of that before the second, and so on. They differ where two overlap.
    """
    if in_turn:
        for stop in stops:
            text = text.partition(stop)[0]
        return text
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


def complete(
    generator: Generator,
    tokenizer: data.Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
    show: Callable[[str], Any] = lambda text: None,
) -> list[Completion]:
    """Continue texts, together, each up to its first stop string or end of document.

    Documents begin with the end-of-text token of the one before, and so do prompts. `show`
    gets the first reply's text as it comes.
    """
    _check_text(prompts)
    start = [tokenizer.eot_id]
    tokens = [start + tokenizer.encode(prompt) for prompt in prompts]
    return complete_tokens(generator, tokenizer, tokens, sampling, stop, show)


def complete_tokens(
    generator: Generator,
    tokenizer: data.Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
    show: Callable[[str], Any] = lambda text: None,
    *,
    in_turn: bool = False,
) -> list[Completion]:
    """`complete` for prompts that are tokens; nothing is put before them.

    in_turn: where stop strings overlap, the text is cut before the first of `stop`, and what
      is left before the next, as the lm-evaluation-harness does.
    """
    replies = [
        _Reply(tokenizer, stop, in_turn, start=set(prompt) <= {tokenizer.eot_id})
        for prompt in prompts
    ]
    for row in generator.stream_batch(prompts, sampling):
        for reply, token in zip(replies, row, strict=True):
            reply.push(token)
        show(replies[0].new_text())
        if all(reply.finish for reply in replies):
            break
    for reply in replies:
        reply.close("length")
    show(replies[0].new_text())
    return [Completion(r.text, r.num_tokens, r.finish) for r in replies]


def complete_file(
    generator: Generator,
    tokenizer: data.Tokenizer,
    path: str,
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
    batch_size: int = 16,
) -> Iterator[dict[str, Any]]:
    """Continue every prompt of a file: lines of text, or JSON lines with 'prompt'.

    Yields {'prompt', 'text', 'num_tokens', 'finish', 'seed'}; prompt i has seed + i, whatever
    the batch size. The file is read at once: raises `ConfigError` where it is no such file.
    """
    prompts = _read_prompts(path)
    _check_seeds(sampling, prompts)
    return complete_all(generator, tokenizer, prompts, sampling, stop, batch_size)


def complete_all(
    generator: Generator,
    tokenizer: data.Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
    batch_size: int = 16,
) -> Iterator[dict[str, Any]]:
    """Continue these prompts, `batch_size` at a time; yields as `complete_file`."""
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        now = dataclasses.replace(sampling, seed=sampling.seed + start)
        replies = complete(generator, tokenizer, batch, now, stop)
        for i, (prompt, reply) in enumerate(zip(batch, replies, strict=True)):
            yield (
                {"prompt": prompt} | dataclasses.asdict(reply) | {"seed": now.seed + i}
            )


def _read_prompts(path: str) -> list[str]:
    """The prompts of a file; a line of plain text that is empty is an empty prompt."""
    file = pathlib.Path(path)
    try:
        if blocks.is_json_lines(file):
            fix = 'write every line as {"prompt": "text"}'
            prompts = [
                jsonlines.text(value, "prompt", f"{names.shown(path)}:{number}", fix)
                for number, value in jsonlines.values(file)
            ]
        else:
            prompts = list(blocks.text_lines(file))
    except DataError as error:
        raise ConfigError(f"--prompts: {error}") from error
    if not prompts:
        raise ConfigError(f"--prompts: {names.shown(path)}: holds no prompts.")
    return prompts


def _check_seeds(sampling: SamplingConfig, prompts: Sequence[str]) -> None:
    """Raise `ConfigError` if the last prompt's seed would be no seed."""
    if sampling.seed + len(prompts) > 2**31:
        raise ConfigError(
            f"--seed={sampling.seed}: prompt i of {len(prompts)} has seed + i, which must "
            f"stay below 2^31; use at most {2**31 - len(prompts)}."
        )


def _check_text(prompts: Sequence[str]) -> None:
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"prompt {prompt!r}: is not UTF-8 text (character {error.start})."
            ) from error


def open_run(
    workdir: str | os.PathLike,
    step: int | None = None,
    kinds: inference.WeightKinds | None = None,
) -> tuple[Generator, data.Tokenizer, experiment.Experiment]:
    """Load a checkpoint and its tokenizer for sampling, weights stored as `kinds` says."""
    run, params, facts = experiment.load(workdir, step)
    tokenizer = run_tokenizer.load(workdir, run.data, facts, run.model.vocab_size)
    return Generator(run.model, params, kinds), tokenizer, run


def open_export(
    directory: str, kinds: inference.WeightKinds | None = None
) -> tuple[Generator, data.Tokenizer]:
    """Load what `python -m memoryformer.convert` wrote, for sampling."""
    model_config, params = export.load_export(directory)
    tokenizer = export.own_tokenizer(directory, model_config.vocab_size)
    return Generator(model_config, params, kinds), tokenizer


def define_flags() -> None:
    """Define the flags of the command."""
    paths.define_flag("workdir", "The run.")
    paths.define_flag("export", "An exported model, instead of a run.")
    flags.DEFINE_string("prompt", "", "Text to continue.")
    paths.define_flag("prompts", "File of prompts, lines or JSONL.")
    paths.define_flag("output", "JSONL file for --prompts.")
    flags.DEFINE_string("tables", "float32", "float32, bfloat16 or int8.")
    flags.DEFINE_string("head", "float32", "The same, or int4.")
    flags.DEFINE_string("dense", "float32", "Other dense layers; as --head.")
    flags.DEFINE_bool("repl", False, "Continue each line that is typed.")
    flags.DEFINE_multi_string(
        "stop", [], "Stop before this text (\\n: a line end); repeatable."
    )
    flags.DEFINE_integer("batch_size", 16, "Prompts at a time.", 1, 2**16)
    flags.DEFINE_integer("step", -1, "Which step; the newest if negative.")
    flags.DEFINE_float("temperature", 0.8, "0 = most likely token.")
    flags.DEFINE_float("top_p", 0.95, "Mass of the nucleus.")
    flags.DEFINE_integer("max_tokens", 200, "How many tokens.", upper_bound=2**20)
    flags.DEFINE_integer("seed", 0, "Of the sampling.", 0, 2**31 - 1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    errors.run_main(_run, define_flags, argv)


def _run(argv):
    """Continue --prompt, the prompts of a file, or what is typed."""
    errors.check_arguments(argv, config=None, required=False)
    if bool(flags.FLAGS.workdir) == bool(flags.FLAGS.export):
        raise ConfigError("name one of --workdir=DIR and --export=DIR.")
    _refuse_unused_flags()
    output = flags.FLAGS.output
    if output:
        folder = flags.FLAGS.workdir or flags.FLAGS.export
        rundir.check_output(output, [flags.FLAGS.prompts], [folder])
    sampling = SamplingConfig(
        flags.FLAGS.max_tokens,
        flags.FLAGS.temperature,
        flags.FLAGS.top_p,
        flags.FLAGS.seed,
    )
    kinds = inference.kinds_from_flags()
    # Read before the model, which takes longer.
    path = flags.FLAGS.prompts
    prompts = _read_prompts(path) if path else []
    _check_seeds(sampling, prompts)
    if flags.FLAGS.export:
        generator, tokenizer = open_export(flags.FLAGS.export, kinds)
    else:
        step = None if flags.FLAGS.step < 0 else flags.FLAGS.step
        generator, tokenizer, _ = open_run(flags.FLAGS.workdir, step, kinds)
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
        errors.refuse_flags(["step"], "an export holds one step; leave it out")
    if flags.FLAGS.prompts:
        errors.refuse_flags(["prompt", "repl"], "--prompts names a file of prompts")
    else:
        errors.refuse_flags(["output", "batch_size"], "is of --prompts=FILE")
    if flags.FLAGS.repl:
        errors.refuse_flags(["prompt"], "with --repl, prompts are typed")


def _run_prompt(generator, tokenizer, prompt, sampling, stop):
    _check_text([prompt])
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
    (reply,) = complete(generator, tokenizer, [prompt], sampling, stop, show)
    print()
    speed = ""
    after = reply.num_tokens - decoding.LOOP  # tokens come LOOP at a time
    if after > 0:
        rate = after / (times[-1] - times[decoding.LOOP - 1])
        speed = (
            f", {metrics.short_number(rate)} tokens/s after the first {decoding.LOOP}"
        )
    print(
        f"[{reply.num_tokens} tokens{speed}, ended by {reply.finish}]", file=sys.stderr
    )


def _run_file(generator, tokenizer, sampling, stop, prompts, output, batch_size):
    started, count = time.perf_counter(), 0
    rows = complete_all(generator, tokenizer, prompts, sampling, stop, batch_size)
    with contextlib.ExitStack() as stack:
        out = sys.stdout
        if output:
            out = stack.enter_context(open(output, "w", encoding="utf-8"))
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            count += row["num_tokens"]
    rate = metrics.short_number(count / (time.perf_counter() - started))
    print(f"[{count} tokens, {rate} tokens/s with compilation]", file=sys.stderr)


if __name__ == "__main__":
    main()
