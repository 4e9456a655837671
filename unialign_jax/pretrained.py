"""Models from directories: a run's stage, one of its steps, a converted or a public one, all read the same way."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from unialign_jax import agreement, parallel, storage
from unialign_jax.checkpoints import Checkpoints, saved_steps
from unialign_jax.convert import ConversionError, open_pipeline, store
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.networks import Networks, build_networks
from unialign_jax.state import OptimizerConfig
from unialign_jax.tree_checks import describe_differences, flat_leaves
from unialign_jax.tuning import Tuning

# The published length of all texts, and the side of its images: what a converted directory is sampled with.
PUBLISHED_TEXT_LENGTH = 256
PUBLISHED_IMAGE_SIZE = 512
PUBLISHED_PROTOCOL = "unialignment"
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
      protocol: what it was made for, a name in `inference.presets.PROTOCOLS`.
      description: config fields of the networks by name, as `networks.build_networks` takes them.
      tokenizer_directory: where the tokenizer's files are.
    """

    networks: Networks
    params: dict[str, Any]
    tokenizer: Tokenizer
    text_length: int
    size: tuple[int, int]
    shift: float
    protocol: str
    description: Mapping[str, Any]
    tokenizer_directory: epath.Path


def load(
    directory: epath.PathLike,
    *,
    dtype: str = "bfloat16",
    average: bool = True,
    mesh: Mesh | None = None,
) -> Model:
    """Reads a model.

    Args:
      directory: local or `gs://`: a run's stage directory (its newest step), `.../checkpoints/STEP` of one, a
        directory written by `launch/convert.py --to=jax`, a local public PyTorch pipeline directory, or the name of a
        checkpoint that comes with the package (`shipped`).
      dtype: compute dtype, "bfloat16" or "float32"; that of the kernels too, as in training of what is frozen
        (`Tuning.cast_frozen_kernels`).
      average: of a run, take the moving average of the parameters where one was kept.
      mesh: where the parameters go, split by the plan of training; None: whole on the first device.

    Raises:
      FileNotFoundError: nothing of the kind is there; the message says what was looked for.
      ValueError: it is damaged, or of another format.
    """
    if is_public(directory):
        return _load_public(storage.absolute(directory), dtype, mesh)
    path = locate(directory)
    if store.is_converted(path):
        return _load_converted(path, dtype, mesh)
    return _load_step(path, dtype, average, mesh)


def is_public(directory: epath.PathLike) -> bool:
    """Whether this looks like a public PyTorch pipeline directory."""
    return (storage.absolute(directory) / "transformer" / "config.json").exists()


def is_run(directory: epath.PathLike) -> bool:
    """Whether this is a run's stage directory, or one step of a run."""
    path = storage.absolute(directory)
    return (path / "checkpoints").is_dir() or (path.name.isdigit() and path.parent.name == "checkpoints")


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
        raise FileNotFoundError(f"{path} holds several stages of a run; name one: {', '.join(stages)}")
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
      abstract: the wanted networks by name, trees of `jax.ShapeDtypeStruct` that say each array's dtype. Arrays go
        straight to the devices that their shardings name; those without to the first local one.
      source: None: random. Else see `load`. Networks that a run did not train are what they were in that run.
      average: of a run, take the moving average of the parameters where one was kept.

    Raises:
      FileNotFoundError: see `locate`.
      ValueError: the directory's networks are not those of `networks`, which is shown by name, or are damaged.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here), dict(abstract)
    )
    if source is None:

        def init(key):
            params = networks.init(key)
            return {name: params[name] for name in abstract}

        return _cast(jax.jit(init, out_shardings=_shardings(abstract))(key), abstract)
    path = locate(source)
    _check_architecture(path, networks, abstract)
    if not store.is_converted(path):
        return step_params(path, abstract, average)
    return agreement.everywhere(lambda: _converted_params(path, abstract), ConversionError, ValueError)


# Fields that are no part of what a network computes from its parameters.
_FREE_FIELDS = {"sample_size", "min_pixels", "max_pixels"}


def _check_architecture(path: epath.Path, networks: Networks, names: Iterable[str]) -> None:
    """Refuses parameters whose shapes may fit, but that are another network's: of other heads, of other latents."""
    saved = build_networks(store.read_config(path) if store.is_converted(path) else config_of(path)["model"])
    theirs, ours = _configs(saved), _configs(networks)
    differences = [
        f"{name}.{key} is {theirs[name].get(key)!r} there and {value!r} in the config"
        for name in names
        if name in theirs
        for key, value in ours[name].items()
        if key not in _FREE_FIELDS and theirs[name].get(key) != value
    ]
    if differences:
        raise ValueError(f"{path}: its networks are not the config's: {'; '.join(differences)}")


def _configs(networks: Networks) -> dict[str, dict[str, Any]]:
    """The fields of the networks' configs, by name."""
    parts = {
        "transformer": networks.transformer,
        "text_encoder": networks.text_encoder,
        "autoencoder": networks.codec,
        "teacher": networks.teacher,
    }
    return {name: dataclasses.asdict(part.config) for name, part in parts.items() if part is not None}


def _converted_params(path: epath.Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    params = {}
    for name, tree in abstract.items():
        if not tree:  # the pixel codec has no parameters
            params[name] = {}
            continue
        stored = store.open_network(path, name)
        found = {tuple(leaf.split("/")): jax.ShapeDtypeStruct(x.shape, jnp.float32) for leaf, x in stored.items()}
        if differences := describe_differences(found, flat_leaves(_in_float32(tree)), prefix=f"{name}/"):
            raise ValueError(f"{path}: its {name} is not the config's: {differences}")
        params[name] = store.restore_network(path, name, dtype=_dtypes(tree), shardings=_shardings(tree))
    return params


def step_params(path: epath.Path, abstract: Mapping[str, Any], average: bool) -> dict[str, Any]:
    """Networks of one step of a run.

    They are read one after the other: of what is wanted in another dtype, memory holds one network in float32.

    Args:
      path: `.../checkpoints/STEP`.
      abstract: see `initial_params`; every array has a sharding.
      average: take the moving average of the parameters where one was kept.

    Raises:
      FileNotFoundError, ValueError: see `initial_params`.
    """
    with Checkpoints(path.parent, read_only=True) as checkpoints:
        meta = checkpoints.meta(int(path.name))
    return {name: _step_network(path, meta, name, tree, average) for name, tree in abstract.items()}


def _step_network(path: epath.Path, meta: Mapping[str, Any], name: str, wanted: Any, average: bool) -> dict[str, Any]:
    """A network of a step: what the run trained of it from the checkpoint, the rest from where the run had it."""
    tuning = Tuning.of(meta["config"])
    if not jax.tree.leaves(tuning.trained_of({name: wanted})):
        return _frozen_network(path, meta, name, wanted)
    whole = {name: _in_float32(wanted)}  # as it was saved, and as adapters are added
    kept = meta["config"].get("optimizer", {}).get("ema_rate", OptimizerConfig.ema_rate) > 0
    which = "ema" if average and kept else "params"
    with Checkpoints(path.parent, read_only=True) as checkpoints:
        trained = checkpoints.restore_params(tuning.trained_of(whole), which=which, step=int(path.name))
    frozen = tuning.frozen_of(whole)
    if frozen:
        frozen = tuning.frozen_of({name: _frozen_network(path, meta, name, whole[name])})
    return _cast(tuning.merge(frozen, trained)[name], wanted)


def _frozen_network(path: epath.Path, meta: Mapping[str, Any], name: str, wanted: Any) -> dict[str, Any]:
    """A network as it was when the run of a step started."""
    if not wanted:  # the pixel codec has no parameters
        return {}
    config = meta["config"]
    networks = build_networks(config["model"])
    had = {key: tree for key, tree in nn.unbox(networks.abstract()).items() if key == name}
    if differences := describe_differences(flat_leaves(had), flat_leaves({name: _in_float32(wanted)})):
        raise ValueError(f"{path}: its frozen networks are not the config's: {differences}")
    init_key, _ = jax.random.split(jax.random.key(config["seed"]))
    check_start(meta, path.parent.parent)
    start, average = start_of(meta, path.parent.parent), config.get("init_average", True)
    return initial_params(networks, init_key, {name: wanted}, start, average=average)[name]


def _in_float32(abstract: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), abstract)


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _dtypes(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.dtype, abstract)


def _cast(params: Any, abstract: Any) -> Any:
    """Parameters that nobody else holds in the dtypes of `abstract`; each is freed as soon as it is cast."""

    def cast(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if x.dtype == like.dtype:
            return x
        made = x.astype(like.dtype)
        x.delete()
        return made

    return jax.tree.map(cast, params, abstract)


def start_of(meta: Mapping[str, Any], stage_directory: epath.Path) -> str | None:
    """What a run started from, by the record in its checkpoints: an exact place, or None.

    A stage of the same working directory is recorded relative to it, so that the working directory can be moved.
    """
    recorded = meta["init"]
    return str(stage_directory.parent / recorded[3:]) if recorded and recorded.startswith("../") else recorded


def identity_of(start: str | None) -> dict[str, Any] | None:
    """What tells a run's step from another that may later be at the same place; None of anything else."""
    if start is None or store.is_converted(path := epath.Path(start)):
        return None
    with Checkpoints(path.parent, read_only=True) as checkpoints:
        return checkpoints.checksums(int(path.name))


def check_start(meta: Mapping[str, Any], stage_directory: epath.Path) -> None:
    """Refuses to go on from a run whose start has become another: what was not trained, or a later stage, rests on it.

    A start that is gone is missed where it is read.

    Raises:
      ValueError: naming the stage and the step that it started from.
    """
    start, recorded = start_of(meta, stage_directory), meta.get("init_identity")
    if recorded is None or not epath.Path(start).exists() or identity_of(start) == recorded:
        return
    raise ValueError(
        f"{stage_directory} started from {start}, where another checkpoint is now: that stage was trained anew since. "
        "Move this stage's directory away to train it anew too, or put the earlier one back"
    )


def converted_start(path: epath.Path | None) -> epath.Path | None:
    """The converted directory from which a run, and those that it goes on from, once started; None if from nothing.

    Args:
      path: of a checkpoint; None is no start.

    Raises:
      FileNotFoundError: one of the starts is gone.
    """
    while path is not None and not store.is_converted(path := locate(path)):
        with Checkpoints(path.parent, read_only=True) as checkpoints:
            start = start_of(checkpoints.meta(int(path.name)), path.parent.parent)
        path = epath.Path(start) if start else None
    return path


def record_of(start: str | None, stage_directory: epath.Path) -> str | None:
    """The record that `start_of` reads."""
    workdir = f"{stage_directory.parent}/"
    return f"../{start.removeprefix(workdir)}" if start and start.startswith(workdir) else start


def sampled(networks: Networks, mesh: Mesh | None) -> dict[str, Any]:
    """The networks in `SAMPLED` as trees of `jax.ShapeDtypeStruct`: in which dtype each array is, and where it goes."""
    boxed = {name: tree for name, tree in networks.abstract().items() if name in SAMPLED}
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, nn.unbox(boxed))
    else:
        shardings = parallel.param_shardings(boxed, mesh, check=False)
    placed = jax.tree.map(parallel.placed, nn.unbox(boxed), shardings)
    return Tuning(trained=()).cast_frozen_kernels(placed, jnp.dtype(networks.transformer.dtype))


def _load_converted(path: epath.Path, dtype: str, mesh: Mesh | None) -> Model:
    description = store.read_config(path)
    networks = build_networks(dict(description) | {"teacher": None}, dtype=dtype)
    params = {}
    for name, tree in sampled(networks, mesh).items():
        options = {"dtype": _dtypes(tree), "shardings": _shardings(tree)}
        params[name] = store.restore_network(path, name, **options) if tree else {}
    return _published(networks, params, description, tokenizer_directory(path))


def _load_public(path: epath.Path, dtype: str, mesh: Mesh | None) -> Model:
    pipeline = open_pipeline(path)
    if pipeline.tokenizer is None:
        raise FileNotFoundError(f"{path} holds no tokenizer; copy the whole pipeline directory")
    networks = build_networks(dict(pipeline.model) | {"teacher": None}, dtype=dtype)
    wanted = sampled(networks, mesh)
    params = {name: pipeline.read(name, tree) if tree else {} for name, tree in wanted.items()}
    return _published(networks, params, pipeline.model, epath.Path(pipeline.tokenizer))


def _published(networks: Networks, params: Any, description: Mapping[str, Any], tokenizer: epath.Path) -> Model:
    side = min(PUBLISHED_IMAGE_SIZE, networks.transformer.config.sample_size * networks.codec.downsample)
    sampling = description.get("sampling", {})  # of a model trained here
    return Model(
        networks=networks,
        params=params,
        tokenizer=Tokenizer.load(tokenizer),
        text_length=sampling.get("text_length", PUBLISHED_TEXT_LENGTH),
        size=tuple(sampling.get("size", (side, side))),
        shift=description["scheduler"]["shift"],
        protocol=sampling.get("protocol", PUBLISHED_PROTOCOL),
        description=description,
        tokenizer_directory=tokenizer,
    )


def _load_step(path: epath.Path, dtype: str, average: bool, mesh: Mesh | None) -> Model:
    config = config_of(path)
    networks = build_networks(config["model"] | {"teacher": None}, dtype=dtype)
    return Model(
        networks=networks,
        params=step_params(path, sampled(networks, mesh), average),
        tokenizer=Tokenizer.load(tokenizer_directory(path)),
        **sampling_of(config),
        shift=PUBLISHED_SHIFT,
        description=config["model"],
        tokenizer_directory=tokenizer_directory(path),
    )
