"""Stories: the answers follow from the sentences alone, told again by another reader."""

import collections
import re

import numpy as np
import pytest

from memoryformer.errors import ConfigError
from memoryformer.tasks import stories

OPTIONS = stories.StoriesConfig(1, batch_size=64, learning_rate=1e-3, warmup_steps=0)
STEP = {"north": 1j, "south": -1j, "east": 1, "west": -1}


def _track(sentences):
    """After each sentence {who or what: place}; a thing is known from when it is taken."""
    at, held, trail = {}, {}, []
    for sentence in sentences:
        who, verb, *rest = sentence.split()
        if verb == "moved":
            at[who] = rest[-1]
        elif verb == "took":
            held[rest[-1]] = who
            assert at[who] == at.get(rest[-1], at[who]), "taken where it is not"
        else:
            assert verb == "dropped" and held.pop(rest[-1]) == who
        for thing, holder in held.items():
            at[thing] = at[holder]
        trail.append(dict(at))
    return trail


def _before(trail, thing, place):
    """Where it was when it last came to `place`, from the end of the story backwards."""
    there = [at[thing] for at in trail if thing in at]
    last = len(there) - 1
    while there[last] != place or there[last - 1] == place or last == 0:
        last -= 1
    return there[last - 1]


def _fear(sentences, name):
    text = ". ".join(sentences)
    species = re.search(rf"{name} is a (\w+)", text).group(1)
    singular = {v: k for k, v in stories.ANIMALS.items()}
    plural = stories.ANIMALS[species]
    found = re.search(rf"\b{plural} are afraid of (\w+)", text).group(1)
    return singular[found]


def _ways(sentences, start, end):
    """All ways of two moves, walking the told relations in both directions."""
    edges = collections.defaultdict(dict)
    for sentence in sentences:
        _, a, _, move, _, _, b = sentence.split()  # a is north of b
        edges[b][STEP[move]], edges[a][-STEP[move]] = a, b
    name = {v: k for k, v in STEP.items()}
    return [
        f"{name[one]} {name[two]}"
        for one, middle in edges[start].items()
        for two, last in edges[middle].items()
        if last == end
    ]


def _answer(kind, sentences, question):
    words = question.split()
    if kind == "15":
        return _fear(sentences, words[2])
    if kind == "19":
        [way] = _ways(sentences, words[6], words[9])
        return way
    trail = _track(sentences)
    if kind == "3":
        return _before(trail, words[3], words[6])
    return trail[-1][words[-1]]


@pytest.mark.parametrize("kind", stories.KINDS)
def test_answers(kind):
    """Red if a dropped thing moves on, "before" means any earlier time, the way is not unique, or
    a thing is taken in a place where it is not.
    """
    rng, answers = np.random.default_rng(0), set()
    for i in range(200):
        many = 5 + i % 16
        sentences, question, answer = stories.story(rng, kind, many)
        assert _answer(kind, sentences, question) == answer
        assert len(sentences) == {"15": 8, "19": 4}.get(kind, many)
        answers.add(answer)
    assert len(answers) == {"15": 4, "19": 12}.get(kind, 6)


def test_two_moves_are_two_steps_on_the_grid():
    """Places lie where the relations say. Mutation: south and north of a sentence swapped."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        sentences, _, _ = stories.story(rng, "19", 5)
        at = {}
        while len(at) < 5:
            for sentence in sentences:
                _, a, _, move, _, _, b = sentence.split()
                if not at:
                    at[b] = 0
                if b in at:
                    assert at.setdefault(a, at[b] + STEP[move]) == at[b] + STEP[move]
                elif a in at:
                    at[b] = at[a] - STEP[move]
        assert len(set(at.values())) == 5


def test_batches():
    """Words, padding behind them, the question last, all five tasks; seed, step and split.

    Mutations: the question first; word 0 used; validation as training.
    """
    data = stories.batch(OPTIONS, 3, "train")
    assert data["inputs"].shape == (64, 21, stories.LONGEST) and set(data["kinds"]) == {
        *range(5)
    }
    for words, real, kind in zip(
        data["inputs"], data["real"], data["kinds"], strict=True
    ):
        rows = [" ".join(stories.WORDS[i] for i in row if i) for row in words[real]]
        assert not words[~real].any() and not real[real.sum() :].any()
        assert rows[-1].split()[0] in ("where", "what", "how")
        assert stories.KINDS[kind] in _kinds(rows[-1])
    again = stories.batch(OPTIONS, 3, "train")
    np.testing.assert_array_equal(again["inputs"], data["inputs"])
    for other in ((4, "train"), (3, "validation")):
        assert (stories.batch(OPTIONS, *other)["inputs"] != data["inputs"]).any()


def _kinds(question):
    """Tasks that a question may be of."""
    if question.startswith("where is the"):
        return ("2",)
    starts = {"where is": "1", "where was": "3", "what is": "15", "how do": "19"}
    return tuple(k for start, k in starts.items() if question.startswith(start))


def test_the_longest_sentence_fits():
    """Mutation: LONGEST one less."""
    rng = np.random.default_rng(0)
    told = [stories.story(rng, kind, 8) for kind in stories.KINDS for _ in range(5)]
    texts = [text for story in told for text in (*story[0], story[1])]
    longest = max(len(text.split()) for text in texts)
    assert longest == stories.LONGEST


@pytest.mark.parametrize(
    "fields", [{"min_sentences": 2}, {"max_sentences": 4}, {"max_sentences": 7}]
)
def test_lengths_that_hold_no_story_are_refused(fields):
    """Mutation: a check left out; a story that is never found goes on for ever."""
    with pytest.raises(ConfigError, match=r"task\.m\w+_sentences=\d: must be"):
        stories.StoriesConfig(
            1, batch_size=2, learning_rate=1.0, warmup_steps=0, **fields
        )
