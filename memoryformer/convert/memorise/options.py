"""What a conversion is told: which parts of which layers, and how they are fitted.

Start at `Options`.
"""

import dataclasses
import math

from memoryformer import config as config_lib
from memoryformer.convert.memorise import fit, fronts
from memoryformer.errors import ConfigError
from memoryformer.model import ModelConfig, mixers, parts
from memoryformer.model.mixers import base
from memoryformer.ops import hashing

PARTS = ("qkv", "output", "ffn")  # in the order of a block
TARGETS = ("layer", "stream")


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the command.

    parts: of `PARTS`, with commas; ffn becomes one memory layer as a whole.  layers: '0,2-4', '' for
    all.  bits: tau, or by part, 'qkv=4,ffn=8'.  tokens: to fit to, each of them once a part.
    mix: of `fronts.MIXES`, or by part, 'ffn=none+hadamard': a part of several mixes is a sum of
    as many memory layers, fitted together.  thresholds: whether inputs are centred.  score: of the layers.
    target: the outputs of the layer as it is, or what brings the residual stream back.
    solver: of `fit.SOLVERS`.  eval_batches: batches that the loss is told on, 0: all text.
    ridges: to choose from, multiples of the mean diagonal, with commas.
    """

    parts: str = "qkv,ffn"
    layers: str = ""
    bits: str = "8"
    tokens: int = 98_304
    mix: str = "none"
    thresholds: bool = True
    score: str = "l1"
    target: str = "layer"
    solver: str = "auto"
    eval_batches: int = 8
    ridges: str = ",".join(f"{ridge:g}" for ridge in fit.RIDGES)

    def __post_init__(self):
        for name in self.parts.split(","):
            config_lib.choose(name, PARTS, "--parts")
        config_lib.choose(self.score, hashing.SCORES, "--score")
        config_lib.choose(self.target, TARGETS, "--target")
        config_lib.choose(self.solver, fit.SOLVERS, "--solver")
        if self.tokens < 1 or self.eval_batches < 0:
            raise ConfigError(
                f"--tokens={self.tokens} must be >= 1, --eval_batches={self.eval_batches} "
                ">= 0."
            )
        for name in PARTS:
            self.bits_of(name)
            self.mixes_of(name)
        self.ridge_values()

    def ridge_values(self) -> tuple[float, ...]:
        """The ridges, the largest first; raises `ConfigError`."""
        try:
            values = {float(word) for word in self.ridges.split(",")}
        except ValueError:
            values = {math.nan}
        if not all(0 < value < math.inf for value in values):
            raise ConfigError(
                f"--ridges={self.ridges}: must be numbers above 0 with commas, such as "
                "0.1,0.01."
            )
        return tuple(sorted(values, reverse=True))

    def mixes_of(self, name: str) -> tuple[str, ...]:
        """The mixes of a part, one for each memory layer; raises `ConfigError`."""
        value = _by_part(self.mix, "none", "--mix")[name]
        mixes = tuple(value.split("+"))
        for mix in mixes:
            config_lib.choose(mix, fronts.MIXES, "--mix")
        if "auto" in mixes[1:] or mixes[0] == "auto" != value:
            raise ConfigError(
                f"--mix={self.mix}: auto chooses the mix of one layer; name those of a sum, "
                "such as none+hadamard."
            )
        return mixes

    def bits_of(self, name: str) -> int:
        """tau of a part; raises `ConfigError` for --bits that say none."""
        value = _by_part(self.bits, "8", "--bits")[name]
        if not value.isdecimal() or not 1 <= int(value) <= 16:
            raise ConfigError(
                f"--bits={self.bits}: must be from 1 to 16, one number or one for each part, "
                "such as qkv=4,ffn=8."
            )
        return int(value)

    def steps(self, model: ModelConfig) -> list[tuple[int, str]]:
        """(layer, part) in order; raises `ConfigError` for what the model has not."""
        if model.recurrence != "none":
            raise ConfigError(
                f"model.recurrence={model.recurrence!r}: only models without one convert."
            )
        if not issubclass(mixers.MIXERS[model.mixer], base.MultiHead):
            raise ConfigError(
                f"model.mixer={model.mixer!r}: only mixers of heads convert, which project "
                "Q, K and V at once."
            )
        wanted = [name for name in PARTS if name in self.parts.split(",")]
        if "output" in wanted and not model.output_projection:
            raise ConfigError("--parts: the model has no W_O, so there is no output.")
        for name in wanted:
            self._check_sizes(name, model)
        steps = [(i, name) for i in self._layers(model) for name in wanted]
        for layer, name in steps:
            kind = getattr(parts.of_layer(model, layer), name).kind
            if kind != "dense":
                raise ConfigError(
                    f"--parts: {name} of layer {layer} is {kind} already."
                )
        return steps

    def _check_sizes(self, name, model):
        bits = self.bits_of(name)
        if model.embed_dim % bits:
            raise ConfigError(
                f"--bits={self.bits}: {bits} bits of {name} do not divide the width "
                f"{model.embed_dim}."
            )
        rows = len(self.mixes_of(name)) * (model.embed_dim // bits << bits)
        if self.tokens < rows:
            raise ConfigError(
                f"--tokens={self.tokens}: fewer than the {rows} rows of the tables of {name}; "
                f"give {4 * rows} or more, or fewer --bits."
            )

    def _layers(self, model):
        if not self.layers:
            return range(model.num_layers)
        try:
            numbers = parts.layer_numbers(self.layers)
        except ValueError:
            raise ConfigError(f"--layers={self.layers}: must be like 0,2-4.") from None
        if numbers[-1] >= model.num_layers:
            raise ConfigError(
                f"--layers={self.layers}: the model has {model.num_layers}, from 0."
            )
        return numbers


def _by_part(text: str, usual: str, flag: str) -> dict[str, str]:
    """Read 'VALUE', 'PART=VALUE,..' or both, the value for all parts first."""
    by_part = dict.fromkeys(PARTS, usual)
    for word in text.split(","):
        key, equals, value = word.rpartition("=")
        if equals:
            by_part[config_lib.choose(key, PARTS, flag)] = value
        else:
            by_part = dict.fromkeys(PARTS, value)
    return by_part
