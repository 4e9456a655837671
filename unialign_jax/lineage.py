"""Where models are and what they came from: what a directory stands for, and what runs recorded of their starts."""

from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from unialign_jax import agreement, storage
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.convert import store
from unialign_jax.saved_step import saved_steps

PUBLISHED_PROTOCOL = "unialignment"
_SHIPPED = epath.Path(__file__).parent / "checkpoints_shipped"


class WrongStart(ValueError):
    """What a run started from has become another checkpoint, or the place it was moved to holds another."""

    final = True  # see `cli.run`


def is_public(directory: epath.PathLike) -> bool:
    """Whether this looks like a public PyTorch pipeline directory."""
    return (storage.absolute(directory) / "transformer" / "config.json").exists()


def is_run(directory: epath.PathLike) -> bool:
    """Whether this is a run's stage directory, or one step of a run."""
    path = storage.absolute(directory)
    return (path / "checkpoints").is_dir() or (path.name.isdigit() and path.parent.name == "checkpoints")


def pinned(directory: epath.PathLike) -> str:
    """What a name stands for at this moment: of a run's stage directory its newest step, anything else as it is."""
    found = agreement.primary(lambda: is_run(directory), ValueError)
    return str(locate(directory) if found else directory)


def locate(directory: epath.PathLike) -> epath.Path:
    """Where exactly the model is that a directory stands for: a run's newest step, if it is a stage directory.

    Returns:
      A converted directory, or `.../checkpoints/STEP`.

    Raises:
      FileNotFoundError: nothing of the kind is there; the message says what was looked for.
    """
    path = storage.absolute(directory)
    if str(directory) in shipped() and not path.exists():
        return _SHIPPED / str(directory)
    return epath.Path(agreement.primary(lambda: str(_locate(path)), FileNotFoundError))


def _locate(path: epath.Path) -> epath.Path:
    if store.is_converted(path):
        return path
    if (path / "checkpoints").is_dir():
        steps = saved_steps(path / "checkpoints")
        if not steps:
            raise FileNotFoundError(f"{path / 'checkpoints'}: holds no complete checkpoint")
        return path / "checkpoints" / str(steps[-1])
    if path.name.isdigit() and path.parent.name == "checkpoints" and path.is_dir():
        return path
    stages = sorted(p.parent.name for p in path.glob("*/checkpoints")) if path.is_dir() else []
    if stages:
        raise FileNotFoundError(f"{path} holds a run's stages; name one: {', '.join(f'{path}/{s}' for s in stages)}")
    if path.name == "checkpoints" and saved_steps(path):
        raise FileNotFoundError(
            f"{path} holds the steps of a stage; name the stage, {path.parent}, or one of its steps"
        )
    if path.name.isdigit() and path.parent.name == "checkpoints" and path.parent.is_dir():
        there = ", ".join(map(str, saved_steps(path.parent))) or "none"
        raise FileNotFoundError(f"{path.parent}: no step {path.name}; there are {there}")
    if is_public(path):
        raise FileNotFoundError(
            f"{path} is a public pipeline directory, from which nothing can start as it is; convert it first: "
            f"python launch/convert.py --to=jax --source={path} --target=DIRECTORY"
        )
    if path.is_dir() and path.name in shipped() and path == storage.absolute(path.name):
        raise FileNotFoundError(
            f"{path} is no checkpoint, and hides the shipped one of that name; rename it, or start this elsewhere"
        )
    raise FileNotFoundError(
        f"{path} is no checkpoint: expected a run's stage directory (with checkpoints/), a step in it, a converted "
        f"directory (with {store.MODEL_FILE}), a public pipeline directory (with transformer/), or the name of a "
        f"shipped checkpoint, of which this package has {', '.join(shipped()) or 'none'}"
    )


def config_of(path: epath.Path) -> dict[str, Any]:
    """The config of a run, by the record in one of its steps, `.../checkpoints/STEP`."""
    with Checkpoints(path.parent, read_only=True) as checkpoints:
        return checkpoints.meta(int(path.name))["config"]


def sampling_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What samplers of a run's model take where they are told nothing else, see `store.read_config`."""
    data = config["data"]
    return {
        "text_length": data["text_length"],
        "size": (data["height"], data["width"]),
        "protocol": config.get("protocol", PUBLISHED_PROTOCOL),
    }


def shipped() -> list[str]:
    """Names of the checkpoints that come with the package, converted directories in its data."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{store.MODEL_FILE}"))


def tokenizer_directory(place: epath.Path) -> epath.Path:
    """Where the tokenizer is of a model that `locate` has found."""
    return (place if store.is_converted(place) else place.parent.parent) / "tokenizer"


def start_of(meta: Mapping[str, Any], stage_directory: epath.Path) -> str | None:
    """What a run started from, by the record in its checkpoints: an exact place, or None.

    A stage of the same working directory is recorded relative to it, so that the working directory can be moved.
    """
    recorded = meta["init"]
    return str(stage_directory.parent / recorded[3:]) if recorded and recorded.startswith("../") else recorded


def moved_start(meta: Mapping[str, Any], init: epath.PathLike) -> str:
    """Where a run's start is now, by a changed `init`: exactly the step that it was, whatever that run did since.

    Raises:
      FileNotFoundError: see `locate`.
      WrongStart: what is there is not what the run started from.
    """
    place, identity = locate(init), meta.get("init_identity")
    if identity is not None:
        if not store.is_converted(place):
            place = place.parent / epath.Path(meta["init"]).name
        if not agreement.primary(place.exists) or identity_of(str(place)) != identity:
            raise WrongStart(
                f"init is {init}, but {place} is not the checkpoint that this run started from, {meta['init']}; what "
                "is not trained rests on that"
            )
    return str(place)


def identity_of(start: str | None) -> dict[str, Any] | None:
    """By what another checkpoint that has taken this one's place is noticed; None if nothing was recorded."""
    if start is None:
        return None
    if store.is_converted(path := epath.Path(start)):
        return store.read_config(path).get("checksums")  # of earlier conversions there are none
    with Checkpoints(path.parent, read_only=True) as checkpoints:
        return checkpoints.checksums(int(path.name))


def check_start(meta: Mapping[str, Any], stage_directory: epath.Path) -> None:
    """Refuses to go on from a run whose start has become another: what was not trained, or a later stage, rests on it.

    A start that is gone is missed where it is read.

    Raises:
      WrongStart: naming the stage and the step that it started from.
    """
    start, recorded = start_of(meta, stage_directory), meta.get("init_identity")
    # Asked by one: where hosts see different files, some would go on to what all must do together.
    if recorded is None or not agreement.primary(lambda: epath.Path(start).exists()) or identity_of(start) == recorded:
        return
    raise WrongStart(
        f"{stage_directory} started from {start}, where another checkpoint is now: that was trained or converted anew "
        "since. Move this stage's directory away to train it anew too, or put the earlier one back"
    )


def converted_start(path: epath.Path | None) -> epath.Path | None:
    """The converted directory from which a run, and those that it goes on from, once started; None if from nothing.

    Args:
      path: of a checkpoint; None is no start.

    Raises:
      FileNotFoundError: one of the starts is gone.
    """
    return next((place for place, meta in _lineage(path) if meta is None), None)


def _lineage(path: epath.Path | None) -> Iterator[tuple[epath.Path, dict[str, Any] | None]]:
    """A checkpoint, what its run started from, and so on: its place and its record, None of a converted directory."""
    while path is not None:
        path = locate(path)
        if store.is_converted(path):
            yield path, None
            return
        with Checkpoints(path.parent, read_only=True) as checkpoints:
            meta = checkpoints.meta(int(path.name))
        yield path, meta
        start = start_of(meta, path.parent.parent)
        path = epath.Path(start) if start else None


def drawn_of(path: epath.Path | None) -> list[str]:
    """What of a model is still as it was initialised at random: PyTorch names of tensors.

    Args:
      path: as `locate` finds it; None: no start, from which all is random on purpose.

    Raises:
      FileNotFoundError: a start on the way to the converted directory is gone.
    """
    for place, meta in _lineage(path):
        if meta is None:
            return store.read_config(place).get("drawn", [])
        if not meta["config"].get("lora", {}).get("rank"):
            break  # trained since
    return []


def teacher_tokenizer_directory(named: str | None, start: epath.Path | None) -> epath.Path | None:
    """Where the tokenizer of a teacher is: where a config names it, else where it came with the weights; None: nowhere.

    Args:
      named: the config's `teacher_tokenizer`.
      start: what the run starts from, or one of its steps.

    Raises:
      FileNotFoundError: nothing is where it is named, or see `converted_start`.
    """
    if named:
        directory = storage.absolute(named)
        if not directory.is_dir():
            raise FileNotFoundError(f"teacher_tokenizer is {named}, which is no directory")
        return directory
    beside = converted_start(start)
    directory = beside / store.TEACHER_TOKENIZER if beside else None
    return directory if directory is not None and directory.is_dir() else None


def record_of(start: str | None, stage_directory: epath.Path) -> str | None:
    """The record that `start_of` reads."""
    workdir = f"{stage_directory.parent}/"
    return f"../{start.removeprefix(workdir)}" if start and start.startswith(workdir) else start
