"""Checkpoints: Orbax behind one narrow class, for training and sampling alike.

A run's checkpoint directory holds one sub-directory per step, written atomically:

    DIR/<step>/state/   the train state: step, params, opt_state, ema
    DIR/<step>/data/    the state of the data iterator (JSON)
    DIR/<step>/meta/    what the run says about itself (JSON: config, stage, ...) and our checksums

Orbax returns quietly in cases where a run is then lost: saving an existing step does nothing, a dtype difference is
cast, missing shardings come from the saved ones. Here each of these is an error, and every restore is checked against
the checksums taken from the device arrays before they were written.

All processes of a run call each method together. What one of them finds wrong, all raise: each reads for itself
(`saved_step.py`), and then they agree on the outcome.
"""

import json
import traceback
import uuid
import zlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from unialign_jax import agreement, storage
from unialign_jax.saved_step import (
    CHECKSUMS,
    PARTS,
    CheckpointError,
    DamagedCheckpoint,
    SavedStep,
    WrongArchitecture,
    brief,
    checksums,
    saved_steps,
)


class Replaced(CheckpointError):
    """Another run saves in the same directory."""

    final = True  # see `cli.run`: started again, the two would end each other in turn


# Errors that are the same in every process, whichever found them.
_SHARED = (CheckpointError, WrongArchitecture, DamagedCheckpoint, Replaced, FileNotFoundError)


# Seconds for a background write, both files and waiting for the other processes: 34 GB of one host at 20 MB/s. If a
# process fails at it, the others wait so long.
_WRITING = 1800


class _Manager(ocp.CheckpointManager):
    """Orbax's, without its own watch for preemption."""

    def reached_preemption(self, step: int) -> bool:
        # The service knows one count, and agrees on the largest that anybody has asked it with: asked with steps here,
        # it would name one that `distributed.Preemption`, whose count is another, reaches much later or never.
        return False


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where the steps are, local or `gs://`; all processes must reach it. Made if absent, unless `read_only`.
      max_to_keep: how many of the newest steps are kept.
      keep_period: steps that are multiples of this are kept for good, beside the newest ones; None keeps none of them.
      read_only: for sampling, evaluation and conversion. Nothing is created or cleaned, so a run that is saving at
        this moment is not disturbed.

    Raises:
      FileNotFoundError: `read_only` and no such directory; or a process does not see the one that process 0 has made,
        or sees another of that name.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        max_to_keep: int = 3,
        keep_period: int | None = None,
        read_only: bool = False,
    ):
        self.directory = storage.absolute(directory)
        self._manager, self._lost = None, False
        self._claim, self._token = self.directory.parent / f"{self.directory.name}.claim", None
        if read_only:
            agreement.everywhere(self._check_there, *_SHARED)
        else:
            agreement.primary(lambda: self.directory.mkdir(parents=True, exist_ok=True), *_SHARED)
            self._check_shared()
            items = {"state": ocp.StandardCheckpointHandler()}
            items |= {name: ocp.JsonCheckpointHandler() for name in ("data", "meta")}
            options = ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep,
                keep_period=keep_period,
                async_options=ocp.AsyncOptions(timeout_secs=_WRITING),
            )
            self._manager = _Manager(self.directory, options=options, item_handlers=items)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.close()
            return
        try:  # alone: the other processes may know nothing of the error that ends this one
            self._close()
        except Exception as error:  # the one that is on its way says more, but this must not be lost
            logging.error("%s: saving in the background failed too: %s", self.directory, error)

    def all_steps(self) -> list[int]:
        """Steps that were saved completely, oldest first. A save in progress is waited for, and then counts."""
        self.wait()
        return agreement.primary(lambda: saved_steps(self.directory), *_SHARED)

    def latest_step(self) -> int | None:
        return max(self.all_steps(), default=None)

    def save(self, step: int, state: Any, data_state: Any, meta: dict[str, Any], *, wait: bool = False) -> None:
        """Saves a step. Returns once the arrays have left the device; files are written in the background.

        An error of the background write is raised by the next `wait` or `close`. The next `save` logs it and goes on,
        since the state at hand is newer than what was lost; at a second failure in a row it raises it.

        Args:
          step: must equal `state.step` and be newer than every saved step.
          state: a pytree with fields `step`, `params`, `opt_state` and `ema` (None where unused), such as `TrainState`.
            Its buffers may be donated as soon as this returns.
          data_state: JSON-serialisable state of the data iterator.
          meta: JSON-serialisable facts about the run.
          wait: return only when the step is on disk.

        Raises:
          CheckpointError: this step or a newer one exists already, `state` is at another step, or the processes do not
            agree on what to save.
          Replaced: another run has saved here since.
          TypeError: `data_state` or `meta` is not JSON-serialisable.
        """
        if self._manager is None:
            raise CheckpointError(f"{self.directory} was opened to be read only")
        self._settle()
        newest = max(agreement.primary(lambda: saved_steps(self.directory), *_SHARED), default=None)
        if newest is not None and step <= newest:
            raise CheckpointError(
                f"{self.directory} already has step {newest}, so step {step} would not be saved. "
                "Resume from the newest step, or use another --workdir."
            )
        self._hold()
        if int(state.step) != step:
            raise CheckpointError(f"the state to save as step {step} is at step {int(state.step)}")
        # Process 0 writes these for all.
        text = agreement.everywhere(lambda: json.dumps([step, data_state, meta], sort_keys=True), TypeError)
        if len(set(agreement.gather(zlib.crc32(text.encode())))) > 1:
            raise CheckpointError(f"step {step} was not saved: the processes differ in its data state or meta")
        sums = {part: checksums(getattr(state, part)) for part in PARTS}
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({"iterator": data_state}),
                meta=ocp.args.JsonSave({**meta, CHECKSUMS: sums}),
            ),
        )
        if not saved:
            raise CheckpointError(f"{self.directory}: Orbax declined to save step {step}")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Blocks until background writes are done and raises what went wrong in them, in any process."""
        if self._manager is not None:
            agreement.everywhere(self._wait, *_SHARED)

    def close(self) -> None:
        self.wait()
        self._close()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, Any, dict[str, Any]]:
        """Reads a whole step, bit for bit, straight onto the devices that `abstract_state` names.

        Args:
          abstract_state: the state's structure with arrays or `jax.ShapeDtypeStruct`s as leaves; a leaf without
            sharding goes to the first local device. Need not be sharded as the saved state was.
          step: None means the newest.

        Returns:
          `(state, data_state, meta)`.

        Raises:
          FileNotFoundError: there is no checkpoint, or not this step.
          WrongArchitecture: names, shapes or dtypes differ; the message lists them.
          DamagedCheckpoint: the step can't be read; the message names the newest older one that can.
        """
        step = self._existing(step)
        try:
            return self._read(abstract_state, step)
        except DamagedCheckpoint as damage:
            raise self._advised(damage, step, lambda older: self._read(abstract_state, older)) from damage

    def restore_params(self, abstract_params: Any = None, *, which: str = "params", step: int | None = None) -> Any:
        """Reads the parameters alone, without optimizer or data state.

        Args:
          abstract_params: structure to restore into, as in `restore`, for some or all of the saved networks (the first
            level of names): those alone are read. None takes all, with names, shapes and dtypes from the checkpoint
            itself, as nested dicts on the first local device.
          which: `params`, or `ema` for their running average.
          step: None means the newest.

        Raises:
          CheckpointError: `which` is neither of the two, or the run kept no average. Else as `restore`.
        """
        if which not in ("params", "ema"):
            raise CheckpointError(f"which={which!r}: expected 'params' or 'ema'")
        step = self._existing(step)
        params, sums = agreement.everywhere(lambda: self._read_params(abstract_params, which, step), *_SHARED)
        self._check_sums(step, which, params, sums)
        return params

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """What the run wrote about itself at `step` (None: the newest).

        Raises:
          FileNotFoundError, DamagedCheckpoint: as `restore`; of the step named, no more than this has been read.
        """

        def read(step: int) -> dict[str, Any]:
            return agreement.everywhere(lambda: self._saved(step).meta()[0], *_SHARED)

        step = self._existing(step)
        try:
            return read(step)
        except DamagedCheckpoint as damage:
            raise self._advised(damage, step, read) from damage

    def checksums(self, step: int) -> dict[str, Any]:
        """Of a step's arrays, as recorded when it was saved: what tells it from another that took its place.

        Raises:
          DamagedCheckpoint: the record can't be read.
        """
        return agreement.everywhere(lambda: self._saved(step).meta()[1], *_SHARED)

    def set_aside_after(self, step: int) -> list[int]:
        """Moves the steps newer than `step` out of the way, to `DIR-set-aside/`, and returns them.

        Resuming from an older step writes the later ones again; those of the abandoned continuation are kept, but are
        no longer part of this run.
        """
        newer = [s for s in self.all_steps() if s > step]
        if newer:
            self._hold()
            agreement.primary(lambda: self._set_aside(newer), *_SHARED)
            self._manager.reload()
        return newer

    def _set_aside(self, steps: list[int]) -> None:
        aside = self.directory.parent / f"{self.directory.name}-set-aside"
        aside.mkdir(parents=True, exist_ok=True)
        if storage.is_remote(aside):  # where a directory is there only once something is in it
            (aside / "README").write_text("Steps given up by resuming from an older one.\n")
        for number in steps:
            taken = len([path for path in aside.iterdir() if path.name.split(".")[0] == str(number)])
            (self.directory / str(number)).rename(aside / (f"{number}.{taken}" if taken else str(number)))

    def _hold(self) -> None:
        """Claims the directory with the first change to it; later on refuses to go on beside another run.

        Nothing is locked, so that nothing stays locked after a kill.
        """
        if self._token is None:
            self._token = agreement.primary(self._take, *_SHARED)
        else:
            agreement.primary(self._check_claim, *_SHARED)

    def _take(self) -> str:
        """Claims the directory, and removes what processes killed while saving left behind; nothing else ever does.

        Orbax's own option does it in a thread that close() does not wait for.
        """
        token = uuid.uuid4().hex
        storage.write_whole(self._claim, token.encode())
        self._remove_leftovers()
        return token

    def _remove_leftovers(self) -> None:
        for leftover in ocp.utils.tmp_checkpoints(self.directory):
            leftover.get().rmtree()

    def _check_claim(self) -> None:
        """Of two runs the newest has the directory, and may have removed the other's unfinished step."""
        if self._token is not None and self._claim.exists() and self._claim.read_text() != self._token:
            raise Replaced(
                f"{self.directory}: another run has begun to save here since this one did, so this one ends; use one "
                "--workdir for each"
            )

    def _check_there(self) -> None:
        if not self.directory.is_dir():
            here = f" on process {jax.process_index()}" if jax.process_count() > 1 else ""
            raise FileNotFoundError(f"{self.directory}: no such checkpoint directory{here}")

    def _check_shared(self) -> None:
        """Refuses a directory that hosts have each for themselves: all must see a file that process 0 puts there."""
        if jax.process_count() == 1:
            return

        def put() -> str:
            file = self.directory.parent / f"{self.directory.name}.seen-{uuid.uuid4().hex}"
            file.write_text("All processes must see this.\n")
            return file.name

        file = self.directory.parent / agreement.primary(put, *_SHARED)

        def check() -> None:
            if not file.exists():
                raise FileNotFoundError(
                    f"{self.directory} on process {jax.process_index()} is not that of process 0: give all one "
                    "--workdir, on a disk that they share or gs://"
                )

        try:
            agreement.everywhere(check, *_SHARED)
        finally:
            agreement.primary(file.unlink, *_SHARED)

    def _settle(self) -> None:
        """Waits for the save before this one, and forgives it one failure."""
        try:
            self.wait()
        except Replaced:
            raise
        except Exception as error:  # of any kind, and in all processes, see `wait`
            if self._lost:
                raise
            self._lost = True
            logging.error("%s: the save before failed, so this one is tried: %s", self.directory, error)
            # After a timeout, files may still be on their way. Process 0 decides: others may know its name only.
            timeout = agreement.is_timeout(error)
            agreement.primary(lambda: None if timeout else self._remove_leftovers(), *_SHARED)
            self._manager.reload()
        else:
            self._lost = False

    def _wait(self) -> None:
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._check_claim()  # if it is another run's doing, this says so
            # After a failure Orbax waits for the other processes, and fails at that.
            cause = agreement.cause_of(error)
            if isinstance(cause, (OSError, ValueError)) and not agreement.is_timeout(cause):
                raise CheckpointError(
                    f"{self.directory}: a step could not be written ({brief(cause)}); see to the disk or store and "
                    "start again: it goes on from the newest complete step"
                ) from cause
            raise cause from None

    def _close(self) -> None:
        if self._manager is not None:
            self._manager.close()

    def _existing(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise FileNotFoundError(f"{self.directory}: holds no complete checkpoint")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"{self.directory}: no step {step}; there are {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def _saved(self, step: int) -> SavedStep:
        return SavedStep(self.directory / str(step))

    def _read(self, abstract_state: Any, step: int) -> tuple[Any, Any, dict[str, Any]]:
        state, data_state, meta, sums = agreement.everywhere(lambda: self._read_files(abstract_state, step), *_SHARED)
        # From here on the processes compute together, and so see the same.
        if int(state.step) != step:
            raise self._saved(step).damaged(f"it holds the state of step {int(state.step)}")
        for part in PARTS:
            self._check_sums(step, part, getattr(state, part), sums)
        return state, data_state, meta

    def _read_files(self, abstract_state: Any, step: int) -> tuple[Any, Any, Any, Any]:
        saved = self._saved(step)
        meta, sums = saved.meta()
        data_state = saved.data_state()
        return saved.state(abstract_state), data_state, meta, sums

    def _read_params(self, abstract_params: Any, which: str, step: int) -> tuple[Any, Any]:
        saved = self._saved(step)
        _, sums = saved.meta()
        params = saved.params(abstract_params, which)
        return params, {which: {name: sums[which].get(name) for name in params}}

    def _advised(self, damage: DamagedCheckpoint, step: int, read: Callable[[int], Any]) -> DamagedCheckpoint:
        """The error with what to do about it: the newest step before that `read` can read."""
        traceback.clear_frames(damage.__traceback__)  # which hold what was read of the damaged step
        for older in reversed([s for s in self.all_steps() if s < step]):
            try:
                read(older)
            except CheckpointError:
                continue
            key = f"--config.resume_step={older}"
            of_several = f"--config.stages.{self.directory.parent.name}.resume_step"
            return DamagedCheckpoint(
                f"{damage}. The newest good step before it is {older}: choose it with {key} ({of_several} where the "
                "config has several stages)."
            )
        return DamagedCheckpoint(f"{damage}. No older step of this run can be read either.")

    def _check_sums(self, step: int, part: str, tree: Any, sums: dict[str, Any]) -> None:
        found, expected = checksums(tree), sums.get(part)
        if found != expected:
            raise self._saved(step).damaged(
                f"the checksum of {part} is {found}, not the {expected} recorded when saving"
            )
