"""What all processes of a run do or refuse together: none goes on alone after another has failed.

Every function must be called by all processes, in the same order. With one process each is just its call.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from unialign_jax import distributed

T = TypeVar("T")
# Seconds for the slowest process, which may be learning a tokenizer. One that died is noticed much sooner.
_TIMEOUT = 3600


class FailedElsewhere(ValueError):
    """Another process failed, with an error of a class that is unknown here. The message says which and why.

    `final` is that error's, see `cli.run`.
    """

    final = False


def everywhere(call: Callable[[], T], *errors: type[Exception]) -> T:
    """Calls in every process; if it fails in any, all raise one error: of the first that did not only wait in vain.

    `call` should not wait for other processes itself: one that has failed would not come.

    Args:
      call: takes no arguments.
      errors: classes that are raised as themselves in the processes which did not fail, where only their name and
        message arrive; those of any other class become `FailedElsewhere`.

    Returns:
      This process's result.
    """
    if jax.process_count() == 1:
        return call()
    result, failure = None, None
    try:
        result = call()
    except Exception as error:  # of any kind: the others must hear of it, and it is raised below
        failure = error
    told = [type(failure).__name__, str(failure), getattr(failure, "final", False)]
    outcomes = gather(None if failure is None else told)
    failed = [index for index, outcome in enumerate(outcomes) if outcome is not None]
    if not failed:
        return result
    causes = [index for index in failed if not _tells_timeout(*outcomes[index][:2])]
    first = (causes or failed)[0]
    if first == jax.process_index():
        raise failure
    name, message, final = outcomes[first]
    kind = next((error for error in errors if error.__name__ == name), None)
    if kind is None:
        elsewhere = FailedElsewhere(f"process {first} failed: {name}: {message}")
        elsewhere.final = final
        raise elsewhere from failure
    raise kind(message) from failure


def cause_of(error: Exception) -> Exception:
    """What an error followed from, if it is itself no more than that another process was waited for in vain."""
    while is_timeout(error) and isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def is_timeout(error: Exception) -> bool:
    """Whether it says no more than that something was waited for in vain."""
    return _tells_timeout(type(error).__name__, str(error))


def _tells_timeout(name: str, message: str) -> bool:
    return name == "TimeoutError" or "DEADLINE_EXCEEDED" in message


def primary(call: Callable[[], Any], *errors: type[Exception]) -> Any:
    """Calls in process 0 only, and gives all processes its JSON-serialisable result, or its error as `everywhere`."""
    if jax.process_count() == 1:
        return call()
    result = everywhere(lambda: call() if jax.process_index() == 0 else None, *errors)
    return gather(result if jax.process_index() == 0 else None)[0]


def gather(value: Any) -> list[Any]:
    """Each process's JSON-serialisable value, by process, in all processes.

    Raises:
      TimeoutError: processes have not come within an hour; the message names them.
    """
    if jax.process_count() == 1:
        return [value]
    return [json.loads(text) for text in distributed.exchange("agreement", json.dumps(value), _TIMEOUT)]
