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
    run_tokenizer,
)
from memoryformer.convert import export
from memoryformer.errors import ConfigError

SamplingConfig = decoding.SamplingConfig
Generator = decoding.Generator


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt was continued with, and why it ended: 'stop', 'end' or 'length'."""

    text: str
    num_tokens: int
    finish: str


class _Reply:
    """The text of one row so far, cut before the first stop string."""

    def __init__(self, tokenizer: data.Tokenizer, stop: Sequence[str], start: bool):
        self._stream = tokenizer.stream(start)
        self._eot_id = tokenizer.eot_id
        self._stop = [string for string in stop if string]
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
        found = [self.text.find(stop) for stop in self._stop if stop in self.text]
        if found:
            self.text, self.finish = self.text[: min(found)], "stop"


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
    start = [tokenizer.eot_id]
    tokens = [start + tokenizer.encode(prompt) for prompt in prompts]
    replies = [_Reply(tokenizer, stop, start=not prompt) for prompt in prompts]
    for row in generator.stream_batch(tokens, sampling):
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
    the batch size.
    """
    prompts = _read_prompts(path)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        now = dataclasses.replace(sampling, seed=sampling.seed + start)
        replies = complete(generator, tokenizer, batch, now, stop)
        for i, (prompt, reply) in enumerate(zip(batch, replies, strict=True)):
            yield (
                {"prompt": prompt} | dataclasses.asdict(reply) | {"seed": now.seed + i}
            )


def _read_prompts(path: str) -> list[str]:
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        if path.endswith((".jsonl", ".json")):
            return [json.loads(line)["prompt"] for line in lines if line.strip()]
    except OSError as error:
        raise ConfigError(f"--prompts={path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--prompts={path}: every line must be JSON with 'prompt' ({error!r})."
        ) from error
    return [line for line in lines if line]


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


def main(argv):
    """Continue --prompt, the prompts of a file, or what is typed."""
    errors.check_arguments(argv, config=None, required=False)
    if bool(_WORKDIR.value) == bool(_EXPORT.value):
        raise ConfigError("name one of --workdir=DIR and --export=DIR.")
    sampling = SamplingConfig(
        _MAX_TOKENS.value, _TEMPERATURE.value, _TOP_P.value, _SEED.value
    )
    kinds = inference.WeightKinds(_TABLES.value, _HEAD.value, _DENSE.value)
    kinds = None if kinds == inference.WeightKinds() else kinds
    if _EXPORT.value:
        generator, tokenizer = open_export(_EXPORT.value, kinds)
    else:
        step = None if _STEP.value < 0 else _STEP.value
        generator, tokenizer, _ = open_run(_WORKDIR.value, step, kinds)
    if _PROMPTS.value:
        _run_file(generator, tokenizer, sampling)
        return
    if not _REPL.value:
        _run_prompt(generator, tokenizer, _PROMPT.value, sampling)
        return
    print("Type a beginning; an empty line ends.", file=sys.stderr)
    for line in sys.stdin:
        if not line.strip():
            return
        _run_prompt(generator, tokenizer, line.rstrip("\n"), sampling)
        sampling = dataclasses.replace(sampling, seed=sampling.seed + 1)


def _run_prompt(generator, tokenizer, prompt, sampling):
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
    (reply,) = complete(generator, tokenizer, [prompt], sampling, _STOP.value, show)
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


def _run_file(generator, tokenizer, sampling):
    started, count = time.perf_counter(), 0
    with contextlib.ExitStack() as stack:
        out = sys.stdout
        if _OUTPUT.value:
            if pathlib.Path(_OUTPUT.value).exists() and os.path.samefile(
                _OUTPUT.value, _PROMPTS.value
            ):
                raise ConfigError(f"--output={_OUTPUT.value}: is the file of prompts.")
            out = stack.enter_context(open(_OUTPUT.value, "w", encoding="utf-8"))
        for row in complete_file(
            generator,
            tokenizer,
            _PROMPTS.value,
            sampling,
            _STOP.value,
            _BATCH_SIZE.value,
        ):
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            count += row["num_tokens"]
    rate = metrics.short_number(count / (time.perf_counter() - started))
    print(f"[{count} tokens, {rate} tokens/s with compilation]", file=sys.stderr)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", "", "The run.")
    _EXPORT = flags.DEFINE_string("export", "", "An exported model, instead of a run.")
    _PROMPT = flags.DEFINE_string("prompt", "", "Text to continue.")
    _PROMPTS = flags.DEFINE_string("prompts", "", "File of prompts, lines or JSONL.")
    _OUTPUT = flags.DEFINE_string("output", "", "JSONL file for --prompts.")
    _TABLES = flags.DEFINE_string("tables", "float32", "float32, bfloat16 or int8.")
    _HEAD = flags.DEFINE_string("head", "float32", "The same, or int4.")
    _DENSE = flags.DEFINE_string("dense", "float32", "Other dense layers; as --head.")
    _REPL = flags.DEFINE_bool("repl", False, "Continue each line that is typed.")
    _STOP = flags.DEFINE_multi_string("stop", [], "Stop before this text; repeatable.")
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Prompts at a time.")
    _STEP = flags.DEFINE_integer("step", -1, "Which step; the newest if negative.")
    _TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 = most likely token.")
    _TOP_P = flags.DEFINE_float("top_p", 0.95, "Mass of the nucleus.")
    _MAX_TOKENS = flags.DEFINE_integer("max_tokens", 200, "How many tokens.")
    _SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
    errors.run_main(main)
