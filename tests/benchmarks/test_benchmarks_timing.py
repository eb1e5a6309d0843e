"""How benchmarks take turns: what is counted, in which order, on which inputs."""

import itertools

from benchmarks import timing


class Works:
    """Works that let a clock's seconds pass and write down what they are given."""

    def __init__(self, **seconds):
        self.now, self.given = 0.0, []
        self.works = {name: self._work(name, s) for name, s in seconds.items()}

    def _work(self, name, seconds):
        def run(inputs):
            self.now += seconds
            self.given.append((name, inputs))

        return run

    def clock(self):
        return self.now


def test_rounds_are_counted_after_the_first():
    """Mutations: the first round is counted, or the last is not done."""
    made = Works(fast=1, slow=3)
    assert timing.in_turns(made.works, 4, made.clock) == {
        "fast": [1] * 4,
        "slow": [3] * 4,
    }
    assert len(made.given) == 2 * 5
    made = Works(fast=1)
    assert timing.in_turns(made.works, 4, made.clock, warm_up=0) == {"fast": [1] * 4}
    assert len(made.given) == 4


def test_a_round_gives_all_the_same_input_outside_the_clock():
    """Mutations: inputs are drawn for each work; while the clock runs."""
    made, drawn = Works(fast=1, slow=3), []

    def draw(index):
        made.now += 100
        drawn.append(index)
        return 10 * index

    seconds = timing.in_turns(made.works, 3, made.clock, draw)
    assert seconds == {"fast": [1] * 3, "slow": [3] * 3}
    assert drawn == [0, 1, 2, 3]
    assert sorted(made.given[-2:]) == [("fast", 30), ("slow", 30)]


def test_orders_differ():
    """A work that always follows the same one would find its cache. Mutation: no shuffle."""
    made = Works(a=1, b=1, c=1)
    timing.in_turns(made.works, 19, made.clock)
    orders = {tuple(n for n, _ in made.given[i : i + 3]) for i in range(0, 60, 3)}
    assert orders == set(itertools.permutations("abc"))


def test_turns_tell_after_every_round():
    """What a benchmark that may be cut short writes. Mutation: only at the end."""
    made = Works(a=2)
    told = timing.turns(made.works, made.clock)
    assert [len(next(told)["a"]) for _ in range(3)] == [0, 1, 2]


def test_ratios_are_taken_round_by_round():
    """Mutations: of sorted series, or upside down."""
    assert timing.ratio([6, 2, 8], [1, 2, 2]) == [1, 4, 6]
