"""What a text so far says about its next tokens: the draft, and whether reading it pays.

    k_e = how many tokens that end at place e are also the newest ones, at most LONGEST
    e   = the last place with the largest k_e, if that is at least SHORTEST
    draft = the tokens after e, again from e + 1 where they reach the end of the text

Start at `draft`; `Pace` says when to use it.
"""

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.notation import Array

SHORTEST, LONGEST = 2, 4  # tokens that a place must share with the text's end
FIRST = 3  # calls of either kind whose time is known before one is preferred
MARGIN = 1.1  # so much faster must drafts be than plain calls to take their place
AGAIN = 128  # calls, after which the other kind is timed once more


def draft(
    history: Array | np.ndarray, length: Array | int, count: int
) -> tuple[Array | np.ndarray, Array | np.ndarray]:
    """Draft `count` tokens after the first `length` of history [M]: int32 [count], bool.

    Of numpy arrays or traced ones. False: no place shares enough tokens, and the draft is
    of no use.
    """
    xp = jnp if isinstance(history, jax.Array) else np
    index = xp.arange(history.shape[0])
    same = index < length - 1  # places before the newest token
    shared = xp.zeros_like(index)
    for i in range(LONGEST):
        newest = history[xp.maximum(length - 1 - i, 0)]
        same = same & (xp.roll(history, i) == newest) & (index >= i) & (length > i)
        shared = shared + same
    place = xp.argmax(xp.where(shared > 0, shared * history.shape[0] + index, -1))
    period = xp.maximum(length - 1 - place, 1)
    after = place + 1 + xp.arange(count) % period
    return history[after % history.shape[0]], shared[place] >= SHORTEST


class Watch:
    """What passes over drafts of `count` tokens would do with a text, as it is read.

    It takes the same time for each token, however long the text: for each number of tokens that
    a place may share with the text's end, it knows where each such run of tokens ended last.
    """

    def __init__(self, count: int):
        self._count = count
        self._text: list[int] = []
        self._ends: list[dict] = [{} for _ in range(SHORTEST, LONGEST + 1)]
        # Where the text has what the draft says next, and how much more the draft says.
        self._place, self._unread = 0, 0

    def read(self, tokens: Sequence[int]) -> int:
        """Go on with these tokens, and count the steps: a token, with what its draft had right."""
        steps = 0
        for token in tokens:
            right = self._unread > 0 and token == self._text[self._place]
            self._text.append(token)
            place = self._last_place()
            if right:
                self._place, self._unread = self._place + 1, self._unread - 1
                continue
            steps += 1
            self._unread = 0 if place is None else self._count
            self._place = 0 if place is None else place + 1
        return steps

    def _last_place(self) -> int | None:
        """Where `draft` would find the text's end before, and note that it is here now."""
        place, here = None, len(self._text) - 1
        for size, ends in enumerate(self._ends, SHORTEST):
            if size > len(self._text):
                break
            run = tuple(self._text[-size:])
            place = ends.get(run, place)
            ends[run] = here
        return place


class Pace:
    """Which kind of call reads a token in less time: one that reads drafts, or a plain one.

    t      seconds of a token of plain calls
    s      seconds of a step of calls with drafts: a token, with its draft if there is one
    pays   tokens a step > s / t, and by a tenth to begin with, for a change takes time too

    t and s are medians of the last calls, and tokens a step those of the last calls too, as they
    were or, of plain calls, as `Watch` says that they would have been. So it follows the machine
    and the text. One call in `AGAIN` is of the other kind, so that its time stays known.
    """

    def __init__(self, last: int = 5):
        self._token: collections.deque = collections.deque(maxlen=last)  # t
        self._step: collections.deque = collections.deque(maxlen=last)  # s
        self._steps: collections.deque = collections.deque(maxlen=last)  # with tokens
        self._untimed = {False: 0, True: 0}  # calls since one of that kind was timed
        self._speculated = False  # the last call

    def called(
        self, speculated: bool, steps: int, tokens: int, seconds: float | None
    ) -> None:
        """A call has read tokens in so many steps, or would have. None: it was not timed."""
        self._speculated = speculated
        if tokens:
            self._steps.append((steps, tokens))
        for kind in self._untimed:
            self._untimed[kind] += 1
        if tokens and seconds is not None:
            self._untimed[speculated] = 0
            if speculated:
                self._step.append(seconds / steps)
            else:
                self._token.append(seconds / tokens)

    @property
    def reads(self) -> float:
        """Tokens a step."""
        steps, tokens = np.sum(self._steps, axis=0) if self._steps else (1, 1)
        return float(tokens / max(steps, 1))

    @property
    def cost(self) -> float:
        """s / t; 0 before both are known."""
        if not self._step or not self._token:
            return 0.0
        return float(np.median(self._step) / np.median(self._token))

    @property
    def speculates(self) -> bool:
        """Whether the next call is to read drafts. First each kind is timed `FIRST` times."""
        if len(self._token) < FIRST:
            return False
        if len(self._step) < FIRST:
            return True
        pays = self.reads > self.cost * (1 if self._speculated else MARGIN)
        return not pays if self._untimed[not pays] >= AGAIN else pays
