"""Models from directories: a run's stage, one of its steps, a converted or a public one, all read the same way."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from unialign_jax import parallel
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.convert import open_pipeline, store
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.networks import Networks, build_networks

# The published length of all texts, and the side of its images: what a converted directory is sampled with.
PUBLISHED_TEXT_LENGTH = 256
PUBLISHED_IMAGE_SIZE = 512
PUBLISHED_SHIFT = 3.0  # of the noise levels of a run's samples, and of its export
SAMPLED = ("transformer", "text_encoder", "autoencoder")
_SHIPPED = epath.Path(__file__).parent / "checkpoints_shipped"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to sample from.

    Attributes:
      networks: built in the wanted compute dtype, without the teacher.
      params: of the networks in `SAMPLED`, by name.
      tokenizer: of the text encoder.
      text_length: number of tokens of every text.
      size: (height, width) in pixels that it was trained on.
      shift: of the noise levels, see `flow_matching.euler_sigmas`.
      description: config fields of the networks by name, as `networks.build_networks` takes them.
      tokenizer_directory: where the tokenizer's files are.
    """

    networks: Networks
    params: dict[str, Any]
    tokenizer: Tokenizer
    text_length: int
    size: tuple[int, int]
    shift: float
    description: Mapping[str, Any]
    tokenizer_directory: epath.Path


def load(
    directory: epath.PathLike,
    *,
    dtype: str = "bfloat16",
    param_dtype: str | None = None,
    average: bool = True,
    mesh: Mesh | None = None,
) -> Model:
    """Reads a model.

    Args:
      directory: local or `gs://`: a run's stage directory (its newest step), `.../checkpoints/STEP` of one, a
        directory written by `launch/convert.py --to=jax`, a local public PyTorch pipeline directory, or the name of a
        checkpoint that comes with the package (`shipped`).
      dtype: compute dtype, "bfloat16" or "float32".
      param_dtype: dtype of the parameters; None: the compute dtype (what sampling needs).
      average: of a run, take the moving average of the parameters where one was kept.
      mesh: where the parameters go, split by the plan of training; None: whole on the first device.

    Raises:
      FileNotFoundError: nothing of the kind is there; the message says what was looked for.
      ValueError: it is damaged, or of another format.
    """
    path = epath.Path(directory).expanduser().resolve()
    if not path.exists() and str(directory) in shipped():
        path = _SHIPPED / str(directory)
    param_dtype = jnp.dtype(param_dtype or dtype)
    if (path / store.MODEL_FILE).exists():
        return _load_converted(path, dtype, param_dtype, mesh)
    if (path / "checkpoints").is_dir():
        return _load_run(path, None, dtype, param_dtype, average, mesh)
    if path.name.isdigit() and path.parent.name == "checkpoints" and path.is_dir():
        return _load_run(path.parent.parent, int(path.name), dtype, param_dtype, average, mesh)
    if (path / "transformer" / "config.json").exists():
        return _load_public(path, dtype, param_dtype, mesh)
    stages = sorted(p.parent.name for p in path.glob("*/checkpoints")) if path.is_dir() else []
    if stages:
        raise FileNotFoundError(f"{path} holds several stages of a run; name one: {', '.join(stages)}")
    raise FileNotFoundError(
        f"{path} is no checkpoint: expected a run's stage directory (with checkpoints/), a step in it, a converted "
        f"directory (with {store.MODEL_FILE}), a public pipeline directory (with transformer/), or the name of a "
        f"shipped checkpoint, of which this package has {', '.join(shipped()) or 'none'}"
    )


def shipped() -> list[str]:
    """Names of the checkpoints that come with the package, converted directories in its data."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{store.MODEL_FILE}"))


def initial_params(networks: Networks, key: jax.Array, names: Iterable[str], source: str | None) -> dict[str, Any]:
    """What training starts from, float32: parameters of the named networks, random or read from a directory.

    Args:
      networks: what they are for.
      key: of the random ones; the same key gives the same parameters for any choice of names.
      names: of `networks.init`'s keys.
      source: a converted directory, or None: random.

    Raises:
      ValueError: the directory's networks are not those of `networks`.
    """
    abstract = jax.eval_shape(networks.init, key)
    if source is None:
        return jax.jit(lambda key: {name: networks.init(key)[name] for name in names})(key)
    params = {}
    for name in names:
        # The pixel codec has no parameters, and then there is nothing to read.
        params[name] = _restore(epath.Path(source), name, jnp.float32) if abstract[name] else {}
        differ = _differences(params[name], abstract[name])
        if differ:
            raise ValueError(f"{source}: its {name} is not the config's: {'; '.join(differ[:10])}")
    return params


def _differences(found: Any, wanted: Any) -> list[str]:
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (found, wanted)
    ]
    return [
        f"{name} is {shapes[0].get(name, 'missing')}, expected {shapes[1].get(name, 'nothing')}"
        for name in sorted(shapes[0].keys() | shapes[1].keys())
        if shapes[0].get(name) != shapes[1].get(name)
    ]


def _restore(directory: epath.Path, network: str, dtype: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return store.restore_network(directory, network, dtype=dtype, shardings=sharding)


def _placed(networks: Networks, dtype: Any, mesh: Mesh | None) -> dict[str, Any]:
    """The networks in `SAMPLED` as trees of `jax.ShapeDtypeStruct` that say where each array goes."""
    boxed = {name: tree for name, tree in networks.abstract().items() if name in SAMPLED}
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, nn.unbox(boxed))
    else:
        shardings = parallel.param_shardings(boxed, mesh, check=False)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding), nn.unbox(boxed), shardings
    )


def _load_converted(path: epath.Path, dtype: str, param_dtype: Any, mesh: Mesh | None) -> Model:
    description = store.read_config(path)
    networks = build_networks(dict(description) | {"teacher": None}, dtype=dtype)
    wanted = _placed(networks, param_dtype, mesh)
    params = {}
    for name, tree in wanted.items():
        shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
        params[name] = store.restore_network(path, name, dtype=param_dtype, shardings=shardings) if tree else {}
    return _published(networks, params, description, path / "tokenizer")


def _load_public(path: epath.Path, dtype: str, param_dtype: Any, mesh: Mesh | None) -> Model:
    pipeline = open_pipeline(path)
    networks = build_networks(dict(pipeline.model) | {"teacher": None}, dtype=dtype)
    wanted = _placed(networks, param_dtype, mesh)
    params = {name: pipeline.read(name, tree) if tree else {} for name, tree in wanted.items()}
    if pipeline.tokenizer is None:
        raise FileNotFoundError(f"{path} holds no tokenizer; copy the whole pipeline directory")
    return _published(networks, params, pipeline.model, epath.Path(pipeline.tokenizer))


def _published(networks: Networks, params: Any, description: Mapping[str, Any], tokenizer: epath.Path) -> Model:
    side = min(PUBLISHED_IMAGE_SIZE, networks.transformer.config.sample_size * networks.codec.downsample)
    return Model(
        networks=networks,
        params=params,
        tokenizer=Tokenizer.load(tokenizer),
        text_length=PUBLISHED_TEXT_LENGTH,
        size=(side, side),
        shift=description["scheduler"]["shift"],
        description=description,
        tokenizer_directory=tokenizer,
    )


def _load_run(
    stage: epath.Path, step: int | None, dtype: str, param_dtype: Any, average: bool, mesh: Mesh | None
) -> Model:
    with Checkpoints(stage / "checkpoints", read_only=True) as checkpoints:
        config = checkpoints.meta(step)["config"]
        networks = build_networks(config["model"] | {"teacher": None}, dtype=dtype)
        wanted = _placed(networks, jnp.float32, mesh)
        average = average and config["optimizer"]["ema_rate"] > 0
        abstract = {name: tree for name, tree in wanted.items() if name in config["trained"]}
        trained = checkpoints.restore_params(abstract, which="ema" if average else "params", step=step)
    init_key, _ = jax.random.split(jax.random.key(config["seed"]))
    frozen = initial_params(networks, init_key, [n for n in SAMPLED if n not in trained], config["init"])
    params = {name: trained.get(name, frozen.get(name)) for name in SAMPLED}
    data = config["data"]
    return Model(
        networks=networks,
        params=jax.tree.map(
            lambda x, like: jax.device_put(x.astype(param_dtype), like.sharding), nn.unbox(params), wanted
        ),
        tokenizer=Tokenizer.load(stage / "tokenizer"),
        text_length=data["text_length"],
        size=(data["height"], data["width"]),
        shift=PUBLISHED_SHIFT,
        description=config["model"],
        tokenizer_directory=stage / "tokenizer",
    )
