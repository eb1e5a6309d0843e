"""The paper's six tasks: versions, data and the figures to compare with.

Definitions (prompts, choices, metrics) are the harness's own, at the version pinned here. Data
comes from the hub, or from files: `TASK.jsonl` (and `TASK.train.jsonl` for few-shot examples)
in a folder, with the columns that the task's dataset has on the hub. LogiQA's dataset on the
hub is a script, which `datasets` >= 4 does not run, so it is read from its authors' text files.

Start at `task_config`.
"""

import hashlib
import pathlib
import urllib.request
from collections.abc import Iterable
from typing import Any

from memoryformer.data import blocks, jsonlines
from memoryformer.errors import ConfigError, DataError
from memoryformer.files import atomic

HARNESS_VERSION = "0.4.13"


# name -> (file below lm_eval/tasks, version of the task)
TASKS = {
    "piqa": ("piqa/piqa.yaml", 1.0),
    "winogrande": ("winogrande/default.yaml", 1.0),
    "wsc": ("super_glue/wsc/default.yaml", 1.0),
    "arc_easy": ("arc/arc_easy.yaml", 1.0),
    "arc_challenge": ("arc/arc_challenge.yaml", 1.0),
    "logiqa": ("logiqa/logiqa.yaml", 1.0),
}

# Accuracies, zero-shot, in the order of TASKS. The paper quotes EleutherAI's figures for
# Pythia: deduplicated models, the last step for 160M and 410M, step 93,000 for 70M.
FIGURES = {
    "MF-tiny": (0.602, 0.522, 0.375, 0.437, 0.228, 0.260),
    "MF-small": (0.642, 0.523, 0.394, 0.461, 0.247, 0.272),
    "MF-base": (0.698, 0.546, 0.385, 0.585, 0.259, 0.272),
    "Pythia-70M": (0.585, 0.511, 0.365, 0.380, 0.177, 0.232),
    "Pythia-160M": (0.618, 0.497, 0.365, 0.440, 0.201, 0.210),
    "Pythia-410M": (0.675, 0.534, 0.471, 0.517, 0.202, 0.209),
    # EleutherAI's, not deduplicated, last step.
    "70M (Eleuther)": (0.595, 0.528, 0.365, 0.374, 0.181, 0.210),
}

LOGIQA_URL = (
    "https://raw.githubusercontent.com/lgw863/LogiQA-dataset/"
    "ff6c4cbca47627b3ac2da94a29fa28204a167b41/"
)
LOGIQA_FILES = {  # split -> (file, SHA-256)
    "train": (
        "Train.txt",
        "7d5bb1f58278e33b395744cd2ad8d7600faa0b3c4d615c659a44ec1181d759fa",
    ),
    "test": (
        "Test.txt",
        "359acb78c37802208f7fde9e2f6574b8526527c63d6a336f90a53f1932cb4701",
    ),
}


def task_config(
    name: str, tasks_path: str = "", *, cache: pathlib.Path | None = None
) -> dict[str, Any]:
    """Return the harness's config of one of the six tasks, its data resolved.

    Data comes from `tasks_path` if that folder has `name.jsonl`; `cache` is where LogiQA's
    files are kept. Raises `ConfigError` if the harness's task has another version, `DataError`
    for unusable files.
    """
    from lm_eval.tasks import _yaml_loader

    file, version = TASKS[name]
    folder = pathlib.Path(_yaml_loader.__file__).parent
    try:
        config = _yaml_loader.load_yaml(folder / file)
    except OSError as error:
        raise ConfigError(
            f"task {name}: this lm-eval has no {file}; install lm-eval=={HARNESS_VERSION}."
        ) from error
    installed = (config.get("metadata") or {}).get("version")
    if installed != version:
        raise ConfigError(
            f"task {name}: this lm-eval has version {installed}, pinned is {version}; install "
            f"lm-eval=={HARNESS_VERSION}."
        )
    rows = local_rows(name, tasks_path)
    if not rows and name == "logiqa":
        rows = logiqa_rows(cache or pathlib.Path(), with_train=True)
    return with_rows(config, rows) if rows else config


def with_rows(
    config: dict[str, Any], rows: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Replace a task's data: its evaluation split by rows['test'], few-shot by 'train'."""
    import datasets

    try:
        splits = {name: datasets.Dataset.from_list(r) for name, r in rows.items()}
    except (TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"task {config.get('task')}: its rows differ in kind ({reason})."
        ) from error
    dropped = ("dataset_path", "dataset_name", "dataset_kwargs", "tag")
    kept = {key: value for key, value in config.items() if key not in dropped}
    return kept | {
        "custom_dataset": lambda **_: splits,
        "training_split": "train" if "train" in rows else None,
        "validation_split": None,
        "test_split": "test",
    }


def local_rows(name: str, tasks_path: str) -> dict[str, list[dict[str, Any]]]:
    """Read `name.jsonl` and `name.train.jsonl` of a folder; {} if it has neither.

    Other endings of JSON lines will do, compressed or in upper case too. Raises
    `DataError` for two files of one split, and for examples without what is asked.
    """
    rows = {}
    for split, paths in local_files(name, tasks_path).items():
        if len(paths) > 1:
            listed = ", ".join(path.name for path in paths)
            raise DataError(f"task {name}: {tasks_path} holds {listed}; leave one.")
        if paths:
            rows[split] = _read_jsonl(paths[0])
    if rows.keys() == {"train"}:
        raise DataError(
            f"task {name}: {tasks_path} holds {name}.train.jsonl without {name}.jsonl, "
            "which is what would be asked; add it."
        )
    return rows


def local_files(name: str, tasks_path: str) -> dict[str, list[pathlib.Path]]:
    """The files of a folder that hold a task's rows: {'test': [..], 'train': [..]}."""
    if not tasks_path:
        return {}
    held = sorted(path for path in pathlib.Path(tasks_path).iterdir() if path.is_file())
    endings = [
        ending + compression
        for ending in blocks.JSON_SUFFIXES
        for compression in ("", *blocks.COMPRESSED)
    ]
    return {
        split: [p for p in held if p.name.lower() in {stem + end for end in endings}]
        for split, stem in (("test", name), ("train", f"{name}.train"))
    }


def files_read(names: Iterable[str], tasks_path: str) -> list[pathlib.Path]:
    """The files of `tasks_path` that these tasks may be made of: rows and YAML."""
    if not tasks_path or not pathlib.Path(tasks_path).is_dir():
        return []
    rows = (local_files(name, tasks_path).values() for name in names)
    named = [path for splits in rows for paths in splits for path in paths]
    return named + sorted(pathlib.Path(tasks_path).rglob("*.yaml"))


def logiqa_rows(
    cache: pathlib.Path, *, with_train: bool = False, url: str = LOGIQA_URL
) -> dict[str, list[dict[str, Any]]]:
    """Read LogiQA's text files from `cache`, fetching and checking them first if need be."""
    rows = {}
    for split, (file, digest) in LOGIQA_FILES.items():
        if split == "test" or with_train:
            rows[split] = parse_logiqa(_fetch(url + file, digest, cache / file))
    return rows


def parse_logiqa(text: str) -> list[dict[str, Any]]:
    """Turn blocks of label, context, question and four options into rows."""

    def spaced(line: str) -> str:  # the files lack the space after a full stop
        return line.replace(".", ". ").strip()

    rows = []
    for number, block in enumerate(text.strip().split("\n\n")):
        lines = block.split("\n")
        if len(lines) != 7 or lines[0].strip() not in ("a", "b", "c", "d"):
            raise DataError(f"logiqa: block {number} is not label, 2 lines, 4 options.")
        rows.append(
            {
                "label": lines[0].strip(),
                "context": spaced(lines[1]),
                "question": spaced(lines[2]),
                "options": [spaced(option[2:]) for option in lines[3:]],
            }
        )
    return rows


def _fetch(url: str, digest: str, path: pathlib.Path) -> str:
    if not path.is_file():
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                data = response.read()
        except OSError as error:
            raise DataError(
                f"logiqa: {url} could not be fetched ({error}); put logiqa.jsonl into "
                "--tasks_path."
            ) from error
        _check(data, digest, url)
        atomic.write_bytes(path, data)
    data = path.read_bytes()
    _check(data, digest, path)
    return data.decode("utf-8")


def _check(data: bytes, digest: str, source: Any) -> None:
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise DataError(
            f"logiqa: {source} has SHA-256 {actual[:12]}.., expected {digest[:12]}..; "
            "delete it."
        )


def _read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    rows = []
    for number, row in jsonlines.values(path):
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is no JSON object.")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: holds no rows.")
    return rows
