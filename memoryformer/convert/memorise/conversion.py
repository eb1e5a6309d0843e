"""A whole model, converted block after block.

Each part is fitted to the activations of the model as it is converted so far. What is fitted lies
in DIR/memorise until the run is written, so a conversion that was stopped goes on:

    DIR/memorise/settings.json     what is converted, and how
    DIR/memorise/0.ffn.npz, .json  the parameters of a part, and what is told of it
    DIR/memorise.json              the table at the end

Start at `memorise`.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memoryformer import model as model_lib
from memoryformer.convert import folders, transfer, trees
from memoryformer.convert.memorise import activations, fit, fronts, report
from memoryformer.convert.memorise import source as source_lib
from memoryformer.convert.memorise.activations import Subject
from memoryformer.convert.memorise.batches import Batches
from memoryformer.convert.memorise.observations import Observations
from memoryformer.convert.memorise.options import Options
from memoryformer.data.progress import Progress
from memoryformer.errors import ConfigError
from memoryformer.files import atomic
from memoryformer.model import parts
from memoryformer.notation import Params
from memoryformer.runs import steps as run_steps

FOLDER = "memorise"
SAMPLE_TOKENS = 16_384  # that thresholds and mixes are taken from


def memorise(
    origin: str | os.PathLike,
    directory: str | os.PathLike,
    options: Options,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Convert the model in `origin` and make the result step 0 of a run in `directory`.

    Goes on with what `directory` holds of the same conversion. Returns what the table at the
    end tells. Raises `ConfigError` for options that do not fit the model or the folder,
    `DataError` for text that is too short.
    """
    target = _check_target(directory)
    source = source_lib.load(pathlib.Path(origin), config)
    steps = options.steps(source.run.model)
    batches = Batches(source, options)
    teacher, subject = source.subject, source_lib.prepared(source.subject, options)
    folder = target / FOLDER
    _check_settings(folder, _settings(source, options))
    before = _loss(subject, batches, "loss before")
    rows = []
    for number, (layer, name) in enumerate(steps, 1):
        title = f"{number}/{len(steps)} layer {layer} {name}"
        path = folder / f"{layer}.{name}"
        if not _file(path, "json").exists():
            reference = teacher if options.target == "stream" else None
            begun = time.monotonic()
            what = (subject, reference, layer, name)
            made = _fitted(*what, batches, options, folder, title)
            converted = _installed(subject, layer, name, *made[:2])
            loss = _loss(converted, batches, f"{title}: loss")
            told = made[2] | {"loss": loss, "seconds": time.monotonic() - begun}
            told |= {"part": dataclasses.asdict(made[0])}
            _keep(path, made[1], told)
        part, arrays, told = _kept(path)
        subject = _installed(subject, layer, name, part, arrays)
        rows.append(told)
        print(report.line(title, told), flush=True)
    trees.check(subject.config, subject.params, target)
    summary = report.summary(source.subject.config, subject.config, before, rows)
    _write_run(target, source, subject, summary)
    return summary


def _fitted(
    subject: Subject,
    reference: Subject | None,
    layer: int,
    name: str,
    batches: Batches,
    options: Options,
    folder: pathlib.Path,
    title: str,
) -> tuple[parts.Part, dict[str, np.ndarray], dict[str, Any]]:
    """Fit a part: what it is now, its parameters by path, what is told of it."""

    def observe(batch):
        return activations.observe(subject, layer, name, batch, reference)

    bits, config = options.bits_of(name), subject.config
    sample = _sample(observe, batches)
    hashes = [
        fronts.choose(
            *sample,
            code_bits=bits,
            mix=mix,
            thresholds=options.thresholds,
            score=config.score,
            temperature=config.projection_options.temperature,
            seed=seed,
        )
        for seed, mix in enumerate(options.mixes_of(name))
    ]
    held_out = [fronts.observe(hashes, *observe(batch)) for batch in batches.others()]
    progress = Progress(title)
    progress.start("reading", batches.count * batches.rows, "rows")

    solved = 0  # iterations of the last ridge, if they are counted

    def solving(iteration):
        nonlocal solved
        solved = iteration
        if iteration == 1:
            progress.start("solving, at most", fit.MAX_ITERATIONS, "iterations")
        progress.update(iteration)

    result = fit.fit_tables(
        (fronts.observe(hashes, *observe(b)) for b in batches.fitted(progress)),
        Observations(*map(np.concatenate, zip(*held_out, strict=True))),
        1 << bits,
        ridges=options.ridge_values(),
        solver=options.solver,
        folder=str(folder),
        told=solving,
    )
    if solved:
        progress.finish(solved)
    kind = "memory_block" if name == "ffn" else "memory"
    mix = "+".join(one.mix for one in hashes)
    part = parts.Part(kind, bits, mix, options.thresholds)
    told = dataclasses.asdict(result) | {"layer": layer, "name": name}
    del told["tables"], told["bias"], told["unexplained_by_ridge"]
    features = (3, config.embed_dim) if name == "qkv" else (config.embed_dim,)
    return part, _parameters(result, hashes, features, config), told


def _parameters(
    result: fit.Fit,
    hashes: Sequence[fronts.Hash],
    features: tuple[int, ...],
    config: model_lib.ModelConfig,
) -> dict[str, np.ndarray]:
    """The parameters of a memory layer, or of a sum of them, by path."""
    arrays = {}
    every = np.split(result.tables, len(hashes))
    for number, (one, tables) in enumerate(zip(hashes, every, strict=True)):
        path = f"terms.{number}." if len(hashes) > 1 else ""
        arrays[path + "tables"] = tables.reshape(*tables.shape[:2], *features)
        if number == 0:
            arrays[path + "bias"] = result.bias.reshape(features)
        for key, value in one.arrays.items():
            arrays[f"{path}front.{key}"] = value
        if config.score == "learned":  # where training begins, and what was fitted with
            beta = 2 / config.projection_options.temperature
            arrays |= {path + "beta": np.array(beta), path + "gamma": np.ones(())}
    return {key: value.astype(np.float32) for key, value in arrays.items()}


def _sample(observe, batches):
    """Inputs and outputs of the first tokens to be fitted to."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in batches.fitted():
        seen.append(observe(batch))
        if sum(len(inputs) for inputs, _ in seen) >= SAMPLE_TOKENS:
            break
    return [np.concatenate(arrays) for arrays in zip(*seen, strict=True)]


def _installed(
    subject: Subject,
    layer: int,
    name: str,
    part: parts.Part,
    arrays: Mapping[str, np.ndarray],
) -> Subject:
    """The model with a part of a layer replaced."""
    config, params = subject.config, dict[str, Any](subject.params)
    blocks = {i: parts.of_layer(config, i) for i in range(config.num_layers)}
    blocks[layer] = blocks[layer]._replace(**{name: part})
    config = parts.mixed(config, blocks)
    module = trees.unflatten(arrays)
    block = dict(params["blocks"][str(layer)])
    if name == "ffn":
        block["ffn"] = module
    else:
        place = {"qkv": "qkv", "output": "out"}[name]
        block["mixer"] = {**block["mixer"], place: module}
    layers = {**params["blocks"], str(layer): block}
    return Subject(config, {**params, "blocks": layers})


def _loss(subject: Subject, batches: Batches, title: str) -> float:
    """Nats per token of the validation batches."""
    progress, pairs = Progress(title), []
    progress.start("evaluating", len(batches.validation), "batches")
    for i, batch in enumerate(batches.validation):
        pairs.append(activations.nats(subject, batch))
        progress.update(i + 1)
    nats, weight = map(sum, zip(*pairs, strict=True))
    return nats / weight


def _settings(source: source_lib.Source, options: Options) -> dict[str, Any]:
    return {
        "model": model_lib.fingerprint(source.subject.params),
        "data": source.dataset.fingerprint,
        "options": dataclasses.asdict(options),
    }


def _check_target(directory: str | os.PathLike) -> pathlib.Path:
    """A new or empty folder, or one that holds a conversion that was stopped."""
    path = pathlib.Path(directory)
    if (path / run_steps.FOLDER).exists():
        raise ConfigError(f"{path}: holds checkpoints; name a new one.")
    if (path / FOLDER / "settings.json").is_file():
        return path
    return folders.check_free(path)


def _check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if not path.is_file():
        atomic.write_json(path, settings, indent=2)
    elif folders.read_object(path) != settings:
        raise ConfigError(
            f"{folder}: holds another conversion that was stopped, of another model, text or "
            "options; name a new folder, or remove it."
        )


def _file(path: pathlib.Path, kind: str) -> pathlib.Path:
    return path.with_name(f"{path.name}.{kind}")


def _keep(path: pathlib.Path, arrays: dict[str, np.ndarray], told: dict) -> None:
    """Write a part; the .json comes last and says that it is whole."""
    with atomic.replacing(_file(path, "npz")) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    atomic.write_json(_file(path, "json"), told, indent=2)


def _kept(path: pathlib.Path) -> tuple[parts.Part, dict[str, np.ndarray], dict]:
    told = folders.read_object(_file(path, "json"))
    with np.load(_file(path, "npz")) as file:
        arrays = {key: file[key] for key in file.files}
    return parts.Part(**told["part"]), arrays, told


def _write_run(
    target: pathlib.Path, source: source_lib.Source, subject: Subject, summary: dict
) -> None:
    """Make the model the step 0 of a run, and take away what was kept."""
    run = dataclasses.replace(source.run, model=subject.config)
    params: Params = subject.params
    transfer.begin_run(
        target, run, params, source.dataset.fingerprint, source.dataset.tokenizer
    )
    atomic.write_json(target / "memorise.json", summary, indent=2)
    shutil.rmtree(target / FOLDER)
