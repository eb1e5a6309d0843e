"""A trained run, and a dense twin beside it, under noise.

Each setting and seed is a row of FOLDER/results.json as soon as it is measured, and is not measured
again: a command that was stopped goes on. Start at `run`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.cim import noise, plots, tables
from memoryformer.cim import periphery as periphery_lib
from memoryformer.cim.settings import Setting
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError
from memoryformer.evaluation import loss
from memoryformer.files import atomic
from memoryformer.model import codes as codes_lib
from memoryformer.model import implementations, losses, narrow
from memoryformer.notation import Params
from memoryformer.report import drawing
from memoryformer.runs import console, directory, remote
from memoryformer.training import experiment

RESULTS = "results.json"
IDEAL = Setting("ideal", 0.0, random=False)
Row = dict[str, Any]


@functools.lru_cache(maxsize=16)  # settings of one model share it
def make_step(
    model_config: model_lib.ModelConfig, periphery: periphery_lib.Periphery
) -> jax.stages.Wrapped:
    """Compile `(params, seed, batch) -> (nats of each row [B], codes of each layer)`."""

    def step(params, seed, batch):
        model = model_lib.merge(model_config, params)
        periphery_lib.attach(model, periphery, seed)
        codes_lib.ask(model)
        nats = losses.model_nats(model, batch)
        return jnp.sum(nats, axis=-1), codes_lib.taken(model)

    return jax.jit(step)


class Trial:
    """The newest step of a run, and how it does on a part of its validation text.

    Codes are compared with those of the model as it is, on the same tokens: through all layers
    before, whose noise they see too.
    """

    def __init__(self, workdir: str | os.PathLike, num_batches: int):
        workdir = remote.copied(workdir)
        run, self.params, facts = experiment.load(workdir)
        self.model_config = implementations.readable(run.model)
        dataset = run_tokenizer.dataset(
            workdir, run.data, facts, self.model_config.vocab_size
        )
        length = self.model_config.seq_len
        rows = max(1, loss.GROUP_TOKENS // length)
        self._batches = dataset.validation.eval_batches(length, rows)
        self._token_bytes, self._num_batches = dataset.token_bytes, num_batches
        self.data_fingerprint = dataset.fingerprint
        self.fingerprint = model_lib.fingerprint(self.params)
        self._clean: list[Mapping[str, np.ndarray]] = []
        self._code_bits = _code_bits(self.model_config, self.params)

    def measure(self, setting: Setting, seed: int) -> dict[str, Any]:
        """{'bits_per_byte', 'tokens', 'flips': {layer: share of its codes' bits}}."""
        if not self._clean and setting != IDEAL:
            self.measure(IDEAL, 0)
        params = noise.perturb(
            self.model_config, self.params, setting.device, setting.seconds, seed
        )
        params = jax.tree.map(jnp.asarray, params)
        step = make_step(self.model_config, setting.periphery)
        read: list[tuple[Mapping[str, np.ndarray], np.ndarray]] = []

        def eval_step(params, batch):
            nats, codes = step(params, seed, batch)
            read.append(
                (jax.tree.map(np.asarray, codes), np.asarray(batch["segment_ids"]))
            )
            return nats

        values = loss.evaluate(
            eval_step,
            params,
            self._batches,
            self._token_bytes,
            sharding_lib.make("single"),
            num_batches=self._num_batches,
        )
        if setting == IDEAL:
            self._clean = [codes for codes, _ in read]
        return {
            "bits_per_byte": values["val/bits_per_byte"],
            "tokens": values["val/tokens"],
            "flips": flip_rates(self._clean, read, self._code_bits),
        }


def flip_rates(
    clean: Sequence[Mapping[str, np.ndarray]],
    noisy: Sequence[tuple[Mapping[str, np.ndarray], np.ndarray]],
    code_bits: Mapping[str, int],
) -> dict[str, float]:
    """P(bit of a code differs), by layer, over real tokens: {} for a model without tables.

    clean: of each batch, codes [B, L, K]. noisy: the same, and segment_ids [B, L], 0 where
    there is padding. code_bits: tau of each layer. Of codes of another shape, as those of a
    recurrence's chunks are, all count.
    """
    totals: dict[str, list[int]] = {}
    for before, (after, segment_ids) in zip(clean, noisy, strict=True):
        for name, codes in after.items():
            different = np.bitwise_count(before[name] ^ codes)
            keep = np.ones(different.shape[:2], bool)
            if keep.shape == segment_ids.shape:
                keep = segment_ids > 0
            total = totals.setdefault(name, [0, 0])
            total[0] += int(different[keep].sum())
            total[1] += int(keep.sum()) * codes.shape[-1] * code_bits[name]
    return {name: flips / bits for name, (flips, bits) in totals.items()}


def report(
    workdir: str | os.PathLike,
    beside: str | os.PathLike | None,
    settings: Sequence[Setting],
    seeds: int,
    num_batches: int,
    batch: int,
    folder: str | os.PathLike,
) -> None:
    """Measure as `run` does; print the tables, and write table.md and noise.png to `folder`.

    batch: tokens computed together, for the energy.
    """
    rows, trials = run(workdir, beside, settings, seeds, num_batches, folder)
    models = {name: trial.model_config for name, trial in trials.items()}
    text = tables.summary(rows, settings, models, batch)
    for name in models:
        flips = tables.flips(rows, settings, name)
        text += f"\n{name}:\n\n{flips}" if flips else ""
    print(text)
    path = pathlib.Path(folder)
    atomic.write_text(path / "table.md", text)
    with plt.rc_context(drawing.STYLE):
        drawing.save(plots.figure(rows, settings, models, batch), path / "noise.png")


def run(
    workdir: str | os.PathLike,
    beside: str | os.PathLike | None,
    settings: Sequence[Setting],
    seeds: int,
    num_batches: int,
    folder: str | os.PathLike,
) -> tuple[list[Row], dict[str, Trial]]:
    """Measure every setting for every seed of the run and of the one beside it.

    Returns the rows, with 'model' ('run' or 'beside'), 'kind', 'level', 'seed' and what
    `Trial.measure` gives; and the runs. Raises `ConfigError` for a twin on other data.
    """
    trials = {"run": Trial(workdir, num_batches)}
    if beside is not None:
        trials["beside"] = Trial(beside, num_batches)
        if trials["beside"].data_fingerprint != trials["run"].data_fingerprint:
            raise ConfigError(
                f"--beside={beside}: was trained on other data than --workdir={workdir}, "
                "and bits per byte of different text say nothing; name a twin on the same."
            )
    path = drawing.folder(folder) / RESULTS  # refused before anything is measured
    known = _read(path)
    todo = [
        (name, setting, seed)
        for setting in settings
        for name in trials
        for seed in range(seeds if setting.random else 1)
    ]
    rows, printer, started, new = [], console.ProgressPrinter(), time.monotonic(), 0
    missing = sum(
        _key(trials[n], s, seed, num_batches) not in known for n, s, seed in todo
    )
    for name, setting, seed in todo:
        key = _key(trials[name], setting, seed, num_batches)
        if key not in known:
            known[key] = trials[name].measure(setting, seed)
            atomic.write_json(path, known)
            new += 1
            spent = time.monotonic() - started
            eta = console.short_time(spent / new * (missing - new))
            bits = f"{known[key]['bits_per_byte']:.4f}"
            figures = [(name, f"{setting.kind} {setting.level:g} seed {seed}")]
            figures += [("bits/byte", bits), ("eta", eta)]
            printer.update(console.progress_line(new, missing, figures))
        row = {
            "model": name,
            "kind": setting.kind,
            "level": setting.level,
            "seed": seed,
        }
        rows.append(row | known[key])
    printer.close()
    return rows, trials


def _code_bits(model_config: model_lib.ModelConfig, params: Params) -> dict[str, int]:
    """{'blocks.0.mixer.qkv': tau}."""
    found = {}

    def look(role, path, leaf):
        if role == "tables":
            found[path.rpartition(".")[0]] = leaf.shape[1].bit_length() - 1
        return leaf

    narrow.map_weights(model_config, params, look)
    return found


def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    return directory.read_json(path) if path.exists() else {}


def _key(trial: Trial, setting: Setting, seed: int, num_batches: int) -> str:
    """Equal for what gives the same row."""
    parts = dataclasses.asdict(setting) | {
        "device": [type(setting.device).__name__, dataclasses.asdict(setting.device)],
        "model": trial.fingerprint,
        "config": dataclasses.asdict(trial.model_config),
        "seed": seed,
        "num_batches": num_batches,
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
