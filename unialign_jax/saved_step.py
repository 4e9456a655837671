"""One step of a run on disk, as this process alone reads it; `checkpoints.py` has the processes agree on it.

Read through Orbax's handlers, which wait for nobody. What is missing, cut short or altered is a `DamagedCheckpoint`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from unialign_jax import storage
from unialign_jax.tree_checks import checksum, describe_differences, flat_leaves

PARTS = ("params", "opt_state", "ema")
CHECKSUMS = "checksums"  # in the step's meta
# Of errors in reading, what tells of damage; others come of a disk or a store that does not answer, or not to us.
_DAMAGE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# How TensorStore says the same; after its own attempts it calls all that may pass ABORTED.
_PASSING = ("ABORTED", "UNAVAILABLE", "PERMISSION_DENIED", "UNAUTHENTICATED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


class CheckpointError(ValueError):
    """A checkpoint that can't be read or written as asked. The message says what to do."""


class WrongArchitecture(CheckpointError):
    """The checkpoint is whole, but its arrays are not those of the network that was asked for."""

    final = True  # see `cli.run`


class DamagedCheckpoint(CheckpointError):
    """A step whose files are missing, cut short or altered."""

    final = True  # see `cli.run`


class SavedStep:
    """The files of one step.

    Args:
      path: `DIR/STEP`.
    """

    def __init__(self, path: epath.Path):
        self.path = path

    def meta(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the run says about itself, and the checksums of `PARTS`.

        Raises:
          DamagedCheckpoint: as all methods.
        """
        meta = self._json("meta")
        with storage.reading(self.damaged):
            return meta, meta.pop(CHECKSUMS)

    def data_state(self) -> Any:
        """The state of the data iterator."""
        saved = self._json("data")
        with storage.reading(self.damaged):
            return saved["iterator"]

    def state(self, abstract_state: Any) -> Any:
        """The whole state, where the leaves of `abstract_state` say.

        Raises:
          WrongArchitecture: names, shapes or dtypes differ; the message lists them.
        """
        self._check_same(self._leaves(), flat_leaves(abstract_state))
        args = ocp.args.StandardRestore(_with_shardings(abstract_state))
        with storage.reading(self.damaged):
            return ocp.StandardCheckpointHandler().restore(self.path / "state", args=args)

    def params(self, abstract_params: Mapping[str, Any] | None, which: str) -> Any:
        """`params` or `ema` alone, of the networks in `abstract_params` (None: all, on the first local device).

        Raises:
          CheckpointError: the step has none. Else as `state`.
        """
        saved = {path[1:]: leaf for path, leaf in self._leaves().items() if path[0] == which}
        if not saved:
            raise CheckpointError(f"{self.path} has no {which!r}: the run kept none")
        if abstract_params is None:
            leaves = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in saved.items()}
            abstract_params = ocp.tree.from_flat_dict(leaves)
        wanted = {path: leaf for path, leaf in saved.items() if path[0] in abstract_params}
        self._check_same(wanted, flat_leaves(abstract_params), prefix=f"{which}/")
        item = _with_shardings({which: abstract_params})
        args = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        with storage.reading(self.damaged):
            return ocp.PyTreeCheckpointHandler().restore(self.path / "state", args=args)[which]

    def damaged(self, cause: Exception | str) -> CheckpointError:
        """The error that says so; or, of a cause that may pass, that it can't be read now."""
        if _may_pass(cause):
            return CheckpointError(f"{self.path} can't be read now ({brief(cause)}): start again when it can")
        return DamagedCheckpoint(f"{self.path} is damaged ({brief(cause)})")

    def _json(self, item: str) -> Any:
        with storage.reading(self.damaged):
            return ocp.JsonCheckpointHandler().restore(self.path / item)

    def _leaves(self) -> dict[tuple[str, ...], Any]:
        with storage.reading(self.damaged):
            return flat_leaves(ocp.StandardCheckpointHandler().metadata(self.path / "state").tree)

    def _check_same(self, saved: dict, wanted: dict, prefix: str = "") -> None:
        if differences := describe_differences(saved, wanted, prefix):
            raise WrongArchitecture(
                f"{self.path} is of another architecture than the config's: {differences}. "
                "Use the config it was trained with, or another directory."
            )


def saved_steps(directory: epath.Path) -> list[int]:
    """Complete steps in a checkpoint directory, oldest first, as this process sees it; none if it is absent."""
    return sorted(ocp.utils.checkpoint_steps(directory))


def checksums(tree: Any) -> Any:
    """One of each network, so that they can be read apart; of the optimizer's state one."""
    if isinstance(tree, Mapping):
        return {name: checksum({name: network}) for name, network in tree.items()}
    return checksum(tree)


def brief(cause: Exception | str) -> str:
    """An error's class and message, or a text, in a line of some 300 characters."""
    text = cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + "…"


def _may_pass(cause: Exception | str) -> bool:
    if isinstance(cause, OSError):
        return not isinstance(cause, _DAMAGE)
    return any(word in str(cause) for word in _PASSING)


def _with_shardings(tree: Any) -> Any:
    """Abstract leaves that all say where they go: Orbax would reuse the shardings of the run that saved them."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)

    return jax.tree.map(abstract, tree)
