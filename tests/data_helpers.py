"""Small corpora for the tests of memoryformer.data."""

import gzip
import json
import pathlib
import random

from memoryformer import data

WORDS = "memory table hash code bucket lookup score chunk row layer token naïve Ελλάς".split()


def texts(count: int, seed: int = 0) -> list[str]:
    """`count` distinct texts of a few lines, some of them not ASCII."""
    rng = random.Random(seed)
    lines = [
        " ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(count * 4)
    ]
    return [
        f"document {i}\n" + "\n".join(lines[4 * i : 4 * i + 4]) for i in range(count)
    ]


def folder(path: pathlib.Path, documents: list[str]) -> pathlib.Path:
    """One .txt file per document."""
    path.mkdir(parents=True)
    for i, text in enumerate(documents):
        (path / f"{i:04d}.txt").write_text(text, encoding="utf-8")
    return path


def jsonl_gz(
    path: pathlib.Path, documents: list[str], field: str = "text"
) -> pathlib.Path:
    """One JSON line per document, as in C4's shards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        for text in documents:
            stream.write(json.dumps({field: text, "url": "x"}) + "\n")
    return path


def config(
    tmp_path: pathlib.Path, documents: list[str], options=None, **fields
) -> data.DataConfig:
    """A text folder of these documents with its own cache; `options` of the source."""
    corpus = tmp_path / "corpus"
    if not corpus.exists():
        folder(corpus, documents)
    return data.DataConfig(
        source="text",
        source_options={"validation_every": 5} | (options or {}),
        path=str(corpus),
        data_dir=str(tmp_path / "cache"),
        **{"tokenizer": "bytes"} | fields,
    )
