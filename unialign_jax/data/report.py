"""The account of the rows that could not be used, and the error that stops training when they are too many."""

import collections
import itertools
import math
from collections.abc import Sequence

from unialign_jax.data.samples import Cause

MAX_NAMED = 10_000
_DEVIATIONS = 6


class CorpusError(ValueError):
    """A source that can't be trained on as it is. The message names the file and says what to do."""


class TooFewRows(CorpusError):
    """A source's rows don't fill one batch."""

    final = True  # see `cli.run`


class TooManyRefused(CorpusError):
    """More rows of a source can't be used than are allowed."""

    final = True  # see `cli.run`


class Report:
    """How many rows of one source were read, and which could not be used.

    A row is counted each time it is read. Training stops (`CorpusError`) as soon as it is certain, or beyond chance,
    that more than `limit` of the rows can't be used: when one pass over the file has refused more than `limit` of all
    its rows, not the same twice, or, where they come in random order, when the refusals so far exceed the number
    expected at `limit` by more than six standard deviations and five.

    Args:
      path: the source.
      rows: number of rows in it.
      limit: highest share of refused rows, in [0, 1).
      in_order: rows are read as they stand in the source, where bad ones may stand together.
      max_named: of the refused rows so many are told by name.
    """

    def __init__(self, path: str, rows: int, limit: float, *, in_order: bool = False, max_named: int = MAX_NAMED):
        self.path = path
        self.rows = rows
        self.limit = limit
        self.in_order = in_order
        self.max_named = max_named
        self.read = 0
        self.refused: collections.Counter[str] = collections.Counter()
        self.named: dict[int, tuple[str, str, str]] = {}
        self._told: list[list] | None = None  # `named` as states have it, made anew once it has changed
        self._pass = 0
        self._refused_in_pass = 0

    def add(self, pass_index: int, refusal: tuple[int, str, str, str] | None = None) -> None:
        """Counts one row read.

        Args:
          pass_index: how often the file had been gone through before.
          refusal: (row, its place in the source, cause, detail) when the row was refused.

        Raises:
          CorpusError: too many were; the message is the report.
        """
        if pass_index != self._pass:
            self._pass, self._refused_in_pass = pass_index, 0
        self.read += 1
        if refusal is None:
            return
        row, place, cause, detail = refusal
        self.refused[cause] += 1
        self._refused_in_pass += 1
        if len(self.named) < self.max_named:
            self.named[row] = (place, cause, detail)
            self._told = None
        expected = self.limit * self.read
        # Buckets go through their rows each in its own time, so that a pass over all may meet a row twice.
        distinct = len(self.named) if len(self.named) < self.max_named else math.inf
        certain = min(self._refused_in_pass, distinct) > self.limit * self.rows + 1e-9
        # It is asked at every refusal of every host, as long as a run lasts. Where rows are refused with a chance of
        # just `limit` = 1 %, the first 2.5 million of a host exceed this bound anywhere with a chance of 1.3e-7 (summed
        # exactly, row by row), those of any of 64 hosts with 1e-5; ten times the rows add 4e-8 a host. With four
        # deviations one of 64 did in 8 % of simulated runs. 3 % bad rows exceed it within 3 000 rows (99.5 %).
        beyond_chance = self.refused.total() > expected + _DEVIATIONS * math.sqrt(expected) + 5
        if certain or (beyond_chance and not self.in_order):
            raise self.too_many()

    def too_many(self) -> CorpusError:
        """The error that stops training; not for good if some of it may only have been an outage."""
        kind = CorpusError if self.refused[Cause.UNREADABLE_IMAGE] else TooManyRefused
        return kind(
            f"too many rows can't be used: {self}\nMend or remove these rows, or raise the limit (refused_share)."
        )

    def state(self) -> dict:
        """JSON-able, not to be changed; `restore` takes it back. Also for the disk: it names the refused rows."""
        if self._told is None:
            self._told = [[row, *why] for row, why in self.named.items()]
        return {
            "path": self.path,
            "rows": self.rows,
            "read": self.read,
            "refused": dict(self.refused),
            "named": self._told,
            "pass": self._pass,
            "refused_in_pass": self._refused_in_pass,
        }

    def restore(self, state: dict) -> None:
        """Goes on from a `state()`; path, rows and limit stay those given at construction."""
        self.read = state["read"]
        self.refused = collections.Counter(state["refused"])
        self.named = {row: (place, cause, detail) for row, place, cause, detail in state["named"]}
        self._told = None
        self._pass, self._refused_in_pass = state["pass"], state["refused_in_pass"]

    @staticmethod
    def merge(states: Sequence[dict]) -> dict:
        """The account of all hosts, from the `state()` of each one's report of the same source."""
        last_pass = max(state["pass"] for state in states)
        refused = sum((collections.Counter(state["refused"]) for state in states), collections.Counter())
        named = {row: why for state in states for row, *why in state["named"]}
        return states[0] | {
            "read": sum(state["read"] for state in states),
            "refused": dict(refused),
            "named": [[row, *why] for row, why in itertools.islice(sorted(named.items()), MAX_NAMED)],
            "pass": last_pass,
            "refused_in_pass": sum(state["refused_in_pass"] for state in states if state["pass"] == last_pass),
        }

    def __str__(self) -> str:
        """The counts by cause, and the first ten rows of each."""
        refused = self.refused.total()
        share = refused / max(self.read, 1)
        lines = [f"{self.path}: {refused} of {self.read} rows read refused ({share:.2%}; limit {self.limit:.2%})"]
        for cause, count in self.refused.most_common():
            lines.append(f"  {cause}: {count}")
            rows = [(place, detail) for _, (place, why, detail) in sorted(self.named.items()) if why == cause]
            lines += [f"    {place}: {detail}" for place, detail in rows[:10]]
        return "\n".join(lines)
