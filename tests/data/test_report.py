"""The account of refused rows: when training stops, what it says, and how those of several hosts add up."""

import json

import numpy as np
import pytest

from unialign_jax.data.report import CorpusError, Report, TooManyRefused

BAD = (7, "line 7", "missing image", "'x.png': no such file")


def fill(report, reads, bad, pass_index=0):
    """`reads` rows of which the last `bad` are refused."""
    for i in range(reads):
        report.add(pass_index, (i, f"line {i}", *BAD[2:]) if i >= reads - bad else None)


def test_the_limit_is_exact_over_a_pass():
    report = Report("rows.jsonl", 100, 0.01)
    for pass_index in range(50):
        fill(report, 100, 1, pass_index)
    assert report.refused == {"missing image": 50} and report.read == 5000
    with pytest.raises(CorpusError):
        fill(report, 100, 2, 50)
    fill(Report("rows.jsonl", 100, 0.29), 100, 29)  # 0.29 * 100 is a little less than 29 in binary
    with pytest.raises(CorpusError):
        Report("rows.jsonl", 100, 0.0).add(0, BAD)


def test_a_row_that_a_pass_meets_twice_counts_once_against_the_limit():
    report = Report("rows.jsonl", 100, 0.01)
    report.add(0, BAD)
    report.add(0, BAD)
    assert report.refused.total() == 2
    with pytest.raises(CorpusError):
        report.add(0, (8, "line 8", *BAD[2:]))


def test_a_corpus_that_is_mostly_unusable_stops_early_and_one_at_the_limit_does_not():
    report = Report("rows.jsonl", 10**8, 0.01)
    with pytest.raises(CorpusError):
        fill(report, 100, 100)
    assert report.read < 10
    steady = Report("rows.jsonl", 10**8, 0.01)
    for _ in range(500):
        fill(steady, 100, 1)
    with pytest.raises(CorpusError):
        for _ in range(500):
            fill(steady, 100, 2)


def first_rows(limit, share, rows, seed):
    """The report of rows that are refused with a chance of `share`, as far as it lets them be read."""
    report = Report("rows.jsonl", 10**12, limit)
    places = np.cumsum(np.random.default_rng(seed).geometric(share, int(2 * share * rows)))
    for place in places[places <= rows].tolist():
        report.read = place - 1
        try:
            report.add(0, BAD)
        except CorpusError:
            break
    return report


def test_chance_alone_stops_no_host_however_long_it_reads():
    for seed in (1514, 1906, 3054):  # of 6 000, eight exceed four standard deviations and five, these among them
        assert first_rows(0.01, 0.01, 2_500_000, seed).read > 2_400_000
    for seed in range(20):
        assert first_rows(0.01, 0.03, 1_000_000, seed).read < 5_000


def test_bad_rows_that_stand_together_are_judged_by_the_whole_file_where_it_is_read_in_order():
    report = Report("rows.jsonl", 10_000, 0.01, in_order=True)
    fill(report, 1000, 100)
    with pytest.raises(CorpusError):
        fill(report, 1, 1)
    with pytest.raises(CorpusError):
        fill(Report("rows.jsonl", 10_000, 0.01), 1000, 100)


def test_the_report_names_rows_and_survives_a_round_trip():
    report = Report("rows.jsonl", 1000, 0.02)
    report.add(0, None)
    report.add(0, BAD)
    report.add(0, (3, "line 3", "missing image", "'y.png': no such file"))
    report.add(0, (5, "line 5", "malformed JSON", "Expecting value"))
    expected = """\
rows.jsonl: 3 of 4 rows read refused (75.00%; limit 2.00%)
  missing image: 2
    line 3: 'y.png': no such file
    line 7: 'x.png': no such file
  malformed JSON: 1
    line 5: Expecting value"""
    assert str(report) == expected
    other = Report("rows.jsonl", 1000, 0.02)
    other.restore(json.loads(json.dumps(report.state())))
    assert str(other) == expected and other.state() == report.state()
    for copy in (report, other):  # 20 in a pass are allowed, 17 are left
        fill(copy, 800, 17)
        with pytest.raises(CorpusError, match="too many rows can't be used: rows.jsonl: 21 of 805"):
            copy.add(0, (8, "line 8", *BAD[2:]))


def test_accounts_of_hosts_add_up():
    hosts = [Report("rows.jsonl", 100, 0.5) for _ in range(3)]
    fill(hosts[0], 50, 2)
    fill(hosts[0], 10, 1, pass_index=1)
    fill(hosts[1], 60, 3, pass_index=1)
    fill(hosts[2], 40, 4)
    merged = Report("rows.jsonl", 100, 0.5)
    merged.restore(json.loads(json.dumps(Report.merge([host.state() for host in hosts]))))
    assert merged.read == 160 and merged.refused == {"missing image": 10}
    assert set(merged.named) == {48, 49, 9, 57, 58, 59, 36, 37, 38, 39}
    assert merged.state()["pass"] == 1 and merged.state()["refused_in_pass"] == 4


def test_what_may_have_been_an_outage_is_not_final():
    report = Report("rows.jsonl", 100, 0.01)
    report.refused["missing image"] += 1
    assert isinstance(report.too_many(), TooManyRefused) and report.too_many().final
    report.refused["unreadable image"] += 1
    assert not getattr(report.too_many(), "final", False)


def test_no_more_are_named_than_asked_for():
    report = Report("rows.jsonl", 100, 0.02, max_named=2)
    report.add(0, BAD)
    report.add(0, (8, "line 8", *BAD[2:]))
    assert list(report.named) == [7, 8]
    with pytest.raises(CorpusError, match="3 of 3 rows"):  # what is not named counts as well
        report.add(0, (9, "line 9", *BAD[2:]))
    assert list(report.named) == [7, 8]
