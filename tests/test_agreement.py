"""What one process raises for all, without the processes: `pods/` has them."""

import pytest

from unialign_jax import agreement


class Comes(ValueError):
    """An error that comes again each time."""

    final = True


def elsewhere(monkeypatch, *told):
    """This process is the second of two; the first told this of its failure."""
    monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement.jax, "process_index", lambda: 1)
    monkeypatch.setattr(agreement, "gather", lambda value: [list(told), value])


def test_a_known_error_is_raised_as_itself(monkeypatch):
    elsewhere(monkeypatch, "Comes", "no such key", True)
    with pytest.raises(Comes, match="^no such key$"):
        agreement.everywhere(lambda: 1, Comes)


@pytest.mark.parametrize("final", [True, False])
def test_whether_an_unknown_error_comes_again_is_passed_on(monkeypatch, final):
    elsewhere(monkeypatch, "Comes", "no such key", final)
    with pytest.raises(agreement.FailedElsewhere, match="process 0 failed: Comes: no such key") as caught:
        agreement.everywhere(lambda: 1, FileNotFoundError)
    assert caught.value.final is final


def test_a_failure_comes_before_those_that_only_waited_for_it(monkeypatch):
    elsewhere(monkeypatch, "JaxRuntimeError", "DEADLINE_EXCEEDED: Barrier timed out", False)

    def fails():
        raise OSError("disk quota exceeded")

    with pytest.raises(OSError, match="disk quota exceeded"):
        agreement.everywhere(fails)

    def waits():
        try:
            fails()
        except OSError:
            raise TimeoutError("the others did not come")  # noqa: B904

    with pytest.raises(TimeoutError) as caught:
        waits()
    assert str(agreement.cause_of(caught.value)) == "disk quota exceeded"
    assert agreement.cause_of(KeyError("x")).args == ("x",)


def test_the_first_failure_is_everyones(monkeypatch):
    elsewhere(monkeypatch, "Comes", "first", True)

    def fails():
        raise FileNotFoundError("second")

    with pytest.raises(Comes, match="first") as caught:
        agreement.everywhere(fails, Comes, FileNotFoundError)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
