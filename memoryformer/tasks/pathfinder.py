"""A small Pathfinder: are two dots joined by a dashed path?

    . . o 1 . 1 1 .        two long paths and some short ones, dashed, that never come near
    . . . . . . . 1        each other; two dots o, at both ends of one long path or at one
    . 1 1 . 1 . . o        end of each

After Linsley et al. (2018) and Long Range Arena (Tay et al. 2021), re-derived and smaller. Both
answers have the same paths, so that only following one tells them apart. Pixels are read row by
row. Paths are walks of one pixel a step whose direction turns slowly.

    python -m memoryformer.tasks pathfinder --config=configs/shared_memory.py:pathfinder --workdir=runs/path

Start at `draw`.
"""

import dataclasses
import math

import numpy as np

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.tasks import base, trunk

EMPTY, PATH, DOT = 1, 2, 3  # tokens; 0 is padding
APART = 2  # pixels around a path that no other may enter
DASH = 3  # of so many pixels the last is left out
TRIES = 200  # walks, before an image is begun anew

Path = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class PathfinderConfig(base.TrainerConfig):
    """What an image holds, and the training."""

    side: int = field("numbers", 16, doc="Pixels of a side; L is its square.")
    path_len: int = field("numbers", 10, doc="Steps of a long path.")
    num_distractors: int = field(
        "numbers", 2, doc="Short paths, of half as many steps."
    )
    turn: float = field("numbers", 0.3, doc="Deviation of a step's turn, in radians.")

    def __post_init__(self):
        super().__post_init__()
        config_lib.at_least(self, "task", 4, "side", "path_len")
        config_lib.at_least(self, "task", 0, "num_distractors", "turn")


def draw(rng: np.random.Generator, config: PathfinderConfig) -> tuple[np.ndarray, int]:
    """Draw an image [side, side] of the three tokens, and whether its dots are joined.

    Raises `ConfigError` where so many paths do not fit.
    """
    short = max(config.path_len // 2, 2)
    lengths = [config.path_len] * 2 + [short] * config.num_distractors
    for _ in range(100):
        if paths := _paths(rng, config, lengths):
            break
    else:
        raise ConfigError(
            f"task.side={config.side}: no place for two paths of task.path_len="
            f"{config.path_len} and task.num_distractors={config.num_distractors}; "
            "raise it, or lower the others."
        )
    image = np.full((config.side, config.side), EMPTY, np.int32)
    for path in paths:
        for i, place in enumerate(path):
            if i % DASH != DASH - 1:
                image[place] = PATH
    joined = int(rng.integers(2))
    for place in (paths[0][0], paths[0][-1] if joined else paths[1][-1]):
        image[place] = DOT
    return image, joined


def _paths(rng, config, lengths) -> list[Path] | None:
    """Walks that keep apart; None if one finds no place."""
    taken: set[tuple[int, int]] = set()  # by paths, and around them
    paths = []
    for length in lengths:
        for _ in range(TRIES):
            if path := _walk(rng, config, length, taken):
                break
        else:
            return None
        paths.append(path)
        near = range(-APART, APART + 1)
        taken.update((y + i, x + j) for y, x in path for i in near for j in near)
    return paths


def _walk(rng, config, length, taken) -> Path | None:
    """One walk of so many steps, each to a new pixel; None if it hits something."""
    y, x = rng.uniform(0, config.side, 2)
    turns = rng.normal(scale=config.turn, size=length)
    angle, path = rng.uniform(0, 2 * math.pi), []
    for turn in turns:
        place = (math.floor(y), math.floor(x))
        inside = 0 <= place[0] < config.side and 0 <= place[1] < config.side
        if not inside or place in taken or place in path:
            return None
        path.append(place)
        angle += turn
        longest = max(abs(math.sin(angle)), abs(math.cos(angle)))
        y, x = y + math.sin(angle) / longest, x + math.cos(angle) / longest
    return path


class Pathfinder(trunk.Classifier):
    """Joined or not."""

    Options = PathfinderConfig
    num_classes = 2

    def check(self) -> None:
        """Refuse rows that are no square."""
        super().check()
        side = self.options.side
        if self.model.seq_len != side**2:
            raise ConfigError(
                f"model.seq_len={self.model.seq_len}: an image of task.side={side} has "
                f"{side**2} pixels; set it to that."
            )

    @property
    def vocab_size(self) -> int:
        """Padding and three kinds of pixel."""
        return DOT + 1

    def batch(self, step: int, split: str) -> dict[str, np.ndarray]:
        """Draw inputs and segment_ids [B, L], labels [B]."""
        rng = base.rng(self.options.seed, step, split)
        images, labels = zip(
            *(draw(rng, self.options) for _ in range(self.options.batch_size)),
            strict=True,
        )
        inputs = np.stack(images).reshape(len(images), -1)
        return {
            "inputs": inputs,
            "segment_ids": np.ones_like(inputs),
            "labels": np.array(labels, np.int32),
        }
