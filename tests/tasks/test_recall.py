"""MQAR and HashHop: what is asked is what the row says, by a second reading of it."""

import itertools
import re

import numpy as np
import pytest

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError
from memoryformer.tasks import experiment, hashhop, mqar


def test_mqar_asks_for_what_it_has_told():
    """Read token by token: every key is asked once, later, and has the value that followed it.

    Mutations: values drawn with repetition; questions at odd distances; keys up to V / 2.
    """
    size, length, n, vocab = 16, 64, 8, 40
    tokens, targets, weights = mqar.batch(3, 5, size, length, n, vocab)
    assert tokens.shape == targets.shape == weights.shape == (size, length)
    assert (tokens.dtype, weights.dtype) == (np.int32, np.float32)
    for row, wanted, weight in zip(tokens, targets, weights, strict=True):
        told = {int(row[2 * i]): int(row[2 * i + 1]) for i in range(n)}
        assert len(told) == len(set(told.values())) == n
        assert all(1 <= k < vocab // 2 <= v < vocab for k, v in told.items())
        (asked,) = np.nonzero(weight)
        assert sorted(row[asked]) == sorted(told)
        assert min(asked) >= 2 * n and not any(asked % 2)
        assert [told[int(k)] for k in row[asked]] == list(wanted[asked])
        assert not wanted[weight == 0].any() and set(weight) == {0.0, 1.0}
        assert row.min() >= 1  # 0 is padding


def test_mqar_distances_follow_their_weights():
    """The first question of many rows lies at distance 2g with p = (g + 1)^-0.99 / sum.

    With one pair a row draws once. Mutations: POWER 0; an argsort of the other sign.
    """
    _, _, weights = mqar.batch(0, 0, 40_000, 18, 1, 16)
    counts = weights[:, 2::2].sum(axis=0) / len(weights)
    expected = np.arange(1.0, 9) ** -0.99
    expected /= expected.sum()
    assert np.abs(counts - expected).max() < 4 * np.sqrt(0.25 / len(weights))


def test_mqar_draws_anew():
    """Mutation: a step, a seed or the split left out of the generator."""
    draws = [(0, 0), (0, 1), (1, 0), (0, 0, "validation")]
    rows = [mqar.batch(*d[:2], 4, 32, 4, 20, *d[2:])[0].tobytes() for d in draws]
    assert len(set(rows)) == len(draws)
    again = mqar.batch(0, 0, 4, 32, 4, 20)[0]
    assert again.tobytes() == rows[0]


@pytest.mark.parametrize(
    "pairs, length, vocab", [(0, 64, 64), (9, 35, 64), (8, 64, 17)]
)
def test_mqar_that_does_not_fit(pairs, length, vocab):
    """Mutation: `seq_len // 2` in the place of `// 4`, which has no place for the questions."""
    with pytest.raises(ConfigError, match=rf"task\.num_pairs={pairs}: .*at most"):
        mqar.check(length, pairs, vocab)


def _hashhop(seq_len=200, **fields):
    fields = {"num_steps": 1, "batch_size": 3, "learning_rate": 1.0} | fields
    options = hashhop.HashHopConfig(warmup_steps=0, **fields)
    model = config_lib.load("hashhop").model
    with model.unlocked():
        model.seq_len = seq_len
    model = experiment.resolve({"task": {"name": "hashhop", **fields, "warmup_steps": 0},
                                "model": model}).task.model  # fmt: skip
    return hashhop.HashHop(model, options)


@pytest.mark.parametrize(
    "fields",
    [
        {"hops": 1},
        {"hops": 3, "num_questions": 2},
        {"hops": 2, "chain_of_thought": True, "num_chains": 3},
    ],
    ids=str,
)
def test_hashhop_answers_follow_the_lines(fields):
    """Parse the text back, follow the names, and compare with what has weight.

    Mutations: `chains[i][1:]` for both kinds of answer; weights not shifted; no shuffle
    (the lines of a chain would stand in its order).
    """
    task = _hashhop(**fields)
    data = task.batch(0, "train")
    for inputs, targets, weights, segments in zip(
        *(data[k] for k in ("inputs", "targets", "weights", "segment_ids")), strict=True
    ):
        assert (inputs[1:] == targets[:-1]).all()
        assert ((inputs != 0) == (segments != 0)).all()
        ids = np.append(inputs[:1], targets)
        text = "".join(hashhop.TOKENS[i] for i in ids if i)
        told, *questions = re.split(r"Hops=\d+\n", text)
        lines = [line.split(" = ") for line in told.splitlines()]
        follow = dict(lines)
        names = [name.strip("'") for line in lines for name in line]
        ends = sum(value[0] == "'" for value in follow.values())
        assert (
            len(set(names)) == len(lines) + ends
            and ends == len(lines) / task.options.hops
        )
        neighbours = sum(a[1] == b[0] for a, b in itertools.pairwise(lines))
        assert neighbours <= (len(lines) - ends) / 2
        answers = []
        for question in questions:
            name = question.split(" = ")[0]
            way = [follow[name]]
            while way[-1][0] != "'":
                way.append(follow[way[-1]])
            assert len(way) == task.options.hops
            cot = task.options.chain_of_thought
            answers.append(" = ".join(way) if cot else way[-1])
            assert question == f"{name} = {answers[-1]}\n"
        assert len({q[:4] for q in questions}) == task.options.num_questions
        weighted = "".join(hashhop.TOKENS[i] for i in targets[weights > 0])
        assert weighted == "".join(answers)


def test_hashhop_fills_a_row():
    """As many chains as fit L + 1 letters, of which the last is only predicted.

    Mutation: the quotes of a chain forgotten, which writes beyond a row.
    """
    for hops, cot in ((1, False), (2, False), (3, True)):
        options = {"hops": hops, "chain_of_thought": cot, "num_questions": 2}
        config = hashhop.HashHopConfig(1, 1, 1.0, 0, name_len=3, **options)
        for length in range(150, 170):
            chains = hashhop.fitting(config, length)
            sizes = [
                sum(
                    len(p) for p, _ in hashhop.draw(np.random.default_rng(0), config, n)
                )
                for n in (chains, chains + 1)
            ]
            assert sizes[0] <= length + 1 < sizes[1]


def test_hashhop_that_does_not_fit():
    """Mutation: `wanted <= most` left out of `fitting`."""
    with pytest.raises(
        ConfigError, match=r"task\.num_chains=99, .*fit into model\.seq_len"
    ):
        _hashhop(num_chains=99)
    with pytest.raises(ConfigError, match=r"task\.num_questions=4: must be at most"):
        _hashhop(num_chains=3, num_questions=4)


@pytest.mark.parametrize("name", ["mqar", "hashhop"])
def test_weights_are_what_is_counted(name):
    """Loss and accuracy are of the asked positions alone, and of padding nothing.

    Mutation: `jnp.sum(correct)` without its weights.
    """
    task = experiment.resolve(config_lib.load(name)).task
    data = task.batch(0, "validation")
    logits = np.random.default_rng(0).normal(size=(*data["targets"].shape, 128))

    class Given(type(task)):
        def logits(self, params, batch):
            return logits

    sums = Given(task.model, task.options).sums({}, data)
    asked = data["weights"] > 0
    picked = np.take_along_axis(logits, data["targets"][..., None], -1)[..., 0]
    nats = np.log(np.exp(logits).sum(axis=-1)) - picked
    right = logits.argmax(axis=-1) == data["targets"]
    rows = [r[a].all() for r, a in zip(right, asked, strict=True)]
    expected = {
        "loss": (nats[asked].sum(), asked.sum()),
        "accuracy": (right[asked].sum(), asked.sum()),
        "row_accuracy": (sum(rows), len(rows)),
    }
    assert sums.keys() == expected.keys()
    for key, pair in expected.items():
        np.testing.assert_allclose(sums[key], pair, rtol=1e-5)
