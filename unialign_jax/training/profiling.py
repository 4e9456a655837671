"""Profiles of a few training steps, for XProf: `xprof --logdir=WORKDIR/STAGE`, or TensorBoard's profile page."""

import re
import shutil
import tempfile
from collections.abc import Callable

import jax
from etils import epath

from unialign_jax.typed import WrongValue


class StepProfiler:
    """Records what host and devices do in some steps of a run, into `DIRECTORY/plugins/profile/TIME/HOST.xplane.pb`.

        for step in ...:
            profiler.before(step, wait)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                ...
            profiler.after(step, wait)

    Args:
      steps: first and last one; None: nothing is recorded.
      directory: local or `gs://`.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: epath.Path):
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._directory = directory
        self._recording: str | None = None

    def before(self, step: int, wait: Callable[[], None]) -> None:
        """Starts at the first step. `wait` is called then, for the steps before it: they are not to be recorded."""
        if self._recording is None and step in self._steps:
            wait()
            self._recording = tempfile.mkdtemp(prefix="profile-")  # the recorder knows no object stores
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call is too much: it slows what is to be seen
            jax.profiler.start_trace(self._recording, profiler_options=options)

    def after(self, step: int, wait: Callable[[], None]) -> epath.Path | None:
        """Ends after the last step, for which it waits; returns where the profile is then."""
        if self._recording is None or step < self._steps[-1]:
            return None
        wait()
        jax.profiler.stop_trace()
        return self._keep()

    def close(self) -> epath.Path | None:
        """Keeps what was recorded by a run that ends before the last step; returns where, if there is something."""
        if self._recording is None:
            return None
        jax.profiler.stop_trace()
        return self._keep()

    def _keep(self) -> epath.Path:
        recorded, self._recording = epath.Path(self._recording), None
        (folder,) = (recorded / "plugins" / "profile").iterdir()
        kept = self._directory / "plugins" / "profile" / folder.name
        kept.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            file.copy(kept / file.name, overwrite=True)
        shutil.rmtree(recorded)
        self._steps = range(0)  # once
        return kept


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """`START:STOP`, both included, as numbers.

    Raises:
      WrongValue: it is not of that form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise WrongValue(f"--profile_steps={text}: expected START:STOP, the first and the last step, such as 100:104")
    return int(match[1]), int(match[2])
