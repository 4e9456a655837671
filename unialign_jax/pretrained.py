"""Models from directories: a run's stage, one of its steps, or a converted directory, all read the same way."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath

from unialign_jax import agreement, storage
from unialign_jax.checkpoints import Checkpoints, saved_steps
from unialign_jax.convert import ConversionError, store
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.networks import Networks, build_networks
from unialign_jax.tree_checks import describe_differences, flat_leaves
from unialign_jax.tuning import Tuning

# The published length of all texts, and the side of its images: what a converted directory is sampled with.
PUBLISHED_TEXT_LENGTH = 256
PUBLISHED_IMAGE_SIZE = 512
SAMPLED = ("transformer", "text_encoder", "autoencoder")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to sample from.

    Attributes:
      networks: built in the wanted compute dtype, without the teacher.
      params: of the networks in `SAMPLED`, by name.
      tokenizer: of the text encoder.
      text_length: number of tokens of every text.
      size: (height, width) in pixels that it was trained on.
      description: config fields of the networks by name, as `networks.build_networks` takes them.
      tokenizer_directory: where the tokenizer's files are.
    """

    networks: Networks
    params: dict[str, Any]
    tokenizer: Tokenizer
    text_length: int
    size: tuple[int, int]
    description: Mapping[str, Any]
    tokenizer_directory: epath.Path


def load(
    directory: epath.PathLike, *, dtype: str = "bfloat16", param_dtype: str | None = None, average: bool = True
) -> Model:
    """Reads a model.

    Args:
      directory: local or `gs://`: a run's stage directory (its newest step), `.../checkpoints/STEP` of one, or a
        directory written by `launch/convert.py --to=jax`.
      dtype: compute dtype, "bfloat16" or "float32".
      param_dtype: dtype of the parameters; None: the compute dtype (what sampling needs).
      average: of a run, take the moving average of the parameters where one was kept.

    Raises:
      FileNotFoundError: nothing of the kind is there; the message says what was looked for.
      ValueError: it is damaged, or of another format.
    """
    path = locate(directory)
    param_dtype = jnp.dtype(param_dtype or dtype)
    load_from = _load_converted if store.is_converted(path) else _load_step
    return load_from(path, dtype, param_dtype, average)


def locate(directory: epath.PathLike) -> epath.Path:
    """Where exactly the model is that a directory stands for: a run's newest step, if it is a stage directory.

    Returns:
      A converted directory, or `.../checkpoints/STEP`.

    Raises:
      FileNotFoundError: nothing of the kind is there; the message says what was looked for.
    """
    return epath.Path(agreement.primary(lambda: str(_locate(storage.absolute(directory))), FileNotFoundError))


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
        raise FileNotFoundError(f"{path} holds several stages of a run; name one: {', '.join(stages)}")
    raise FileNotFoundError(
        f"{path} is no checkpoint: expected a run's stage directory (with checkpoints/), a step in it, or a converted "
        f"directory (with {store.MODEL_FILE})"
    )


def tokenizer_directory(place: epath.Path) -> epath.Path:
    """Where the tokenizer is of a model that `locate` has found."""
    return (place if store.is_converted(place) else place.parent.parent) / "tokenizer"


def initial_params(
    networks: Networks,
    key: jax.Array,
    abstract: Mapping[str, Any],
    source: epath.PathLike | None,
    *,
    average: bool = True,
) -> dict[str, Any]:
    """What training starts from: parameters of some networks, random or read from a directory.

    Args:
      networks: what they are for.
      key: of the random ones; the same key gives the same parameters for any choice of networks, on any mesh.
      abstract: the wanted networks by name, trees of `jax.ShapeDtypeStruct`, float32. Arrays go straight to the devices
        that their shardings name; those without to the first local one.
      source: None: random. Else see `load`. Networks that a run did not train are what they were in that run.
      average: of a run, take the moving average of the parameters where one was kept.

    Raises:
      FileNotFoundError: see `locate`.
      ValueError: the directory's networks are not those of `networks`, which is shown by name, or are damaged.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda leaf: leaf.sharding or here, dict(abstract))
    if source is None:
        init = jax.jit(lambda key: {name: networks.init(key)[name] for name in abstract}, out_shardings=shardings)
        return init(key)
    path = locate(source)
    if not store.is_converted(path):
        return _step_params(path, abstract, average)
    return agreement.everywhere(lambda: _converted_params(path, abstract, shardings), ConversionError, ValueError)


def _converted_params(path: epath.Path, abstract: Mapping[str, Any], shardings: Mapping[str, Any]) -> dict[str, Any]:
    params = {}
    for name in abstract:
        if not abstract[name]:  # the pixel codec has no parameters
            params[name] = {}
            continue
        stored = store.open_network(path, name)
        found = {tuple(leaf.split("/")): jax.ShapeDtypeStruct(x.shape, jnp.float32) for leaf, x in stored.items()}
        if differences := describe_differences(found, flat_leaves(abstract[name]), prefix=f"{name}/"):
            raise ValueError(f"{path}: its {name} is not the config's: {differences}")
        params[name] = store.restore_network(path, name, dtype=jnp.float32, shardings=shardings[name])
    return params


def _step_params(path: epath.Path, abstract: Mapping[str, Any], average: bool) -> dict[str, Any]:
    """Networks of one step of a run: what it trained from the checkpoint, the rest from where the run had it."""
    step = int(path.name)
    with Checkpoints(path.parent, read_only=True) as checkpoints:
        meta = checkpoints.meta(step)
        config = meta["config"]
        tuning = Tuning.of(config)
        which = "ema" if average and config["optimizer"]["ema_rate"] > 0 else "params"
        trained = tuning.trained_of(abstract)
        params = checkpoints.restore_params(trained, which=which, step=step) if trained else {}
    frozen = tuning.frozen_of(abstract)
    rest = {name: abstract[name] for name, tree in frozen.items() if jax.tree.leaves(tree)}
    if rest:
        networks = build_networks(config["model"])
        saved = {name: tree for name, tree in nn.unbox(networks.abstract()).items() if name in rest}
        if differences := describe_differences(flat_leaves(saved), flat_leaves(rest)):
            raise ValueError(f"{path}: its frozen networks are not the config's: {differences}")
        init_key, _ = jax.random.split(jax.random.key(config["seed"]))
        start = start_of(meta, path.parent.parent)
        frozen |= tuning.frozen_of(initial_params(networks, init_key, rest, start, average=config["init_average"]))
    return tuning.merge(frozen, params)


def start_of(meta: Mapping[str, Any], stage_directory: epath.Path) -> str | None:
    """What a run started from, by the record in its checkpoints: an exact place, or None.

    A stage of the same working directory is recorded relative to it, so that the working directory can be moved.
    """
    recorded = meta["init"]
    return str(stage_directory.parent / recorded[3:]) if recorded and recorded.startswith("../") else recorded


def record_of(start: str | None, stage_directory: epath.Path) -> str | None:
    """The record that `start_of` reads."""
    workdir = f"{stage_directory.parent}/"
    return f"../{start.removeprefix(workdir)}" if start and start.startswith(workdir) else start


def _load_converted(path: epath.Path, dtype: str, param_dtype: Any, _: bool) -> Model:
    description = store.read_config(path)
    networks = build_networks(dict(description) | {"teacher": None}, dtype=dtype)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = {
        name: store.restore_network(path, name, dtype=param_dtype, shardings=sharding)
        for name in SAMPLED
        if description.get(name)
    }
    params.setdefault("autoencoder", {})
    limit = PUBLISHED_IMAGE_SIZE
    side = min(limit, networks.transformer.config.sample_size * networks.codec.downsample)
    return Model(
        networks=networks,
        params=params,
        tokenizer=Tokenizer.load(tokenizer_directory(path)),
        text_length=PUBLISHED_TEXT_LENGTH,
        size=(side, side),
        description=description,
        tokenizer_directory=tokenizer_directory(path),
    )


def _load_step(path: epath.Path, dtype: str, param_dtype: Any, average: bool) -> Model:
    with Checkpoints(path.parent, read_only=True) as checkpoints:
        config = checkpoints.meta(int(path.name))["config"]
    networks = build_networks(config["model"] | {"teacher": None}, dtype=dtype)
    abstract = {name: tree for name, tree in nn.unbox(networks.abstract()).items() if name in SAMPLED}
    params = _step_params(path, abstract, average)
    data = config["data"]
    return Model(
        networks=networks,
        params=jax.tree.map(lambda x: x.astype(param_dtype), params),
        tokenizer=Tokenizer.load(tokenizer_directory(path)),
        text_length=data["text_length"],
        size=(data["height"], data["width"]),
        description=config["model"],
        tokenizer_directory=tokenizer_directory(path),
    )
