"""Checkpoints: Orbax behind one narrow class, for training and sampling alike.

A run's checkpoint directory holds one sub-directory per step, written atomically:

    DIR/<step>/state/   the train state: step, params, opt_state, ema
    DIR/<step>/data/    the state of the data iterator (JSON)
    DIR/<step>/meta/    what the run says about itself (JSON: config, stage, ...) and our checksums

Orbax returns quietly in cases where a run is then lost: saving an existing step does nothing, a dtype difference is
cast, missing shardings come from the saved ones. Here each of these is an error, and every restore is checked against
the checksums taken from the device arrays before they were written.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from unialign_jax.tree_checks import checksum, describe_differences, flat_leaves

PARTS = ("params", "opt_state", "ema")
_CHECKSUMS = "checksums"
# What Orbax, TensorStore and json raise for files that are missing, cut short or altered.
_READ_ERRORS = (ValueError, OSError, KeyError, TypeError)


class CheckpointError(ValueError):
    """A checkpoint that can't be read or written as asked. The message says what to do."""


class WrongArchitecture(CheckpointError):
    """The checkpoint is whole, but its arrays are not those of the network that was asked for."""


class DamagedCheckpoint(CheckpointError):
    """A step whose files are missing, cut short or altered."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where the steps are, local or `gs://`. Made if absent, unless `read_only`.
      max_to_keep: how many of the newest steps are kept.
      keep_period: steps that are multiples of this are kept for good, beside the newest ones; None keeps none of them.
      read_only: for sampling, evaluation and conversion. Nothing is created or cleaned, so a run that is saving at
        this moment is not disturbed.

    Raises:
      FileNotFoundError: `read_only` and no such directory.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        max_to_keep: int = 3,
        keep_period: int | None = None,
        read_only: bool = False,
    ):
        self.directory = _absolute(directory)
        if read_only and not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory}: no such checkpoint directory")
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, keep_period=keep_period)
            self._remove_leftovers()
        # Handlers are named here so that a process which has saved nothing yet can read the metadata of each item.
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def all_steps(self) -> list[int]:
        """Steps that were saved completely, oldest first. A save in progress is waited for, and then counts."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return max(self.all_steps(), default=None)

    def save(self, step: int, state: Any, data_state: Any, meta: dict[str, Any], *, wait: bool = False) -> None:
        """Saves a step. Returns once the arrays have left the device; files are written in the background.

        An error of the background write is raised by the next `save`, `wait` or `close`.

        Args:
          step: must equal `state.step` and be newer than every saved step.
          state: a pytree with fields `step`, `params`, `opt_state` and `ema` (None where unused), such as `TrainState`.
            Its buffers may be donated as soon as this returns.
          data_state: JSON-serialisable state of the data iterator.
          meta: JSON-serialisable facts about the run.
          wait: return only when the step is on disk.

        Raises:
          CheckpointError: this step or a newer one exists already, or `state` is at another step.
          TypeError: `data_state` or `meta` is not JSON-serialisable.
        """
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise CheckpointError(
                f"{self.directory} already has step {newest}, so step {step} would not be saved. "
                "Resume from the newest step, or use another --workdir."
            )
        if int(state.step) != step:
            raise CheckpointError(f"the state to save as step {step} is at step {int(state.step)}")
        json.dumps([data_state, meta])
        sums = {part: checksum(getattr(state, part)) for part in PARTS}
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({"iterator": data_state}),
                meta=ocp.args.JsonSave({**meta, _CHECKSUMS: sums}),
            ),
        )
        if not saved:
            raise CheckpointError(f"{self.directory}: Orbax declined to save step {step}")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Blocks until background writes are done and raises what went wrong in them."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def restore(
        self, abstract_state: Any, step: int | None = None, *, accept: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Reads a whole step, bit for bit, straight onto the devices that `abstract_state` names.

        Args:
          abstract_state: the state's structure with arrays or `jax.ShapeDtypeStruct`s as leaves; a leaf without
            sharding goes to the first local device. Need not be sharded as the saved state was.
          step: None means the newest.
          accept: called with the step's meta before any array is read; refuses the step by raising.

        Returns:
          `(state, data_state, meta)`.

        Raises:
          FileNotFoundError: there is no checkpoint, or not this step.
          WrongArchitecture: names, shapes or dtypes differ; the message lists them.
          DamagedCheckpoint: the step can't be read; the message names the newest older one that can.
        """
        step = self._existing(step)
        try:
            return self._read(abstract_state, step, accept)
        except DamagedCheckpoint as damage:
            good = self._newest_readable(abstract_state, before=step)
            advice = (
                f"The newest good step before it is {good}: choose it with --config.resume_step={good}."
                if good is not None
                else "No older step of this run can be read either."
            )
            raise DamagedCheckpoint(f"{damage}. {advice}") from damage

    def restore_params(self, abstract_params: Any = None, *, which: str = "params", step: int | None = None) -> Any:
        """Reads the parameters alone, without optimizer or data state.

        Args:
          abstract_params: structure to restore into, as in `restore`; None takes names, shapes and dtypes from the
            checkpoint itself, as nested dicts on the first local device.
          which: `params`, or `ema` for their running average.
          step: None means the newest.

        Raises:
          CheckpointError: `which` is neither of the two, or the run kept no average. Else as `restore`.
        """
        if which not in ("params", "ema"):
            raise CheckpointError(f"which={which!r}: expected 'params' or 'ema'")
        step = self._existing(step)
        saved = {path[1:]: leaf for path, leaf in self._saved_leaves(step).items() if path[0] == which}
        if not saved:
            raise CheckpointError(f"{self.directory / str(step)} has no {which!r}: the run kept none")
        if abstract_params is None:
            abstract_params = ocp.tree.from_flat_dict(
                {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in saved.items()}
            )
        else:
            self._check_same(step, saved, flat_leaves(abstract_params), prefix=f"{which}/")
        _, sums = self._meta_and_sums(step)
        try:
            params = _read_tree(self.directory / str(step) / "state", {which: abstract_params})[which]
        except _READ_ERRORS as error:
            raise self._damaged(step, error) from error
        self._check_sum(step, which, params, sums)
        return params

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """What the run wrote about itself at `step` (None: the newest)."""
        return self._meta_and_sums(self._existing(step))[0]

    def set_aside_after(self, step: int) -> list[int]:
        """Moves the steps newer than `step` out of the way, to `DIR-set-aside/`, and returns them.

        Resuming from an older step writes the later ones again; those of the abandoned continuation are kept, but are
        no longer part of this run.
        """
        newer = [s for s in self.all_steps() if s > step]
        aside = self.directory.parent / f"{self.directory.name}-set-aside"
        for number in newer:
            aside.mkdir(parents=True, exist_ok=True)
            taken = len([path for path in aside.iterdir() if path.name.split(".")[0] == str(number)])
            (self.directory / str(number)).rename(aside / (f"{number}.{taken}" if taken else str(number)))
        self._manager.reload()
        return newer

    def _remove_leftovers(self) -> None:
        """Removes what processes killed while saving left behind; nothing else ever does.

        Orbax's own option does it in a thread that close() does not wait for.
        """
        if jax.process_index() == 0 and self.directory.is_dir():
            for leftover in ocp.utils.tmp_checkpoints(self.directory):
                leftover.get().rmtree()

    def _existing(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise FileNotFoundError(f"{self.directory}: holds no complete checkpoint")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"{self.directory}: no step {step}; there are {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def _meta_and_sums(self, step: int) -> tuple[dict[str, Any], dict[str, int]]:
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            sums = meta.pop(_CHECKSUMS)
        except _READ_ERRORS as error:
            raise self._damaged(step, error) from error
        return meta, sums

    def _saved_leaves(self, step: int) -> dict[tuple[str, ...], Any]:
        try:
            metadata = self._manager.item_metadata(step)["state"]
        except _READ_ERRORS as error:
            raise self._damaged(step, error) from error
        if metadata is None:
            raise self._damaged(step, "the description of its arrays, state/_METADATA, is missing")
        return flat_leaves(metadata.tree)

    def _read(self, abstract_state: Any, step: int, accept: Callable | None = None) -> tuple[Any, Any, dict[str, Any]]:
        meta, sums = self._meta_and_sums(step)
        if accept is not None:
            accept(meta)
        self._check_same(step, self._saved_leaves(step), flat_leaves(abstract_state))
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(_with_shardings(abstract_state)), data=ocp.args.JsonRestore()
                ),
            )
            state, data_state = restored["state"], restored["data"]["iterator"]
        except _READ_ERRORS as error:
            raise self._damaged(step, error) from error
        if int(state.step) != step:
            raise self._damaged(step, f"it holds the state of step {int(state.step)}")
        for part in PARTS:
            self._check_sum(step, part, getattr(state, part), sums)
        return state, data_state, meta

    def _newest_readable(self, abstract_state: Any, before: int) -> int | None:
        for step in reversed([s for s in self.all_steps() if s < before]):
            try:
                self._read(abstract_state, step)
            except CheckpointError:
                continue
            return step
        return None

    def _check_same(self, step: int, saved: dict, wanted: dict, prefix: str = "") -> None:
        differences = describe_differences(saved, wanted, prefix)
        if differences:
            raise WrongArchitecture(
                f"{self.directory / str(step)} is of another architecture than the config's: {differences}. "
                "Use the config it was trained with, or another --workdir."
            )

    def _check_sum(self, step: int, part: str, tree: Any, sums: dict[str, int]) -> None:
        found = checksum(tree)
        if found != sums.get(part):
            raise self._damaged(
                step, f"the checksum of {part} is {found}, not the {sums.get(part)} recorded when saving"
            )

    def _damaged(self, step: int, cause: Exception | str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"{self.directory / str(step)} is damaged ({_short(cause)})")


def _read_tree(path: epath.Path, abstract: Any) -> Any:
    """The part of a saved tree that `abstract` has, as its shardings say."""
    item = _with_shardings(abstract)
    args = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path, args=args)


def _absolute(directory: epath.PathLike) -> epath.Path:
    path = epath.Path(directory)
    return path if "://" in str(directory) else path.expanduser().resolve()


def _short(cause: Exception | str) -> str:
    text = cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + "…"


def _with_shardings(tree: Any) -> Any:
    """Abstract leaves that all say where they go: Orbax would reuse the shardings of the run that saved them."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)

    return jax.tree.map(abstract, tree)
