"""How fast a corpus is prepared, in how much memory, beside datatrove on the same text.

    python -m benchmarks.prepare                                      # ours alone
    python -m benchmarks.prepare --datatrove=OTHER_VENV/bin/python    # and theirs

Text is this Python's own installed sources, as JSON lines, with a trained vocabulary
(--tokenizer takes a tokenizer.json instead). Rounds take turns: one process, two processes,
datatrove with one task; each process encodes with one thread. Seconds of the clock say what a
quiet machine does; on a shared one, tokens per second of processor time are the figure to
trust. `chain_seconds` are the processor seconds one after another: the process that begins and
an equal share of what the others do, so the clock's where every process has a core. Then one process' peak memory at three sizes of the input. Prints one JSON object.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence

from benchmarks import arguments

FLAGS = arguments.Parser(__doc__)
FLAGS.add_argument("--folder", default="runs/prepare", help="corpora and outputs")
FLAGS.number("megabytes", 24, high=1 << 20, help="of the largest corpus")
FLAGS.add_argument("--tokenizer", default="", help="a tokenizer.json; '': trained")
FLAGS.number("vocab_size", 16384, low=257, help="of a trained one")
FLAGS.number("rounds", 3, help="of each")
FLAGS.add_argument("--datatrove", default="", help="a python that has datatrove")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

from memoryformer.data import local_files, tokenizer

_OURS = """
import json, resource, sys
from memoryformer import data
config = data.DataConfig(source="c4", path=sys.argv[1], tokenizer=sys.argv[2],
    data_dir=sys.argv[3], source_options={"part_bytes": int(sys.argv[5])})
data.prepare(config, show_progress=False, parallel=int(sys.argv[4]))
whose = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
print(json.dumps([sum(resource.getrusage(who)[:2]) for who in whose]))
"""
_THEIRS = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
LocalPipelineExecutor(pipeline=[
    JsonlReader(sys.argv[1], glob_pattern="*.jsonl"),
    DocumentTokenizer(output_folder=sys.argv[3], tokenizer_name_or_path=sys.argv[2],
        eos_token="<eot>", shuffle_documents=False, batch_size=1000),
], tasks=1, workers=1, logging_dir=sys.argv[3] + "/logs").run()
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpora, measure, print."""
    flags = FLAGS.parse_args(argv)
    folder = pathlib.Path(flags.folder)
    sizes = [flags.megabytes << 20 >> shift for shift in (4, 2, 0)]
    corpora = [_corpus(folder / f"text-{size}", size) for size in sizes]
    spec = flags.tokenizer or _trained(folder / "tokenizer.json", corpora[-1], flags)
    runs: dict[str, list[dict]] = {}
    for _ in range(flags.rounds):
        for name, parallel in (("one process", 1), ("two processes", 2)):
            runs.setdefault(name, []).append(_ours(corpora[-1], spec, folder, parallel))
        if flags.datatrove:
            command = [flags.datatrove, "-c", _THEIRS]
            runs.setdefault("datatrove", []).append(
                _run(command, corpora[-1], spec, folder / "out")
            )
    memory = {
        size >> 20: _ours(corpus, spec, folder, 1)["peak_mb"]
        for size, corpus in zip(sizes, corpora, strict=True)
    }
    tokens = runs["one process"][0]["tokens"]
    table = {
        name: {
            key: round(statistics.median(run[key] for run in of_name), 2)
            for key in ("seconds", "cpu_seconds", "chain_seconds", "peak_mb")
            if key in of_name[0]
        }
        | {
            "tokens_per_cpu_second": round(
                tokens / statistics.median(run["cpu_seconds"] for run in of_name)
            )
        }
        for name, of_name in runs.items()
    }
    print(
        json.dumps({"tokens": tokens, "runs": table, "peak_mb_by_mb": memory}, indent=1)
    )


def _ours(corpus: pathlib.Path, spec: str, folder: pathlib.Path, parallel: int) -> dict:
    command = [sys.executable, "-c", _OURS]
    size = sum(path.stat().st_size for path in corpus.iterdir())
    extra = (str(parallel), str(min(2 << 20, size - 1)))
    run = _run(command, corpus, spec, folder / "out", extra)
    begun, shared = json.loads(run["printed"])
    return run | {"chain_seconds": begun + shared / parallel}


def _run(
    command: Sequence[str],
    corpus: pathlib.Path,
    spec: str,
    out: pathlib.Path,
    extra: Sequence[str] = (),
) -> dict:
    """Seconds of the clock and of processors, peak memory of the largest process, tokens."""
    shutil.rmtree(out, ignore_errors=True)
    threads = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
    threads |= {"HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, str(corpus), spec, str(out), *extra],
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout
    with process.stdout as stream:
        printed = stream.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} ended with {status}")
    manifests = [json.loads(p.read_text()) for p in out.glob("*/manifest.json")]
    splits = [split for m in manifests for split in m["splits"].values()]
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss >> 10,
        "printed": printed,
        "tokens": sum(split["tokens"] for split in splits),
    }


def _corpus(folder: pathlib.Path, size: int) -> pathlib.Path:
    """Twelve JSON-lines files of sources, of about `size` bytes together."""
    if folder.exists():
        return folder
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    paths = sorted(pathlib.Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    files = [(temporary / f"{n:02d}.jsonl").open("w") for n in range(12)]
    written = 0
    for n, path in enumerate(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if 0 < len(text) < 1 << 20 and "\0" not in text:
            written += files[n % 12].write(json.dumps({"text": text}) + "\n")
        if written >= size:
            break
    for file in files:
        file.close()
    temporary.rename(folder)
    return folder


def _trained(
    path: pathlib.Path, corpus: pathlib.Path, flags: argparse.Namespace
) -> str:
    if not path.exists():
        files = [(file.name, file) for file in sorted(corpus.iterdir())[:3]]
        texts = (
            t for _, t, _ in local_files.read_documents(files, local_files.Reading())
        )
        tokenizer.train_bpe(texts, flags.vocab_size).save(path)
    return str(path)


if __name__ == "__main__":
    arguments.run(main)
