"""Multi-query associative recall: many keys, each of them asked for its value later.

    k1 v1 k2 v2 .. kn vn | k3 x k1 x x x k2 x ..        targets: v3 at k3, v1 at k1, ..

After the generator of zoology (Arora et al. 2023), re-derived: keys of a row are distinct tokens
of [1, V/2), values distinct ones of [V/2, V). The pairs fill the first 2n tokens. Each key is
asked once, 2g tokens behind them, with g = 0, 1, .. drawn without replacement by weights
(g + 1)^-0.99: most questions follow soon. All other tokens are random. A model of fixed state
can answer as long as n pairs fit into its state.

    python -m memoryformer.tasks mqar --config=configs/mqar.py:softmax --workdir=runs/mqar

Start at `batch`.
"""

import dataclasses

import numpy as np

from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.tasks import base, trunk

POWER = -0.99  # of the weight of a distance


@dataclasses.dataclass(frozen=True)
class MQARConfig(base.TrainerConfig):
    """How much there is to recall; L and V are the model's."""

    num_pairs: int = field("numbers", 8, doc="n, keys and values of a row.")


def batch(
    seed: int,
    step: int,
    batch_size: int,
    seq_len: int,
    num_pairs: int,
    vocab_size: int,
    split: str = "train",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw batch `step` of a split: (tokens, targets, weights), all [B, L].

    tokens, targets: int32; the target of a key that is asked is its value, others are 0.
    weights: float32, 1 where there is a target. Raises `ConfigError` where n is too large.
    """
    check(seq_len, num_pairs, vocab_size)
    rng, rows = base.rng(seed, step, split), np.arange(batch_size)[:, None]
    tokens = rng.integers(1, vocab_size, (batch_size, seq_len), np.int32)
    half = vocab_size // 2
    keys = 1 + _distinct(rng, np.zeros(half - 1), batch_size, num_pairs)
    values = half + _distinct(rng, np.zeros(vocab_size - half), batch_size, num_pairs)
    tokens[:, : 2 * num_pairs : 2] = keys
    tokens[:, 1 : 2 * num_pairs : 2] = values
    places = (seq_len - 2 * num_pairs) // 2
    weight = POWER * np.log(np.arange(1, places + 1))
    asked = 2 * num_pairs + 2 * _distinct(rng, weight, batch_size, num_pairs)
    tokens[rows, asked] = keys
    targets = np.zeros((batch_size, seq_len), np.int32)
    targets[rows, asked] = values
    return tokens, targets, (targets > 0).astype(np.float32)


def check(seq_len: int, num_pairs: int, vocab_size: int) -> None:
    """Raise `ConfigError` unless n pairs and n questions fit, and n keys are distinct."""
    most = min(seq_len // 4, vocab_size // 2 - 1)
    if not 1 <= num_pairs <= most:
        raise ConfigError(
            f"task.num_pairs={num_pairs}: must be at least 1 and, with model.seq_len="
            f"{seq_len} and model.vocab_size={vocab_size}, at most {most} (L / 4, V / 2 - 1)."
        )


def _distinct(rng, log_weights, batch_size, count):
    """Draw `count` different indices a row, one after another by their weights: [B, count].

    The order of log w + Gumbel noise is that of draws without replacement.
    """
    noise = rng.gumbel(size=(batch_size, len(log_weights)))
    return np.argsort(-(log_weights + noise), axis=1)[:, :count]


class MQAR(trunk.Tagger):
    """Values of keys, by a language model of the whole vocabulary."""

    Options = MQARConfig

    @property
    def vocab_size(self) -> int:
        """Whatever the model has."""
        return self.model.vocab_size

    def check(self) -> None:
        """See `check`."""
        check(self.model.seq_len, self.options.num_pairs, self.model.vocab_size)

    def batch(self, step: int, split: str) -> dict[str, np.ndarray]:
        """See `batch`."""
        options, model = self.options, self.model
        tokens, targets, weights = batch(
            options.seed,
            step,
            options.batch_size,
            model.seq_len,
            options.num_pairs,
            model.vocab_size,
            split,
        )
        ones = np.ones_like(tokens)
        return {
            "inputs": tokens,
            "segment_ids": ones,
            "targets": targets,
            "weights": weights,
        }
