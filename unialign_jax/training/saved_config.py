"""A run's config once it is written down: saved in every checkpoint, and compared with the current one on resume."""

import fnmatch
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from typing import Any

from unialign_jax import agreement
from unialign_jax.training.run_config import ConfigError

# They say how to resume and how the model is sampled, not what is being trained.
_FREE = ("allow_changed", "resume_step", "protocol")
# Which samples come next follows from these: the state of the data is of no other run.
_FOR_GOOD = ("seed", "data.global_batch", "data.sources.*.weight", "data.sources.*.task")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class ConfigChanged(ValueError):
    """The config of a resumed run differs from the one it was started with."""

    final = True  # see `cli.run`


def as_json(config: Any) -> dict[str, Any]:
    """A `ConfigDict` as plain JSON values: tuples become lists, unset placeholders None."""
    return json.loads(json.dumps(config.to_dict()))


def library_versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, current) for every value that differs; a key absent on one side is None there."""
    found = {}
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, Mapping) or isinstance(new, Mapping):
            nested = [side if isinstance(side, Mapping) else {} for side in (old, new)]
            if nested[0] or nested[1]:
                found |= differences(*nested, prefix=f"{prefix}{key}.")
                continue
        if old != new:
            found[prefix + key] = (old, new)
    return found


def check_same(config: dict[str, Any]) -> None:
    """Refuses processes of one run that were started with different configs; all call it together.

    Raises:
      ConfigError: naming the process, the keys and their values.
    """
    first, *others = agreement.gather(config)
    for process, other in enumerate(others, 1):
        if found := differences(first, other):
            shown = "; ".join(f"{key}: {old!r} and {new!r}" for key, (old, new) in found.items())
            raise ConfigError(
                f"the configs of process 0 and process {process} differ ({shown}): start all with the same flags"
            )


def check_unchanged(saved: Mapping[str, Any], current: Mapping[str, Any], allowed: Iterable[str]) -> dict[str, tuple]:
    """Refuses a resume whose config differs from the saved one in a key that was not allowed to change.

    Args:
      saved, current: results of `as_json`.
      allowed: dotted keys that may differ; a key allows all that is below it.

    Returns:
      The differences that were allowed, as in `differences`.

    Raises:
      ConfigChanged: listing key, saved and current value of every other difference, and how to allow them.
    """
    permitted = {part.strip() for entry in allowed for part in entry.split(",") if part.strip()}

    def is_permitted(key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[: n + 1]) in permitted for n in range(len(parts)))

    found = {key: pair for key, pair in differences(saved, current).items() if key not in _FREE}
    refused = {key: pair for key, pair in found.items() if not is_permitted(key)}
    shown = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in (refused or found).items())
    if never := [key for key in found if any(fnmatch.fnmatch(key, pattern) for pattern in _FOR_GOOD)]:
        raise ConfigChanged(
            f"the config differs from the one this run was saved with: {shown}. {' and '.join(never)} can't change in "
            "a run, for the order of its samples follows from it: restore the value, or use another --workdir, with "
            "init set to this run to go on from its parameters"
        )
    if refused:
        raise ConfigChanged(
            f"the config differs from the one this run was saved with: {shown}. Restore these values, use another "
            f"--workdir, or allow the change with --config.allow_changed={','.join(refused)} "
            f"(--config.stages.{current.get('stage')}.allow_changed where the config has several stages)"
        )
    return found
