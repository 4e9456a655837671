"""Models from directories: a run's stage, one of its steps, or a converted directory, all read the same way."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from flax import traverse_util

from unialign_jax.checkpoints import Checkpoints
from unialign_jax.convert import store
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.networks import Networks, build_networks

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
    path = epath.Path(directory).expanduser().resolve()
    param_dtype = jnp.dtype(param_dtype or dtype)
    if (path / store.MODEL_FILE).exists():
        return _load_converted(path, dtype, param_dtype)
    if (path / "checkpoints").is_dir():
        return _load_run(path, None, dtype, param_dtype, average)
    if path.name.isdigit() and path.parent.name == "checkpoints" and path.is_dir():
        return _load_run(path.parent.parent, int(path.name), dtype, param_dtype, average)
    stages = sorted(p.parent.name for p in path.glob("*/checkpoints")) if path.is_dir() else []
    if stages:
        raise FileNotFoundError(f"{path} holds several stages of a run; name one: {', '.join(stages)}")
    raise FileNotFoundError(
        f"{path} is no checkpoint: expected a run's stage directory (with checkpoints/), a step in it, or a converted "
        f"directory (with {store.MODEL_FILE})"
    )


def initial_params(networks: Networks, key: jax.Array, shardings: Mapping[str, Any], source: str | None) -> Any:
    """What training starts from, float32: parameters of the named networks, random or read from a directory.

    Each device makes or reads its own part; no host or device holds the whole.

    Args:
      networks: what they are for.
      key: of the random ones; the same key gives the same parameters for any choice of names.
      shardings: by name of the networks (`networks.init`'s keys) trees of shardings, or one sharding for all leaves.
      source: a converted directory, or None: random.

    Raises:
      ValueError: the directory's networks are not those of `networks`.
    """
    abstract = jax.eval_shape(networks.init, jax.random.key(0))
    if source is None:

        def init(key):
            params = networks.init(key)
            return {name: params[name] for name in shardings}

        return jax.jit(init, out_shardings=dict(shardings))(key)
    # The pixel codec has no parameters, and then there is nothing to read.
    names = [name for name in shardings if abstract[name]]
    for name in names:
        found = traverse_util.unflatten_dict(store.open_network(source, name), sep="/")
        if differ := _differences(found, abstract[name]):
            raise ValueError(f"{source}: its {name} is not the config's: {'; '.join(differ[:10])}")
    read = {name: store.restore_network(source, name, jnp.float32, shardings[name]) for name in names}
    return {name: read.get(name, {}) for name in shardings}


def _differences(found: Any, wanted: Any) -> list[str]:
    shapes = [
        {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (found, wanted)
    ]
    return [
        f"{name} is {shapes[0].get(name, 'missing')}, expected {shapes[1].get(name, 'nothing')}"
        for name in sorted(shapes[0].keys() | shapes[1].keys())
        if shapes[0].get(name) != shapes[1].get(name)
    ]


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _load_converted(path: epath.Path, dtype: str, param_dtype: Any) -> Model:
    description = store.read_config(path)
    networks = build_networks(dict(description) | {"teacher": None}, dtype=dtype)
    names = [name for name in SAMPLED if description.get(name)]
    params = {name: store.restore_network(path, name, param_dtype, _first_device()) for name in names}
    params.setdefault("autoencoder", {})
    limit = PUBLISHED_IMAGE_SIZE
    side = min(limit, networks.transformer.config.sample_size * networks.codec.downsample)
    return Model(
        networks=networks,
        params=params,
        tokenizer=Tokenizer.load(path / "tokenizer"),
        text_length=PUBLISHED_TEXT_LENGTH,
        size=(side, side),
        description=description,
        tokenizer_directory=path / "tokenizer",
    )


def _load_run(stage: epath.Path, step: int | None, dtype: str, param_dtype: Any, average: bool) -> Model:
    with Checkpoints(stage / "checkpoints", read_only=True) as checkpoints:
        config = checkpoints.meta(step)["config"]
        average = average and config["optimizer"]["ema_rate"] > 0
        trained = checkpoints.restore_params(which="ema" if average else "params", step=step)
    networks = build_networks(config["model"] | {"teacher": None}, dtype=dtype)
    init_key, _ = jax.random.split(jax.random.key(config["seed"]))
    rest = {name: _first_device() for name in SAMPLED if name not in trained}
    frozen = initial_params(networks, init_key, rest, config["init"])
    params = {name: trained.get(name, frozen.get(name)) for name in SAMPLED}
    data = config["data"]
    return Model(
        networks=networks,
        params=jax.tree.map(lambda x: x.astype(param_dtype), nn.unbox(params)),
        tokenizer=Tokenizer.load(stage / "tokenizer"),
        text_length=data["text_length"],
        size=(data["height"], data["width"]),
        description=config["model"],
        tokenizer_directory=stage / "tokenizer",
    )
