"""What all commands share: an error that a user can mend is one line on standard error and an exit code."""

import logging
import os
import re
import sys
import threading
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging

from unialign_jax import compilation_cache

_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code an error arose, not only what it says.")
flags.disclaim_key_flags()  # those defined below, for a program, are its own in its --help
# After an error that starting the same command again can't mend: wrong flags, and those whose class has an attribute
# `final`. The launchers of pods, which restart what fails, leave it at that.
FINAL_EXIT_CODE = 78
_OTHERS_COME = 20.0  # seconds, fewer than `distributed.initialize` lets JAX wait at exit
_NO_CONFIG = "Failed loading config file"  # ml_collections says so when the config is first read


def run(main: Callable[[], None]) -> None:
    """Runs an absl program whose flags are already defined; does not return.

    Missing or unreadable files, what the clients of object stores raise, and every `ValueError` that this package
    raises become one line and exit code 1; wrong flags and config overrides, too little device memory, and errors that
    are `final`, code 78. All other exceptions are defects of the program and keep their traceback.

    Args:
      main: called without arguments; an argument that is no flag is refused.
    """

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            _exit(f"unexpected argument {arguments[1]!r}; every option is given as --name=value", FINAL_EXIT_CODE)
        try:
            main()
        except Exception as error:
            if _TRACEBACK.value:
                raise
            _explain(error)
            raise

    app.run(guarded, flags_parser=_parse)


def _explain(error: Exception) -> None:
    """Ends the program with one line if this is an error that the user can mend."""
    # JAX's own class, which is not loaded for its name alone, is a RuntimeError.
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        _exit(
            f"the device's memory is full: {str(error).splitlines()[0]} Take a smaller batch (--batch), smaller "
            "images or more devices; in training --config.remat=full, or more --config.micro_batches, or, if it "
            "was for the grid of samples, --config.log.samples_every=0; a run that goes on takes them with "
            "--config.allow_changed=micro_batches,remat,log.samples_every. Of a config of several stages, each is "
            "set for the stage: --config.stages.STAGE.KEY",
            FINAL_EXIT_CODE,
        )
    from unialign_jax import storage  # late: it loads clients of object stores

    if (said := storage.client_error(error)) is not None:
        _exit(said)
    if isinstance(error, OSError) or (isinstance(error, ValueError) and _raised_by_us(error)):
        final = getattr(error, "final", False) or _NO_CONFIG in str(error)
        _exit(_message(error), FINAL_EXIT_CODE if final else 1)


def define_cluster(*, preemption: bool = False) -> Callable[[], None]:
    """The flags of programs that run on many hosts; the result connects the processes and opens the compile cache.

    Args:
      preemption: see `distributed.initialize`.
    """
    coordinator = flags.DEFINE_string("coordinator", None, "host:port of process 0, where the processes meet.")
    count = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
    number = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
    open_cache = define_cache()

    def start() -> None:
        from unialign_jax import distributed  # late: it loads JAX

        distributed.initialize(coordinator.value, count.value, number.value, preemption=preemption)
        open_cache()

    return start


def define_cache() -> Callable[[], None]:
    """The flag of programs that compile; the result opens the compilation cache."""
    directory = flags.DEFINE_string("compilation_cache", None, compilation_cache.HELP)
    return lambda: compilation_cache.enable(directory.value)


def define_pairs(name: str, about: str) -> Callable[[], dict[str, str]]:
    """A flag that takes KEY=VALUE pairs, separated by commas; the result reads it."""
    holder = flags.DEFINE_list(name, [], about)
    flags.register_validator(
        name, lambda pairs: all("=" in pair for pair in pairs), "expected KEY=VALUE, separated by commas"
    )
    return lambda: dict(pair.split("=", 1) for pair in holder.value)


def _parse(arguments: list[str]) -> list[str]:
    try:
        positional = flags.FLAGS(arguments)
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = absl_logging.WARNING  # Orbax tells of every file it touches; --verbosity=0 shows it
        return positional
    except (flags.Error, OSError) as error:
        _exit(_message(error), FINAL_EXIT_CODE)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _exit(_wrong_override(str(error), arguments), FINAL_EXIT_CODE)


def _message(error: Exception) -> str:
    text = str(error)
    missing = re.search(_NO_CONFIG + r".*No such file or directory: '([^']*)'", text, re.DOTALL)
    if missing:
        return f"config file {missing.group(1)!r} does not exist"
    # The error of a config file that raises holds its whole traceback; the last line of that says what is wrong.
    if "Traceback (most recent call last)" in text:
        last = next(line for line in reversed(text.splitlines()) if line.strip())
        return re.sub(r"^\w*Error: ", "", last)
    return text


def _wrong_override(message: str, arguments: list[str]) -> str:
    """ml_collections names the part of a dotted key that it did not find; the user typed the whole flag."""
    message = " ".join(message.replace("\\n", " ").replace("\\'", "'").strip("\"'").split())
    key = re.match(r"(\w+)", message)
    typed = [a for a in arguments if key and key.group(1) in a.split("=")[0].lstrip("-").split(".")]
    hint = re.search(r'Did you mean "(\w+)"', message)
    if not typed:
        return message
    if hint:
        meant = f"did you mean {hint.group(1)!r}?"
    else:
        of_stage = typed[0].split("=")[0].replace("--config.", "--config.stages.STAGE.", 1)
        meant = f"where it has several stages, the keys of one are set as {of_stage}"
    return f"{typed[0]}: the config has no key {key.group(1)!r}; {meant}"


def _raised_by_us(error: BaseException) -> bool:
    if type(error).__module__.split(".")[0] == __package__:
        return True  # raised behind a process boundary, its trace ends in the library that handed it on
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module == "__main__" or module.split(".")[0] == __package__


def _exit(message: str, code: int = 1) -> None:
    # Orbax reads concurrently; after the first failure asyncio remarks on the tasks that were dropped.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if code == FINAL_EXIT_CODE and "jax" in sys.modules:
        from unialign_jax import distributed  # late: it loads JAX

        distributed.tell_end(message, code)
        # If the other processes go on, JAX waits for them at exit, and then aborts with a code of its own.
        late = threading.Timer(_OTHERS_COME, os._exit, (code,))
        late.daemon = True
        late.start()
    sys.exit(code)
