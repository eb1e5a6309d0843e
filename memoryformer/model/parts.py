"""Which parts of which blocks are memory layers: the option `parts` of projection='mixed'.

    parts = 'ffn=memory_block,bits=8,mix=hadamard,thresholds; qkv@0,2-4=memory'

    part      what it is                            kinds
    qkv       what a mixer projects out of D        dense | memory
    output    W_O, back to D                        dense | memory
    ffn       the feed-forward layer                dense | memory, the two layers of the paper |
                                                    memory_block, one layer D -> D

A clause is PART[@LAYERS]=KIND[,OPTION..]; clauses are parted by `;`, and a later one wins. Options
of a memory layer: bits=TAU, mix=none|hadamard|orthogonal|grouped, thresholds (see `model.front`).
Several mixes, mix=none+hadamard, are a sum of as many memory layers (`model.memory_sum`).
What no clause names is dense. So a model may be half dense and half memory.
Start at `of_layer`.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.model import front

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig

KINDS = {
    "qkv": ("dense", "memory"),
    "output": ("dense", "memory"),
    "ffn": ("dense", "memory", "memory_block"),
}
_FIELD = "model.projection_options.parts"
_EXAMPLE = "such as 'ffn@0-2=memory_block,bits=8,mix=hadamard,thresholds'"


@dataclasses.dataclass(frozen=True)
class Part:
    """What a part is; the rest is said of memory layers.

    code_bits: tau.  mix, thresholds: what is done before they hash, see `model.front`; of a sum
    the mix of each layer, with `+` between them.
    """

    kind: str
    code_bits: int
    mix: str = "none"
    thresholds: bool = False

    @property
    def mixes(self) -> tuple[str, ...]:
        """The mix of each layer of the sum; one of a single layer."""
        return tuple(self.mix.split("+"))


class Parts(NamedTuple):
    """The parts of one block."""

    qkv: Part
    output: Part
    ffn: Part


def of_layer(config: "ModelConfig", layer: int) -> Parts:
    """Return what the parts of block `layer` are."""
    chosen = dict.fromkeys(KINDS, usual(config))
    for name, layers, fields in _clauses(config):
        if layer in layers:
            chosen[name] = dataclasses.replace(usual(config), **fields)
    return Parts(**chosen)


def usual(config: "ModelConfig") -> Part:
    """Return what a part is that nothing is said of."""
    kind = "memory" if config.projection == "memory" else "dense"
    return Part(kind, config.code_bits)


def has_tables(config: "ModelConfig") -> bool:
    """Whether anything in the model is a memory layer."""
    return config.projection == "memory" or any(
        name_of_part != "output" or config.output_projection
        for layer in range(config.num_layers)
        for name_of_part, part in of_layer(config, layer)._asdict().items()
        if part.kind != "dense"
    )


def check(config: "ModelConfig") -> None:
    """Raise `ConfigError` for a text that says nothing, or what the model cannot be."""
    text = _text(config)
    for name, layers, fields in _clauses(config):
        if name == "output" and not config.output_projection:
            raise ConfigError(
                f"{_FIELD}={text!r}: names output, but the model has no W_O "
                "(model.output_projection=False)."
            )
        if layers[-1] >= config.num_layers:
            raise ConfigError(
                f"{_FIELD}={text!r}: names layer {layers[-1]}, but "
                f"model.num_layers={config.num_layers} and the first is 0."
            )
        kind, bits = fields["kind"], fields.get("code_bits", config.code_bits)
        if kind == "dense":
            continue
        wider = (
            config.projection_options.extra_bits
            if (name, kind) == ("ffn", "memory")
            else 0
        )
        if not 1 <= bits <= 16 - wider or wider < 0:
            raise ConfigError(
                f"{_FIELD}={text!r}: {bits} bits of {name}: must be from 1 to "
                f"{16 - wider}."
            )
        if config.embed_dim % bits:
            raise ConfigError(
                f"{_FIELD}={text!r}: {bits} bits of {name} do not divide "
                f"model.embed_dim={config.embed_dim}."
            )


def check_one_row(config: "ModelConfig", what: str) -> None:
    """Raise `ConfigError` for a model that reads two rows of each table, which `what` cannot."""
    rows = getattr(config.projection_options, "rows_read", 1)
    if rows > 1:
        raise ConfigError(
            f"model.projection_options.rows_read={rows}: {what} knows layers that read one "
            "row of each table; use a model with rows_read=1."
        )


def _clauses(config: "ModelConfig") -> list[tuple[str, list[int], dict]]:
    """[(part, layers in order, fields of a `Part`)]; raises `ConfigError`."""
    return [_clause(c, config) for c in _text(config).split(";") if c.strip()]


def _text(config):
    return config.projection_options.parts if config.projection == "mixed" else ""


def _clause(clause, config):
    def wrong(reason):
        return ConfigError(f"{_FIELD}={_text(config)!r}: {clause.strip()!r} {reason}")

    names, equals, words = clause.partition("=")
    name, at, layers = (word.strip() for word in names.partition("@"))
    kind, *options = (word.strip() for word in words.split(","))
    if not equals:
        raise wrong(f"is no PART=KIND, {_EXAMPLE}.")
    config_lib.choose(name, KINDS, f"{_FIELD}: part")
    config_lib.choose(kind, KINDS[name], f"{_FIELD}: kind of {name}")
    fields = {"kind": kind}
    for option in options:
        key, _, value = option.partition("=")
        if key == "bits" and value.isdecimal():
            fields["code_bits"] = int(value)
        elif key == "mix":
            for mix in value.split("+"):
                config_lib.choose(mix, front.MIXES, f"{_FIELD}: mix")
            fields["mix"] = value
        elif option == "thresholds":
            fields["thresholds"] = True
        else:
            raise wrong(
                f"has the option {option!r}: not bits=N, mix=NAME or thresholds."
            )
    if kind == "dense" and options:
        raise wrong("is dense and has options, which are of memory layers.")
    if not at:
        return name, list(range(config.num_layers)), fields
    try:
        return name, layer_numbers(layers), fields
    except ValueError:
        raise wrong(f"names no layers after the @, {_EXAMPLE}.") from None


def mixed(config: "ModelConfig", blocks: Mapping[int, Parts]) -> "ModelConfig":
    """Return the config of a model whose layers have these parts, the others dense ones."""
    options = dataclasses.asdict(config.projection_options)
    options |= {"parts": as_text(blocks, config)}
    return dataclasses.replace(config, projection="mixed", projection_options=options)


def first_layers(config: "ModelConfig", count: int) -> "ModelConfig":
    """Return the config of a model of the first `count` layers."""
    options = config.projection_options
    if config.projection == "mixed":
        blocks = {i: of_layer(config, i) for i in range(min(count, config.num_layers))}
        options = dataclasses.replace(options, parts=as_text(blocks, config))
    return dataclasses.replace(config, num_layers=count, projection_options=options)


def as_text(blocks: Mapping[int, Parts], config: "ModelConfig") -> str:
    """Say these parts of these layers; what is dense is left out."""
    layers: dict[tuple[str, Part], list[int]] = {}
    for layer, block in sorted(blocks.items()):
        for name, part in block._asdict().items():
            if part.kind != "dense" and (name != "output" or config.output_projection):
                layers.setdefault((name, part), []).append(layer)
    return "; ".join(_said(*key, numbers) for key, numbers in layers.items())


def _said(name, part, numbers):
    words = [part.kind, f"bits={part.code_bits}"]
    words += [f"mix={part.mix}"] * (part.mix != "none")
    words += ["thresholds"] * part.thresholds
    return f"{name}@{_ranges(numbers)}={','.join(words)}"


def _ranges(numbers):
    """[0, 2, 3, 4] -> '0,2-4'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def layer_numbers(text: str) -> list[int]:
    """Read '0,2-4' as [0, 2, 3, 4]; raises ValueError for another text."""
    numbers: set[int] = set()
    for word in text.split(","):
        first, _, last = word.partition("-")
        bounds = int(first), int(last or first)
        if not 0 <= bounds[0] <= bounds[1] < 1 << 16:
            raise ValueError(f"{word!r}: no layers")
        numbers |= set(range(bounds[0], bounds[1] + 1))
    return sorted(numbers)
