"""What stands before the hash of a fitted layer: thresholds, and a mix chosen by what it explains.

A threshold is the mean of what it is taken from, so that signs say most. A mix is one of
`model.front`: drawn (hadamard, orthogonal), or found from the correlations of the inputs
(grouped): values that go together share a chunk, or are spread over all chunks. `auto` tries each
on a sample, a quarter of it held out, and takes what leaves least. Layers that are added up have a
hash each, drawn from another seed: `observe` reads them as one layer of all tables. Start at `choose`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.convert.memorise import fit
from memoryformer.convert.memorise.observations import Observations
from memoryformer.model import front as front_lib
from memoryformer.notation import Float
from memoryformer.ops import hashing

MIXES = (*front_lib.MIXES, "auto")
_SAMPLE_RIDGES = (1e-2,)  # one will do to compare


@dataclasses.dataclass(frozen=True)
class Hash:
    """How a layer hashes: what is a `model.parts.Part` and the model's fields of a score.

    arrays: the parameters of its `model.front.Front`.
    """

    code_bits: int
    mix: str
    score: str
    temperature: float
    arrays: dict[str, np.ndarray]

    def __call__(
        self, inputs: Float[np.ndarray, "N D"], outputs: Float[np.ndarray, "N F"]
    ) -> Observations:
        """Hash and score inputs, for `fit.fit_tables`."""
        kind = (self.mix, self.code_bits, self.score, self.temperature)
        codes, scores = _codes_and_scores(*kind, self.arrays, jnp.asarray(inputs))
        return Observations(np.asarray(codes), np.asarray(scores), outputs)


def observe(
    hashes: Sequence[Hash],
    inputs: Float[np.ndarray, "N D"],
    outputs: Float[np.ndarray, "N F"],
) -> Observations:
    """Hash and score inputs by the layers of a sum, whose tables follow each other."""
    read = [one(inputs, outputs) for one in hashes]
    codes = np.concatenate([each.codes for each in read], 1)
    return Observations(
        codes, np.concatenate([each.scores for each in read], 1), outputs
    )


def choose(
    inputs: Float[np.ndarray, "N D"],
    outputs: Float[np.ndarray, "N F"],
    *,
    code_bits: int,
    mix: str,
    thresholds: bool,
    score: str,
    temperature: float,
    seed: int = 0,
) -> Hash:
    """Make the hash of a layer from a sample of its inputs and outputs; `mix` of `MIXES`."""
    hashes = [
        Hash(code_bits, name, score, temperature, arrays)
        for name in (front_lib.MIXES if mix == "auto" else (mix,))
        for arrays in _arrays(name, inputs, code_bits, seed)
    ]
    if thresholds:
        for one in hashes:
            mixed = front_lib.transform(jnp.asarray(inputs), one.mix, one.arrays)
            one.arrays["thresholds"] = np.asarray(mixed, np.float64).mean(0)
    hashes = [dataclasses.replace(one, arrays=_float32(one.arrays)) for one in hashes]
    if len(hashes) == 1:
        return hashes[0]
    return min(hashes, key=lambda one: _left(one, inputs, outputs))


def _left(one: Hash, inputs, outputs) -> float:
    """What a fit to three quarters of a sample leaves of the last one."""
    cut = len(inputs) * 3 // 4
    seen = one(inputs[:cut], outputs[:cut])
    held_out = one(inputs[cut:], outputs[cut:])
    buckets = 1 << one.code_bits
    return fit.fit_tables([seen], held_out, buckets, ridges=_SAMPLE_RIDGES).unexplained


def _arrays(mix, inputs, code_bits, seed) -> Iterator[dict[str, np.ndarray]]:
    """The parameters of a mix, each way there is."""
    width, rng = inputs.shape[1], np.random.default_rng(seed)
    if mix == "none":
        yield {}
    elif mix == "hadamard":
        yield {"signs": rng.choice([-1.0, 1.0], width)}
    elif mix == "orthogonal":
        rotation, triangle = np.linalg.qr(rng.normal(size=(width, width)))
        yield {"rotation": rotation * np.sign(np.diag(triangle))}
    else:
        order = together(inputs, code_bits)
        yield {"order": order}
        yield {"order": order.reshape(code_bits, -1).T.ravel()}  # and apart


def together(inputs: Float[np.ndarray, "N D"], code_bits: int) -> np.ndarray:
    """Order the columns so that those of a chunk correlate: one by one, the closest yet free."""
    correlation = np.abs(np.nan_to_num(np.corrcoef(inputs.T.astype(np.float64))))
    free = np.ones(len(correlation), bool)
    order: list[int] = []
    for place in range(len(correlation)):
        if place % code_bits == 0:
            closeness = correlation[:, free].sum(1)  # begin with the most connected
        else:
            chunk = order[place - place % code_bits :]
            closeness = correlation[:, chunk].sum(1)
        order.append(int(np.argmax(np.where(free, closeness, -1))))
        free[order[-1]] = False
    return np.array(order)


def _float32(arrays):
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _codes_and_scores(mix, code_bits, score, temperature, arrays, inputs):
    z = front_lib.transform(inputs, mix, arrays)
    chunks = hashing.split_chunks(z, code_bits)
    return hashing.hash_codes(chunks), hashing.scores(chunks, score, temperature)
