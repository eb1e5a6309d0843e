"""What every sequence mixer is: one interface for training, prefill and decoding.

    y, state = mixer(x, seq, state)     x [B, L, D], any L >= 1

Without a state the L tokens are whole rows (training); with one they continue what the state
has seen, L = 1 decodes and anything between is chunked prefill. There is no mask, mode or
decode argument: what may be seen follows from `SeqInfo`.

A new mixer is a `SequenceMixer` in a file of its own, made as `Mixer(config, project, rngs=rngs,
layer=i)`, where `project(in_features, features, output=False)` makes the block's projections,
memory or dense; and a line in `mixers.MIXERS`. Its options, costs, examples and its row of the
table in docs/mixers.md are its class attributes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.model import token_rows as token_rows_lib
from memoryformer.notation import Activations, Array, Float, Int, Params
from memoryformer.ops import collectives, remat, rotary

if TYPE_CHECKING:
    from memoryformer.model.config import ModelConfig

OPTIONS = "model.mixer_options"

State = Any  # a pytree of arrays of static shape
Project = Callable[..., nnx.Module]


class SeqInfo(NamedTuple):
    """Where each token stands; shared by all layers.

    positions: position inside the token's document.
    segment_ids: which document of the row; 0 is padding.
    tokens: for mixers with rows of tokens (`model.token_rows`); else None.
    """

    positions: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    tokens: Int[Array, "B L"] | None = None

    @classmethod
    def of_tokens(cls, tokens: Int[Array, "B L"]) -> "SeqInfo":
        """Every row one document."""
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = jnp.broadcast_to(positions[None], tokens.shape)
        return cls(positions, jnp.ones_like(positions))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a mixer costs without its projections, over one sequence or per sequence kept.

    An element of a running sum costs one multiply-add to write and one to read. Denominators,
    softmaxes and rotary positions are not counted.
    """

    multiply_adds: int  # over one sequence
    state_values: int  # kept to decode at that length
    parameters: int = 0
    shared_parameters: int = 0  # of all layers together
    state_value_bytes: int = 0  # 4 for sums, kept in float32; 0: as values are stored
    sums: int = 0  # values kept in float32 beside those

    def state_bytes(self, value_bytes: int) -> int:
        """Bytes of the state, where values are stored in so many."""
        stored = (self.state_value_bytes or value_bytes) * self.state_values
        return stored + 4 * self.sums


@dataclasses.dataclass(frozen=True)
class About:
    """A mixer's row in the table of docs/mixers.md (`mixers.table`)."""

    reads: str  # what a token reads
    multiply_adds: str  # per token
    state: str  # values per head that decoding keeps
    positions: str


class SequenceMixer(nnx.Module):
    """The interface, and all that the project asks of a mixer: `y, state = mixer(x, seq, state)`.

    Options: frozen dataclass of `model.mixer_options`; each with a default.
    EXAMPLES: {name: options}, what `presets.with_mixer` knows by that name.
    ABOUT: its row of the table of mixers.
    LOOKS_AHEAD: whether it has a form with causal=False.
    TAKES_ANY_ORDER: whether tokens of a row may lie in any order over a `sequence` axis; sums
        over the past need consecutive parts.
    HAS_SLOTS: whether it has a memory that `packed` reads, for `evaluation.slots`.
    HAS_TOKEN_ROWS: whether it reads `model.token_rows` where a config has them.
    """

    Options: ClassVar[type] = config_lib.NoOptions
    EXAMPLES: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    ABOUT: ClassVar[About]
    LOOKS_AHEAD: ClassVar[bool] = False
    TAKES_ANY_ORDER: ClassVar[bool] = False
    HAS_SLOTS: ClassVar[bool] = False
    HAS_TOKEN_ROWS: ClassVar[bool] = False

    @classmethod
    def streams(cls, config: "ModelConfig") -> bool:
        """Whether a memory goes through depth: a layer's state is what the one before returns."""
        return False

    @classmethod
    def num_projections(cls, config: "ModelConfig") -> int:
        """Return how many projections of D to D are made of x by one hash."""
        return 3

    def __call__(
        self, x: Activations, seq: SeqInfo, state: State | None = None
    ) -> tuple[Activations, State | None]:
        """Mix along the sequence: [B, L, D] -> [B, L, D] and the state after it."""
        raise NotImplementedError

    def init_state(self, batch_size: int, max_len: int, dtype: jnp.dtype) -> State:
        """Return the state that has seen nothing and may see `max_len` tokens."""
        raise NotImplementedError

    @classmethod
    def of_layer(cls, config: "ModelConfig", layer: int) -> "ModelConfig":
        """Return the config of a model whose layers are all like this one."""
        return config

    @classmethod
    def projections(cls, config: "ModelConfig") -> dict[str, tuple[int, int]]:
        """Return {name: (inputs, outputs)} of what `project` makes in one block."""
        width = config.embed_dim
        layers = {"qkv": (width, cls.num_projections(config) * width)}
        return layers | ({"out": (width, width)} if config.output_projection else {})

    @classmethod
    def cost(cls, config: "ModelConfig", length: int) -> Cost:
        """Count what mixing `length` tokens costs, and a state of so many."""
        raise NotImplementedError

    @classmethod
    def check(cls, config: "ModelConfig") -> None:
        """Raise `ConfigError` for a model that the mixer cannot be in."""

    @classmethod
    def redraw(
        cls, config: "ModelConfig", fixed: Params, seed: Array | int, step: Array
    ) -> Params:
        """Return the parameters that are not trained, as batch `step` of a run needs them.

        fixed: those in use so far, of all layers. seed, step: of the run; may be traced.
        """
        return fixed

    @classmethod
    def check_sequence(cls, config: "ModelConfig") -> None:
        """Raise `ConfigError` if rows cannot be split over devices of a `sequence` axis."""
        if not config.causal:
            raise ConfigError(
                f"mesh: mixer={config.mixer!r} with model.causal=False sums over whole rows "
                "and cannot run over a 'sequence' axis: use softmax, or no such axis."
            )

    @classmethod
    def max_length(cls, config: "ModelConfig") -> int:
        """Return the most tokens that it has positions for; 0: no limit."""
        return 0


@dataclasses.dataclass(frozen=True)
class PrefixOptions:
    """What every mixer that sums over the past (`ops.prefix`) can be told."""

    prefix_chunk: int = config_lib.field(
        "rounding", 64, doc="Tokens per matrix product of the sums."
    )

    def __post_init__(self):
        at_least(self, 1, "prefix_chunk")


class MultiHead(SequenceMixer):
    """Three projections of D into H heads of width E, sharing one hash, and one back.

    Heads may be a device's share: nothing here or in a subclass mixes them.
    """

    token_rows: token_rows_lib.TokenRows | None = None

    def __init__(
        self,
        config: "ModelConfig",
        project: Project,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        self.head_dim, self.num_heads = config.head_dim, config.num_heads
        width = config.embed_dim
        self.qkv = project(width, (self.num_projections(config), width))
        needs_out = config.output_projection
        self.out = project(width, width, output=True) if needs_out else None
        if rngs is not None:
            count = self.num_projections(config)
            self.token_rows = token_rows_lib.make(config, count, rngs=rngs)

    @property
    def local_heads(self) -> int:
        """This device's share of the heads."""
        return self.num_heads // collectives.axis_size(collectives.MODEL_AXIS)

    def split(self, x: Activations, seq: SeqInfo) -> tuple[Array, ...]:
        """[B, L, D] -> three of [B, L, H, E], or as many as `num_projections`."""
        qkv = self.qkv(x)  # [B, L, 3, D]
        if self.token_rows is not None:
            qkv = qkv + self.token_rows(seq.tokens)
        qkv = qkv.reshape(*qkv.shape[:3], -1, self.head_dim)
        return tuple(qkv[:, :, i] for i in range(qkv.shape[2]))

    def join(self, y: Float[Array, "B L H E"], dtype: jnp.dtype) -> Activations:
        """[B, L, H, E], what the heads read, -> [B, L, D]."""
        return self._project_back(remat.name(y.astype(dtype), "attended"))

    def join_kept(self, y: Float[Array, "B L H E"], dtype: jnp.dtype) -> Activations:
        """The same of what is marked as read already (`ops.ring`): it is not kept twice."""
        return self._project_back(y.astype(dtype))

    def _project_back(self, y):
        y = y.reshape(*y.shape[:2], -1)
        return y if self.out is None else self.out(y)


class Rotary(nnx.Module):
    """The rotary positions of a config, on queries and keys [B, L, H, E]."""

    def __init__(self, config: "ModelConfig"):
        self.fraction = config.rotary_fraction
        self.base = config.rotary_base

    def __call__(self, q: Array, k: Array, seq: SeqInfo) -> tuple[Array, Array]:
        """Turn both by the positions inside their documents."""
        q, k = (
            rotary.rotate(x, seq.positions, self.fraction, self.base) for x in (q, k)
        )
        return q, k


def wide(x: Array) -> Array:
    """Cast to float32, in which features, sums and softmaxes are computed."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def refuse_state(state: State | None) -> None:
    """Raise for a state where the future is looked at too: there is none to continue."""
    if state is not None:
        raise ConfigError(
            "model.causal=False: a mixer that looks ahead cannot decode; use causal=True."
        )


def by_chunks(
    function: Callable[..., Any], arrays: tuple[Array, ...], chunk: int
) -> Any:
    """Apply `function` to `chunk` positions at a time, recomputing it for the gradient.

    For functions that treat the positions (axis 1 of all arrays, also of the result) apart:
    the result is the same, and what they keep between is of one chunk. 0: all at once.
    """
    length = arrays[0].shape[1]
    if not 0 < chunk < length:
        return function(*arrays)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    checkpointed = jax.checkpoint(lambda part: function(*part))

    def join(y):
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length]

    parts = jax.lax.map(checkpointed, tuple(split(x) for x in arrays))
    return jax.tree.map(join, parts)


def at_least(options: Any, bound: int, *names: str) -> None:
    """Raise `ConfigError` for an option that is below `bound`."""
    config_lib.at_least(options, OPTIONS, bound, *names)
