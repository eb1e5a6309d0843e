"""Stories and a question, after five of the twenty bAbI tasks (Weston et al. 2015).

    1    where is mary?                        people move
    2    where is the apple?                   they take things, carry and drop them
    3    where was the apple before the hall?
    15   what is gertrude afraid of?           mice are afraid of wolves; gertrude is a mouse
    19   how do you go from the hall to the garden?    two moves, such as north, east

Our own worlds with few words: four people, six places, three things. Every story is fresh and a
function of (seed, step). A sentence is one token, as in PMI: a bag of words with weights by
their place. The question comes last. In task 3 "before" is before the last time that the thing
came there; in task 19 places are joined as told, as a tree, so that the way is unique.

Start at `story`.
"""

import dataclasses
import itertools

import numpy as np
from flax import nnx

from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.tasks import base, labelled

PEOPLE = ("mary", "john", "daniel", "sandra")
PLACES = ("hall", "garden", "kitchen", "office", "bedroom", "bathroom")
THINGS = ("apple", "ball", "milk")
NAMES = ("gertrude", "emily", "jessica", "winona")
ANIMALS = {"mouse": "mice", "wolf": "wolves", "cat": "cats", "sheep": "sheep"}
MOVES = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}
OPPOSITE = dict(zip(MOVES, ("south", "west", "north", "east"), strict=True))
KINDS = ("1", "2", "3", "15", "19")

Story = tuple[list[str], str, str]  # sentences, question, answer

ANSWERS = (
    *PLACES,
    *ANIMALS,
    *(f"{a} {b}" for a, b in itertools.product(MOVES, MOVES) if b != OPPOSITE[a]),
)
_VERBS = "moved to the took dropped where is was before are afraid of a what how do you go from"
_NOUNS = (*PEOPLE, *PLACES, *THINGS, *NAMES, *ANIMALS, *ANIMALS.values(), *MOVES)
WORDS = ("", *dict.fromkeys((*_VERBS.split(), *_NOUNS)))  # word 0 is padding
LONGEST = 10  # words of a sentence


@dataclasses.dataclass(frozen=True)
class StoriesConfig(base.TrainerConfig):
    """Length of the stories, and of the training."""

    min_sentences: int = field("numbers", 5, doc="Fewest sentences of tasks 1, 2, 3.")
    max_sentences: int = field("numbers", 20, doc="Most sentences.")

    def __post_init__(self):
        super().__post_init__()
        if not 3 <= self.min_sentences <= self.max_sentences:
            raise ConfigError(
                f"task.min_sentences={self.min_sentences}: must be from 3 to "
                f"task.max_sentences={self.max_sentences}."
            )
        if self.max_sentences < 8:
            raise ConfigError(
                f"task.max_sentences={self.max_sentences}: must be >= 8, the sentences "
                "of task 15."
            )


def story(rng: np.random.Generator, kind: str, num_sentences: int) -> Story:
    """Draw one story of a task of `KINDS`; `num_sentences` is that of tasks 1, 2 and 3."""
    if kind == "15":
        return _fears(rng)
    if kind == "19":
        return _way(rng)
    tell = {"1": _where_people_are, "2": _where_things_are, "3": _where_things_were}
    while (found := tell[kind](rng, num_sentences)) is None:
        pass  # such a story holds no question
    return found


def _pick(rng, things):
    things = list(things)
    return things[rng.integers(len(things))]


def _shuffled(rng, sentences):
    return [sentences[i] for i in rng.permutation(len(sentences))]


def _where_people_are(rng, num_sentences):
    where: dict[str, str] = {}
    sentences = []
    for _ in range(num_sentences):
        person = _pick(rng, PEOPLE)
        where[person] = _pick(rng, [p for p in PLACES if p != where.get(person)])
        sentences.append(f"{person} moved to the {where[person]}")
    person = _pick(rng, where)
    return sentences, f"where is {person}", where[person]


def _carried(rng, num_sentences):
    """Sentences, and the places in order where each thing was, from when it was first taken."""
    where: dict[str, str] = {}  # of people who have moved
    lies = {thing: _pick(rng, PLACES) for thing in THINGS}  # those that nobody holds
    holder: dict[str, str] = {}
    history: dict[str, list[str]] = {}
    sentences: list[str] = []
    while len(sentences) < num_sentences:
        person = _pick(rng, PEOPLE)
        held = [thing for thing, by in holder.items() if by == person]
        here = [thing for thing, place in lies.items() if place == where.get(person)]
        act = rng.random()
        if here and act < 0.7:
            thing = _pick(rng, here)
            holder[thing] = person
            history.setdefault(thing, [lies.pop(thing)])
            sentences.append(f"{person} took the {thing}")
        elif held and act < 0.3:
            thing = _pick(rng, held)
            del holder[thing]
            lies[thing] = where[person]
            sentences.append(f"{person} dropped the {thing}")
        else:
            where[person] = _pick(rng, [p for p in PLACES if p != where.get(person)])
            for thing in held:
                history[thing].append(where[person])
            sentences.append(f"{person} moved to the {where[person]}")
    return sentences, history


def _where_things_are(rng, num_sentences):
    sentences, history = _carried(rng, num_sentences)
    if not history:
        return None
    thing = _pick(rng, history)
    return sentences, f"where is the {thing}", history[thing][-1]


def _where_things_were(rng, num_sentences):
    sentences, history = _carried(rng, num_sentences)
    asked = [thing for thing, places in history.items() if len(places) > 1]
    if not asked:
        return None
    thing = _pick(rng, asked)
    places = history[thing]
    place = _pick(rng, sorted(set(places[1:])))
    last = max(i for i, there in enumerate(places) if there == place and i)
    question = f"where was the {thing} before the {place}"
    return sentences, question, places[last - 1]


def _fears(rng):
    kinds = list(ANIMALS)
    feared = {kind: _pick(rng, [k for k in kinds if k != kind]) for kind in kinds}
    is_a = {name: _pick(rng, kinds) for name in NAMES}
    sentences = [f"{ANIMALS[a]} are afraid of {ANIMALS[b]}" for a, b in feared.items()]
    sentences += [f"{name} is a {kind}" for name, kind in is_a.items()]
    name = _pick(rng, NAMES)
    question = f"what is {name} afraid of"
    return _shuffled(rng, sentences), question, feared[is_a[name]]


def _way(rng):
    """A tree of five places on a grid, each told from one of its two ends."""
    names = [PLACES[i] for i in rng.permutation(len(PLACES))[:5]]
    at = {names[0]: (0, 0)}
    ways: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    sentences = []
    for name in names[1:]:
        free = [
            (old, move, spot)
            for old, (x, y) in at.items()
            for move, (right, up) in MOVES.items()
            if (spot := (x + right, y + up)) not in at.values()
        ]
        old, move, at[name] = _pick(rng, free)
        ways[old].append((move, name))
        ways[name].append((OPPOSITE[move], old))
        told = (name, move, old) if rng.random() < 0.5 else (old, OPPOSITE[move], name)
        sentences.append("the {} is {} of the {}".format(*told))
    asked = [
        (start, end, f"{first} {second}")
        for start in names
        for first, middle in ways[start]
        for second, end in ways[middle]
        if end != start
    ]
    start, end, answer = _pick(rng, asked)
    question = f"how do you go from the {start} to the {end}"
    return _shuffled(rng, sentences), question, answer


def encode(sentences: list[str], length: int) -> np.ndarray:
    """Return word ids [length, LONGEST], 0 behind the end of sentences and of the story."""
    ids = np.zeros((length, LONGEST), np.int32)
    for row, sentence in zip(ids, sentences, strict=False):
        words = [WORDS.index(word) for word in sentence.split()]
        row[: len(words)] = words
    return ids


def batch(options: StoriesConfig, step: int, split: str) -> dict[str, np.ndarray]:
    """Batch of a step: inputs [B, T, W], real [B, T], labels and kinds [B]."""
    rng = base.rng(options.seed, step, split)
    kinds = rng.integers(0, len(KINDS), options.batch_size, np.int32)
    inputs, labels = [], np.zeros(options.batch_size, np.int32)
    for row, kind in enumerate(kinds):
        many = rng.integers(options.min_sentences, options.max_sentences + 1)
        sentences, question, answer = story(rng, KINDS[kind], int(many))
        inputs.append(encode([*sentences, question], options.max_sentences + 1))
        labels[row] = ANSWERS.index(answer)
    words = np.stack(inputs)
    real = (words != 0).any(axis=-1)
    return {"inputs": words, "real": real, "labels": labels, "kinds": kinds}


class Stories(labelled.Labelled):
    """An answer out of places, animals and pairs of moves; five tasks at once."""

    Options = StoriesConfig
    num_classes = len(ANSWERS)
    kinds = KINDS

    def inputs(self, rngs: nnx.Rngs) -> nnx.Module:
        """Bags of words."""
        return labelled.BagOfWords(self.model, len(WORDS), LONGEST, rngs=rngs)

    def batch(self, step: int, split: str) -> dict[str, np.ndarray]:
        """See `batch`."""
        return batch(self.options, step, split)
