"""Stages in sequence: which follows which, where each starts, and running all of them in one call.

A stage is a config of its own (see `run_config.RunConfig`), and `after` names the one that it goes on from, in the same
working directory. All stages of a recipe are one config with a section for each, `stages`.
"""

from collections.abc import Mapping

import ml_collections
from etils import epath

from unialign_jax import agreement, distributed, lineage, parallel, storage
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.data.sources import open_source
from unialign_jax.data.streams import check_length
from unialign_jax.saved_step import saved_steps
from unialign_jax.training import loop, run_config, saved_config
from unialign_jax.training.program import Program
from unialign_jax.training.run_config import ConfigError, RunConfig


class StageNotFinished(ValueError):
    """The stage that another one starts from has not been trained, or not to its end, or is gone."""

    final = True  # see `cli.run`


def train(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, *, profile_steps: tuple[int, int] | None = None
) -> bool:
    """Trains a stage, or every stage of a config that has several, each from the one before.

    Stages that are finished are left as they are, after checking that their configs have not changed; so the same call
    goes on where it was interrupted, whenever that was. One stage alone starts from the finished `after` stage in
    `workdir`, unless its config's `init` says otherwise.

    Args:
      config: of one stage, or with a section `stages` of configs by name.
      workdir: every stage has a sub-directory of its name.
      profile_steps: see `loop.train`; of every stage.

    Returns:
      Whether all steps have been taken; not so after SIGTERM, with the last one saved.

    Raises:
      StageNotFinished: the `after` stage is not there or not finished.
      ValueError, FileNotFoundError: see `loop.train`.
    """
    if "stages" not in config:
        run = run_config.read(config)
        state = loop.train(config, workdir, start=_start(run, workdir), profile_steps=profile_steps)
        return int(state.step) >= run.steps
    with distributed.Preemption() as preemption:
        return _train_all(config, workdir, profile_steps, preemption)


def _train_all(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    profile_steps: tuple[int, int] | None,
    preemption: distributed.Preemption,
) -> bool:
    """`train` of a config with several stages. One watch for all: a signal between two must not be lost."""
    runs = {name: run_config.read(stage, f"stages.{name}") for name, stage in config.stages.items()}
    order, reached = in_order(runs), None
    for place, name in enumerate(order):
        stage, run = config.stages[name], runs[name]
        if _is_finished(stage, run, workdir):
            continue
        if reached is not None and preemption.reached():
            return False
        if not _saved(storage.absolute(workdir) / name):
            for later in order[place + 1 :]:
                if _saved(storage.absolute(workdir) / later):
                    raise StageNotFinished(
                        f"{workdir} has checkpoints of stage {later!r} and none of {name!r}, which comes before; put "
                        f"those back, or move {later} away to train both anew"
                    )
                if reached is None:
                    check_can_begin(runs[later])
        start = _start(run, workdir)
        # Its state is let go: the next stage reads what it needs, and has the memory.
        reached = loop.train(stage, workdir, start=start, profile_steps=profile_steps, preemption=preemption).step
        if int(reached) < run.steps:
            return False
    return True


def check_can_begin(run: RunConfig) -> None:
    """Whether a stage could begin, but for where it starts from: its data is there, and the mesh takes its program.

    What is the matter with a later stage is better said before the days of an earlier one. Whether it fits in memory
    only the compiler can say.

    Args:
      run: of the stage. All processes call it together.

    Raises:
      CorpusError: a source is missing, empty, not of its format or shorter than a batch.
      ValueError: see `open_source`, `Program`.
    """
    Program(run, parallel.make_mesh(run.strategy))
    for source in run.data.sources:
        check_length(open_source(source), run.data)


def in_order(runs: Mapping[str, RunConfig]) -> list[str]:
    """Names of stages, each behind the one that it goes on from.

    Raises:
      ConfigError: a section is named otherwise than its stage, two stages follow the same, or one follows none of them.
    """
    for name, run in runs.items():
        if run.stage != name:
            raise ConfigError(f"stages.{name}.stage: expected {name!r}, found {run.stage!r}")
    order, after = [], None
    while following := [name for name, run in runs.items() if run.after == after and name not in order]:
        if len(following) > 1:
            raise ConfigError(
                f"stages: {' and '.join(following)} both go on from {after!r}; expected one after another"
            )
        order += following
        after = following[0]
    if lost := [name for name in runs if name not in order]:
        raise ConfigError(f"stages.{lost[0]}.after: {runs[lost[0]].after!r} does not lead to a first stage")
    return order


def _start(run: RunConfig, workdir: epath.PathLike) -> epath.Path | None:
    """The stage directory that a stage goes on from; None where its config's `init` says, or its own checkpoints do."""
    if run.after is None or run.init is not None or _saved(storage.absolute(workdir) / run.stage):
        return None
    directory = storage.absolute(workdir) / run.after
    step, steps = _progress(directory)
    if step is None or step < steps:
        found = "there is no checkpoint of it" if step is None else f"it is at step {step} of {steps}"
        raise StageNotFinished(
            f"stage {run.stage!r} goes on from {run.after!r}, but in {directory} {found}; train that stage first "
            "(stage 'all' does), or set --config.init to what to start from"
        )
    return directory


def _is_finished(stage: ml_collections.ConfigDict, run: RunConfig, workdir: epath.PathLike) -> bool:
    """Whether a stage has taken its last step, as the config has it.

    Raises:
      ConfigChanged: it has, or has taken other steps than these, with another config.
      ValueError: it has, but the stage before was trained anew since.
    """
    directory = storage.absolute(workdir) / run.stage
    step = max(_saved(directory), default=0)
    if step < run.steps:
        return False
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        if not loop.goes_on_from_latest(run, checkpoints, step):
            return False
        saved = checkpoints.meta(step)
    saved_config.check_unchanged(saved["config"], saved_config.as_json(stage), run.allow_changed)
    lineage.check_start(saved, directory)
    return True


def _saved(directory: epath.Path) -> list[int]:
    """The steps of a stage that are saved, ascending, as process 0 sees them."""
    return agreement.primary(lambda: saved_steps(directory / "checkpoints"))


def _progress(directory: epath.Path) -> tuple[int | None, int]:
    """A stage's newest step, None if it has none, and the number of steps that it was to take."""
    steps = _saved(directory)
    if not steps:
        return None, 0
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        return steps[-1], checkpoints.meta(steps[-1])["config"]["steps"]
