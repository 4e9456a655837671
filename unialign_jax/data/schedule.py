"""Which stream of samples each step's batch is of: a pure function, so that hosts agree on it without a word."""

import array
import threading
from collections.abc import Sequence


def next_stream(weights: Sequence[float], drawn: Sequence[int]) -> int:
    """Which stream the next batch is of: the one furthest behind its share, the first of equals.

    Starting from zeros and counting its own answers, this is the schedule. Equal weights take turns.

    Args:
      weights: positive, one per stream.
      drawn: batches drawn so far, one per stream.
    """
    total, step = sum(weights), sum(drawn) + 1
    return max(range(len(weights)), key=lambda i: (weights[i] * step - drawn[i] * total, -i))


class Schedule:
    """The schedule by step, from some step on; what was worked out is kept (10 bytes a step).

    Args:
      weights, drawn: see `next_stream`; the first step known is the one after `drawn`.
    """

    def __init__(self, weights: Sequence[float], drawn: Sequence[int]):
        self._weights, self._start = tuple(weights), tuple(drawn)
        self._first = sum(drawn)
        self._drawn = list(drawn)
        self._streams, self._before = array.array("H"), array.array("q")
        self._lock = threading.Lock()

    def __call__(self, step: int) -> tuple[int, int]:
        """The stream of a step's batch (steps count from 0), and how many batches of that stream come before it."""
        at = step - self._first
        with self._lock:
            while len(self._streams) <= at:
                stream = next_stream(self._weights, self._drawn)
                self._streams.append(stream)
                self._before.append(self._drawn[stream])
                self._drawn[stream] += 1
            return self._streams[at], self._before[at]

    def __reduce__(self):
        return Schedule, (self._weights, self._start)
