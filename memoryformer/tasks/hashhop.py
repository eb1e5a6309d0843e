"""HashHop: chains of random names in random order, followed from a name to its end.

    ab = cd                     lines of all chains, shuffled
    xy = 'zw'
    cd = 'ef'
    Hops=2                      then for each question its number of hops, a name
    ab = 'ef'                   and its answer, the only part that has weight

After the benchmark of Magic (hash-hop), re-derived. With `chain_of_thought` the answer names the
way: ab = cd = 'ef'. Rows are read letter by letter, so that a model must compare names.

    python -m memoryformer.tasks hashhop --config=configs/hashhop.py:softmax --workdir=runs/hashhop

Start at `draw`.
"""

import dataclasses
import itertools
import string

import numpy as np

from memoryformer.config import at_least, field
from memoryformer.errors import ConfigError
from memoryformer.tasks import base, trunk

LETTERS = string.ascii_letters
TOKENS = ("<pad>", *LETTERS, *string.digits, " ", "=", "'", "\n")
_IDS = {token: i for i, token in enumerate(TOKENS)}


@dataclasses.dataclass(frozen=True)
class HashHopConfig(base.TrainerConfig):
    """Size of a row, and of the training; L is the model's."""

    hops: int = field("numbers", 2, doc="Lines from a question's name to its end.")
    name_len: int = field("numbers", 4, doc="Letters of a name.")
    num_chains: int = field("numbers", 0, doc="Chains; 0: as many as fit a row.")
    num_questions: int = field("numbers", 1, doc="Chains that are asked for.")
    chain_of_thought: bool = field(
        "numbers", False, doc="Whether an answer names the way."
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "task", 1, "hops", "name_len", "num_questions")
        at_least(self, "task", 0, "num_chains")
        if 0 < self.num_chains < self.num_questions:
            raise ConfigError(
                f"task.num_questions={self.num_questions}: must be at most "
                f"task.num_chains={self.num_chains}, for each is asked once."
            )


def draw(
    rng: np.random.Generator, config: HashHopConfig, num_chains: int
) -> list[tuple[str, bool]]:
    """Draw one row: pieces of text, and whether the model is asked for them."""
    names = _names(rng, num_chains * (config.hops + 1), config.name_len)
    chains = [names[i::num_chains] for i in range(num_chains)]
    chains = [[*chain[:-1], f"'{chain[-1]}'"] for chain in chains]
    lines = [
        f"{one} = {two}\n" for chain in chains for one, two in itertools.pairwise(chain)
    ]
    rng.shuffle(lines)
    pieces = [("".join(lines), False)]
    for i in rng.permutation(num_chains)[: config.num_questions]:
        way = chains[i][1:] if config.chain_of_thought else chains[i][-1:]
        pieces += [
            (f"Hops={config.hops}\n{chains[i][0]} = ", False),
            (" = ".join(way), True),
            ("\n", False),
        ]
    return pieces


def _names(rng, count, length):
    """Draw so many different names."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=length))] = (
            None
        )
    return list(names)


def fitting(config: HashHopConfig, seq_len: int) -> int:
    """Return the chains of a row of L tokens; raises `ConfigError` where none fits.

    A chain takes hops (2 name_len + 4) + 2 letters, a question its header, name and answer.
    """
    line, most = 2 * config.name_len + 4, len(LETTERS) ** config.name_len
    way = config.hops if config.chain_of_thought else 1
    question = len(f"Hops={config.hops}\n") + (1 + way) * (config.name_len + 3)
    left = seq_len + 1 - config.num_questions * question
    most = min(left // (config.hops * line + 2), most // (2 * (config.hops + 1)))
    wanted = config.num_chains or most
    if not config.num_questions <= wanted <= most:
        raise ConfigError(
            f"task.num_chains={config.num_chains}, task.num_questions="
            f"{config.num_questions}: {max(most, 0)} chains of task.hops={config.hops} and "
            f"task.name_len={config.name_len} fit into model.seq_len={seq_len}; raise it."
        )
    return wanted


class HashHop(trunk.Tagger):
    """The ends of chains, letter by letter."""

    Options = HashHopConfig

    @property
    def vocab_size(self) -> int:
        """Padding, letters, digits and four signs."""
        return len(TOKENS)

    def check(self) -> None:
        """Refuse what does not fit a row."""
        super().check()
        fitting(self.options, self.model.seq_len)

    def batch(self, step: int, split: str) -> dict[str, np.ndarray]:
        """Draw inputs, segment_ids, targets and weights [B, L]; weights are 1 in answers."""
        options, length = self.options, self.model.seq_len
        rng = base.rng(options.seed, step, split)
        ids = np.zeros((options.batch_size, length + 1), np.int32)
        asked = np.zeros(ids.shape, np.float32)
        chains = fitting(options, length)
        for row in range(options.batch_size):
            pieces = draw(rng, options, chains)
            text = "".join(piece for piece, _ in pieces)
            ids[row, : len(text)] = [_IDS[letter] for letter in text]
            flags = [flag for piece, flag in pieces for _ in piece]
            asked[row, : len(text)] = flags
        inputs = ids[:, :-1]
        return {
            "inputs": inputs,
            "segment_ids": (inputs != 0).astype(np.int32),
            "targets": ids[:, 1:],
            "weights": asked[:, 1:],
        }
