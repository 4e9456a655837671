"""Models from directories: a run's stage, one of its steps, a converted or a public one, all read the same way."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.sharding import Mesh

from unialign_jax import agreement, lineage, parallel, storage
from unialign_jax.checkpoints import Checkpoints
from unialign_jax.convert import ConversionError, open_pipeline, store
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.networks import Networks, build_networks
from unialign_jax.saved_step import WrongArchitecture
from unialign_jax.state import OptimizerConfig
from unialign_jax.tree_checks import describe_differences, flat_leaves
from unialign_jax.tuning import Tuning

# The published length of all texts, and the side of its images: what a converted directory is sampled with.
PUBLISHED_TEXT_LENGTH = 256
PUBLISHED_IMAGE_SIZE = 512
PUBLISHED_SHIFT = 3.0  # of the noise levels of a run's samples, and of its export
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
    if lineage.is_public(directory):
        return _load_public(storage.absolute(directory), dtype, mesh)
    path = lineage.locate(directory)
    if store.is_converted(path):
        return _load_converted(path, dtype, mesh)
    return _load_step(path, dtype, average, mesh)


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
      FileNotFoundError: see `lineage.locate`.
      WrongArchitecture: the directory's networks are not those of `networks`, which is shown by name.
      ValueError: they are damaged.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here), dict(abstract)
    )
    if not jax.tree.leaves(abstract):
        return {name: {} for name in abstract}
    if source is None:

        def init(key):
            params = networks.init(key)
            return {name: params[name] for name in abstract}

        return _cast(jax.jit(init, out_shardings=_shardings(abstract))(key), abstract)
    path = lineage.locate(source)
    _check_architecture(path, networks, abstract)
    if not store.is_converted(path):
        return step_params(path, abstract, average)
    return agreement.everywhere(
        lambda: _converted_params(path, abstract), ConversionError, WrongArchitecture, ValueError
    )


# Fields that are no part of what a network computes from its parameters.
_FREE_FIELDS = {"sample_size", "min_pixels", "max_pixels"}


def _check_architecture(path: epath.Path, networks: Networks, names: Iterable[str]) -> None:
    """Refuses parameters whose shapes may fit, but that are another network's: of other heads, of other latents."""
    saved = build_networks(store.read_config(path) if store.is_converted(path) else lineage.config_of(path)["model"])
    theirs, ours = _configs(saved), _configs(networks)
    differences = [
        f"{name}.{key} is {theirs[name].get(key)!r} there and {value!r} in the config"
        for name in names
        if name in theirs
        for key, value in ours[name].items()
        if key not in _FREE_FIELDS and theirs[name].get(key) != value
    ]
    if differences:
        raise WrongArchitecture(f"{path}: its networks are not the config's: {'; '.join(differences)}")


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
            raise WrongArchitecture(f"{path}: its {name} is not the config's: {differences}")
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
    tuning = Tuning.of(meta["config"])
    # What is in float32 at first is read while there is most room.
    order = sorted(abstract, key=lambda name: not jax.tree.leaves(tuning.trained_of({name: abstract[name]})))
    return {name: _step_network(path, meta, name, abstract[name], average) for name in order}


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
        raise WrongArchitecture(f"{path}: its frozen networks are not the config's: {differences}")
    init_key, _ = jax.random.split(jax.random.key(config["seed"]))
    lineage.check_start(meta, path.parent.parent)
    start, average = lineage.start_of(meta, path.parent.parent), config.get("init_average", True)
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


def warn_of_drawn(path: epath.PathLike, drawn: Sequence[str]) -> None:
    """Warns, on the log, of a model with parts that are still as they were drawn; see `lineage.drawn_of`."""
    if drawn:
        logging.warning(
            "%s is made of weights without %d tensors of the network, such as %s, which were drawn and not trained: it "
            "is a start for training the whole model, not by LoRA, which leaves them, and none to sample from yet",
            *(path, len(drawn), drawn[0]),
        )


def _load_converted(path: epath.Path, dtype: str, mesh: Mesh | None) -> Model:
    description = store.read_config(path)
    warn_of_drawn(path, description.get("drawn", []))
    networks = build_networks(dict(description) | {"teacher": None}, dtype=dtype)
    params = {}
    for name, tree in sampled(networks, mesh).items():
        options = {"dtype": _dtypes(tree), "shardings": _shardings(tree)}
        params[name] = store.restore_network(path, name, **options) if tree else {}
    return _published(networks, params, description, lineage.tokenizer_directory(path))


def _load_public(path: epath.Path, dtype: str, mesh: Mesh | None) -> Model:
    pipeline = open_pipeline(path)
    if pipeline.tokenizer is None:
        raise FileNotFoundError(f"{path} holds no tokenizer; copy the whole pipeline directory")
    warn_of_drawn(path, pipeline.model.get("drawn", []))
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
        protocol=sampling.get("protocol", lineage.PUBLISHED_PROTOCOL),
        description=description,
        tokenizer_directory=tokenizer,
    )


def _load_step(path: epath.Path, dtype: str, average: bool, mesh: Mesh | None) -> Model:
    config = lineage.config_of(path)
    warn_of_drawn(path, lineage.drawn_of(path))
    networks = build_networks(config["model"] | {"teacher": None}, dtype=dtype)
    return Model(
        networks=networks,
        params=step_params(path, sampled(networks, mesh), average),
        tokenizer=Tokenizer.load(lineage.tokenizer_directory(path)),
        **lineage.sampling_of(config),
        shift=PUBLISHED_SHIFT,
        description=config["model"],
        tokenizer_directory=lineage.tokenizer_directory(path),
    )
