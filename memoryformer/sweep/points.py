"""What a sweep consists of: overrides, resolved configs, directories. Start at `expand`."""

import dataclasses
import fnmatch
import hashlib
import inspect
import itertools
import json
import pathlib
import re
import shlex
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.files import paths
from memoryformer.runs import compatibility, old_configs
from memoryformer.sweep import kinds, old_names
from memoryformer.sweep.kinds import SEEDS
from memoryformer.training import experiment

PREFIX = "sweep_"
LABEL = "label"
DEFAULT_METRICS = ("val/bits_per_byte", "val/loss", "train/tokens_per_second")
# Fields that change no number and yet name another experiment: what is measured, where text
# and teacher lie and what reads the text, the only names that they have here.
NAMING = ("eval.*", "data.path", "data.tokenizer", "data.end_token", "train.teacher")


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    index: int
    overrides: Mapping[str, Any]  # of the config file's, without the label
    # Shared by points of one config but for the seed; '' if only that differs.
    label: str
    run: kinds.Run
    workdir: pathlib.Path

    @property
    def variant(self) -> str:
        """The name of what the point shares with those of other seeds, and no other has."""
        return self.label or "base"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The points of one or several sweeps of a config file, multiplied."""

    config: str  # FILE[:ARGUMENT]
    names: tuple[str, ...]
    base: Mapping[str, Any]  # overrides from the command line
    directory: pathlib.Path
    metrics: tuple[str, ...]
    points: tuple[Point, ...]
    titles: tuple[str, ...] = ()  # first lines of the sweeps' docstrings


def expand(
    config: str,
    names: Sequence[str],
    root: pathlib.Path | str,
    base: Mapping[str, Any] | None = None,
) -> Sweep:
    """Resolve every point of the sweeps `names` of a config file.

    Args:
      config: FILE[:ARGUMENT].
      names: of `sweep_NAME` generators; several are multiplied.
      root: where the sweep's directory goes.
      base: dotted overrides that apply to every point.

    Raises `ConfigError` for an unknown sweep, a point that cannot be, a field that two
    sweeps set, and for two points that are the same run.
    """
    module, argument = config_lib.load_module(config)
    base = dict(base or {})
    with config_lib.explained(config):
        chosen = [_overrides(module, name, argument) for name in names]
    stem = pathlib.Path(config.partition(":")[0]).stem
    folder = "-".join(filter(None, (stem, argument)))
    root = paths.workdir(root, "--root")
    directory = root / _clean(folder) / _clean("-".join(names))
    points: list[Point] = []
    for index, parts in enumerate(itertools.product(*chosen)):
        overrides, label = _merged(parts, names)
        where = (
            f"sweep {','.join(names)}, point {index} ({label or describe(overrides)})"
        )
        points.append(_point(config, base, overrides, label, index, directory, where))
    if not points:
        raise ConfigError(f"--sweep={','.join(names)}: has no points.")
    _refuse_twins(points)
    with config_lib.explained(config):
        metrics = tuple(getattr(module, "metrics", lambda: DEFAULT_METRICS)())
    apart = tuple(_named_apart(points))
    titles = tuple(_first_line(dict(_all(module))[name]).rstrip(".") for name in names)
    return Sweep(config, tuple(names), base, directory, metrics, apart, titles)


def bookkeeping() -> set[str]:
    """Fields in which two runs of one experiment may differ."""
    return {
        key
        for key in experiment.may_change()
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in NAMING)
    }


def identity(point: Point, without: Collection[str] = SEEDS) -> str:
    """Return, as text, the resolved config of a point but for some fields.

    Bookkeeping counts only where the sweep itself is over it. Equal texts are what a
    table calls seeds of one variant, whatever their labels say.
    """
    flat = config_lib.flatten(compatibility.plain(kinds.as_dict(point.run)))
    return _text(flat, point.overrides, without)


def _named_apart(points: Sequence[Point]) -> list[Point]:
    """Give the seeds of one config one label, and different configs different labels."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(identity(point), []).append(point)
    variants = [group[0].variant for group in groups.values()]
    apart: dict[int, Point] = {}
    for group, variant in zip(groups.values(), variants, strict=True):
        first = group[0]
        label = first.label
        if variants.count(variant) > 1:
            fields = {k: v for k, v in first.overrides.items() if k not in SEEDS}
            full = [f"{key}={value!r}" for key, value in fields.items()]
            label = ", ".join(filter(None, (label, *full)))
        apart |= {p.index: dataclasses.replace(p, label=label) for p in group}
    return [apart[point.index] for point in points]


def available(config: str) -> dict[str, str]:
    """Return the sweeps of a config file: {name: first line of its docstring}."""
    module, _ = config_lib.load_module(config)
    return {name: _first_line(function) for name, function in _all(module)}


def _first_line(function: Any) -> str:
    return (inspect.getdoc(function) or "").split("\n")[0]


def describe(overrides: Mapping[str, Any]) -> str:
    """'learning_rate=0.003, seed=1': the fields by their last names."""
    return ", ".join(f"{k.split('.')[-1]}={_value(v)}" for k, v in overrides.items())


def command(sweep: Sweep, point: Point) -> str:
    """Return the line of a shell that trains a point."""
    overrides = dict(sweep.base) | dict(point.overrides)
    words = ["python", "-m", kinds.command(point.run), f"--config={sweep.config}"]
    words += [f"--workdir={point.workdir}"]
    words += [f"--config.{key}={value}" for key, value in overrides.items()]
    return shlex.join(words)


def _all(module: types.ModuleType) -> list[tuple[str, Any]]:
    return [
        (name.removeprefix(PREFIX), function)
        for name, function in vars(module).items()
        if name.startswith(PREFIX) and callable(function)
    ]


def _overrides(
    module: types.ModuleType, name: str, argument: str
) -> list[dict[str, Any]]:
    known = dict(_all(module))
    if not known:
        raise ConfigError(f"--sweep={name}: the config file defines no {PREFIX}NAME().")
    generator = known[config_lib.choose(name, known, "--sweep")]
    takes = bool(inspect.signature(generator).parameters)
    return [dict(point) for point in (generator(argument) if takes else generator())]


def _merged(
    parts: Iterable[Mapping[str, Any]], names: Sequence[str]
) -> tuple[dict[str, Any], str]:
    overrides: dict[str, Any] = {}
    labels = []
    for part, name in zip(parts, names, strict=True):
        part = dict(part)
        label = " ".join(str(part.pop(LABEL, "")).split())
        if both := overrides.keys() & part.keys():
            raise ConfigError(
                f"--sweep={','.join(names)}: {name!r} sets {min(both)}, and so does "
                "another one of them; a product needs sweeps over different fields."
            )
        without_seed = {k: v for k, v in part.items() if k not in SEEDS}
        labels.append(label or describe(without_seed))
        overrides |= part
    return overrides, ", ".join(filter(None, labels))


def _point(config, base, overrides, label, index, directory, where):
    try:
        loaded = config_lib.load(config)
        known = config_lib.flatten(loaded)
        for key in base | overrides:
            if key not in known:
                raise ConfigError(f"{key}: {old_configs.why_unknown(key, known)}")
        # At once: a point that chooses a mixer must keep the options that `base` gives it.
        config_lib.override(loaded, base | overrides)
        run = kinds.resolve(loaded)
    except (TypeError, ValueError) as error:  # ConfigError is one
        raise ConfigError(f"{where}: {error}") from error
    seed = "".join(f"seed={overrides[key]}" for key in SEEDS if key in overrides)
    slug = _clean(", ".join(filter(None, (label[:50], seed)))) or "base"
    workdir = _directory(directory, slug, _digests(run, overrides))
    return Point(index, overrides, label, run, workdir)


def _directory(
    directory: pathlib.Path, slug: str, digests: Sequence[str]
) -> pathlib.Path:
    """The point's own directory, or that of another sweep which has trained the same."""
    named = directory / f"{slug}-{digests[0]}"
    twins = [p for d in digests for p in sorted(directory.parent.glob(f"*/*-{d}"))]
    return twins[0] if twins and not named.exists() else named


def _digests(run: kinds.Run, overrides: Mapping[str, Any]) -> list[str]:
    """What names a run's directory, and what named it in older versions."""
    flat = config_lib.flatten(compatibility.plain(kinds.as_dict(run)))
    text = _text(flat, overrides)
    fields = json.loads(text)
    older = [old_names.last_spelling(fields)]
    if not kinds.is_task(run):
        older += old_names.spellings(fields)
    texts = [text, *(json.dumps(each, sort_keys=True) for each in older)]
    return [hashlib.sha256(t.encode()).hexdigest()[:8] for t in texts]


def _text(
    flat: Mapping[str, Any],
    overrides: Mapping[str, Any],
    without: Collection[str] = (),
) -> str:
    unnamed = (bookkeeping() - overrides.keys()) | set(without)
    named = {key: value for key, value in flat.items() if key not in unnamed}
    return json.dumps(old_names.without_later_fields(named), sort_keys=True)


def _refuse_twins(points: Sequence[Point]) -> None:
    seen: dict[str, Point] = {}
    for point in points:
        twin = seen.setdefault(point.workdir.name[-8:], point)
        if twin is not point:
            raise ConfigError(
                f"points {twin.index} and {point.index} are the same run: "
                f"{dict(twin.overrides)} and {dict(point.overrides)}; leave one out."
            )


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _clean(text: str) -> str:
    """A file name that needs no quoting in a shell."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_")
