"""Profiles of chosen steps: what is recorded, what is waited for, and what is left when a run ends early."""

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from unialign_jax.training.profiling import StepProfiler, parse_steps


def recorded_steps(directory) -> set[int]:
    (file,) = directory.glob("plugins/profile/*/*.xplane.pb")
    steps = set()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    steps |= {value for name, value in event.stats if name == "step_num"}
    return steps


@pytest.mark.parametrize(("last", "expected"), [(8, {3, 4, 5}), (4, {3, 4})])
def test_only_the_chosen_steps_are_recorded_and_waited_for(tmp_path, last, expected):
    profiler = StepProfiler((3, 5), epath.Path(tmp_path))
    waited, kept = [], []
    for step in range(1, last + 1):
        profiler.before(step, lambda step=step: waited.append(("before", step)))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            jnp.ones(3).block_until_ready()
        if (path := profiler.after(step, lambda step=step: waited.append(("after", step)))) is not None:
            kept.append(path)
    profiler.close()
    assert waited == [("before", 3), ("after", 5)][: 2 if last > 5 else 1]
    assert recorded_steps(tmp_path) == expected
    assert [path.parent for path in kept] == [epath.Path(tmp_path) / "plugins" / "profile"][: len(waited) - 1]


def test_nothing_is_recorded_unasked(tmp_path):
    profiler = StepProfiler(None, epath.Path(tmp_path))
    for step in range(3):
        profiler.before(step, None)
        assert profiler.after(step, None) is None
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_steps_as_text():
    assert parse_steps(None) is None and parse_steps("10:10") == (10, 10) and parse_steps("9:12") == (9, 12)
    for text in ("10", "12:9", "0:3", "a:b", "-1:3", "1:2:3"):
        with pytest.raises(ValueError, match="expected START:STOP"):
            parse_steps(text)
