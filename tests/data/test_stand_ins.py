"""What stands in for rows that can't be used, where most of a bucket is spoilt, and where others make the same rows."""

import numpy as np
import pytest

from unialign_jax.data.report import CorpusError
from unialign_jax.data.samples import Cause, Refused
from unialign_jax.data.streams import ReadChunk, Stream

ROWS = 100


class Rows(list):
    path = "rows.jsonl"

    def place(self, row):
        return f"line {row + 1}"


def reader(cause_of, shared=False):
    """A reader of one row at a time, and the list of rows that it tries; `cause_of` says why one can't be used."""
    tried = []

    def prepare(sample, row):
        tried.append(row)
        if (cause := cause_of(row)) is not None:
            raise Refused(cause, "spoilt")
        return {"row": np.array(row)}

    stream = Stream(source=0, rows=range(ROWS), prepare=prepare, weight=1.0, seed=0)
    read = ReadChunk((Rows(range(ROWS)),), (stream,), lambda step: (0, step), ((0,),), 1, 0.01, shared)
    return read, tried


def test_a_bucket_that_is_mostly_spoilt_is_trained_on():
    read, _ = reader(lambda row: None if row % 20 == 0 else Cause.TRUNCATED_IMAGE)
    made = [read(index) for index in range(ROWS)]  # one pass
    assert all(one["row"][0] % 20 == 0 for one in made)
    named = [one["refusals"][0][0] for one in made if one["refusals"]]
    assert sorted(named) == [row for row in range(ROWS) if row % 20]  # the rows themselves, not what stood in


def test_an_outage_is_not_asked_again_and_again():
    read, tried = reader(lambda row: Cause.UNREADABLE_IMAGE)
    assert "row" not in read(0)
    assert len(tried) < 10


def test_a_stand_in_that_one_process_cannot_read_is_an_error_where_another_makes_the_same():
    read, tried = reader(lambda row: Cause.UNREADABLE_IMAGE if tried[1:] else Cause.MISSING_IMAGE, shared=True)
    with pytest.raises(CorpusError, match="Another process makes the same row"):
        read(0)
    assert len(tried) == 2
