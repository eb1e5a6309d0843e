"""What a text so far says about its next tokens: the draft, and whether reading it pays.

    k_e = how many tokens that end at place e are also the newest ones, at most LONGEST
    e   = the last place with the largest k_e, if that is at least SHORTEST
    draft = the tokens after e, again from e + 1 where they reach the end of the text

Start at `draft`.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.notation import Array

SHORTEST, LONGEST = 2, 4  # tokens that a place must share with the text's end
FIRST = 3  # calls of either kind whose time is known before one is preferred


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


def accepted(history: np.ndarray, start: int, count: int) -> tuple[int, int]:
    """What passes over the text [M] from token `start` on would have done: (passes, accepted).

    Passes that have a draft, and tokens of those drafts that were the right ones.
    """
    passes = total = 0
    length = start + 1
    while length < len(history):
        tokens, worth = draft(history, length, count)
        right = 0
        if worth:
            after = history[length : length + count]
            equal = tokens[: len(after)] == after
            right = len(after) if equal.all() else int(np.argmin(equal))
            passes, total = passes + 1, total + right
        length += 1 + right
    return passes, total


class Pace:
    """Whether a pass over a draft pays: 1 + accepted tokens against what it costs in tokens.

    Seconds of a token and of a pass are medians of the last calls, and the accepted tokens
    those of the last passes, so that it follows the text and the machine.
    """

    def __init__(self, last: int = 8):
        self._token: collections.deque = collections.deque(maxlen=last)  # seconds
        self._pass: collections.deque = collections.deque(maxlen=last)
        self._accepted: collections.deque = collections.deque(maxlen=last)

    def plain(self, tokens: int, seconds: float) -> None:
        """Tokens were read one at a time."""
        self._token.append(seconds / tokens)

    def speculated(
        self, plain_tokens: int, passes: int, accepted: int, seconds: float
    ) -> None:
        """So many passes over drafts, and tokens without one."""
        self.watched(passes, accepted)
        if passes and self._token:
            seconds -= plain_tokens * float(np.median(self._token))
            self._pass.append(max(seconds, 0) / passes)

    def watched(self, passes: int, accepted: int) -> None:
        """Passes of a text that were made, or could have been."""
        if passes:
            self._accepted.append((passes, accepted))

    @property
    def accepted(self) -> float:
        """Accepted tokens a pass."""
        passes, accepted = np.sum(self._accepted, axis=0) if self._accepted else (1, 0)
        return float(accepted / passes)

    @property
    def cost(self) -> float:
        """What a pass costs, in tokens read one at a time; 0 before it is known."""
        if not self._pass or not self._token:
            return 0.0
        return float(np.median(self._pass) / np.median(self._token))

    @property
    def pays(self) -> bool:
        """Whether to speculate. Either side is measured `FIRST` times first, in turns."""
        if len(self._token) < FIRST or len(self._pass) < FIRST:
            return len(self._token) > len(self._pass)
        return 1 + self.accepted > self.cost
