"""From public PyTorch checkpoints to the converted directory (`store`)."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from tokenizers import Tokenizer

from unialign_jax import storage
from unialign_jax.convert import configs, names, sources, store, workspace
from unialign_jax.convert.errors import ConversionError
from unialign_jax.convert.load import read_part
from unialign_jax.convert.names import Row
from unialign_jax.convert.sources import Component
from unialign_jax.convert.tensors import Tensor, nbytes
from unialign_jax.networks import build_networks

MASK_TOKEN = "<extra_id_0>"  # T5's first sentinel
T5_VOCABULARY = 32100  # ids of T5's own tokenizer


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
      target: the new directory.
      sizes: network -> bytes written.
      initialised: PyTorch names of the transformer's tensors that the source does not hold, or holds only in part.
      dropped: PyTorch names of the source's tensors that have no place in the network.
      mask_as_stored: whether the mask token's embedding is that of the source's text encoder.
    """

    target: pathlib.Path
    sizes: dict[str, int]
    initialised: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    mask_as_stored: bool = False

    def __str__(self) -> str:
        lines = [f"{network}: {size / 1e6:,.1f} MB" for network, size in self.sizes.items()]
        if self.initialised:
            lines.append(f"initialised, because the source lacks them: {', '.join(self.initialised)}")
        if self.dropped:
            lines.append(f"dropped, because the network has no place for them: {', '.join(self.dropped)}")
        if self.mask_as_stored:
            lines.append("the mask token's embedding is the text encoder's; a learned one is given with --mask_token")
        return "\n".join([*lines, f"wrote {self.target}"])


def local_path(path: epath.PathLike, what: str) -> pathlib.Path:
    """A path of a conversion without `~`. Links are kept: what one leads to may be named otherwise (download caches).

    Args:
      path: as the caller gave it.
      what: what it is for: "target", or the name of something that is read.

    Raises:
      ConversionError: it is in an object store.
    """
    if storage.is_remote(path):
        advice = "give a local directory, and copy that afterwards" if what == "target" else "copy it here first"
        raise ConversionError(f"{what} {path}: weights are converted on local disks; {advice}")
    return pathlib.Path(path).expanduser()


def to_jax(
    source: epath.PathLike,
    target: epath.PathLike,
    *,
    mask_token: epath.PathLike | None = None,
    teacher: epath.PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Converts a public pipeline directory. Memory holds a few of the largest tensor, whatever the size of the whole.

    Args:
      source: local, as all paths here: a UniAlignment or D-DiT pipeline, or a plain SD3 one (with its
        `text_encoder_3`); what the latter two lack is initialised, see `completion`.
      target: a directory that does not exist or is empty.
      mask_token: `.pth` file of the mask token's learned embedding, which takes its row of the text encoder's table.
      teacher: a whole Qwen2.5-VL, of which the vision tower and the embedding table are taken. By default the
        `teacher/` of the source, if there is one.
      seed: of what is initialised.
      progress: whether to show a progress bar on standard error.

    Raises:
      ConversionError: if anything of the source is missing, not understood, or cannot be honoured. No target is left.
    """
    source, target = local_path(source, "source"), local_path(target, "target")
    mask_token = None if mask_token is None else local_path(mask_token, "mask_token")
    teacher = None if teacher is None else local_path(teacher, "teacher")
    workspace.check_target(target)
    folders = _Folders.find(source, teacher)
    components = _open(folders, mask_token, seed)
    sources.raise_problems(list(components.values()))
    model = _model(folders, components)
    sizes = {network: _written_bytes(part) for network, part in components.items()}
    with (
        workspace.new_directory(target, sum(sizes.values())) as partial,
        workspace.progress_bar(sum(sizes.values()), progress) as bar,
    ):
        checksums = {}
        for network, part in components.items():
            streams = {row.path: _stream(row, part.tensors, bar.update) for row in part.rows}
            checksums[network] = store.save_network(partial / network, streams)
        workspace.copy_tokenizer(folders.tokenizer, partial / "tokenizer")
        workspace.copy_tokenizer(folders.teacher, partial / store.TEACHER_TOKENIZER)
        configs.write_json(partial / store.MODEL_FILE, model | {"checksums": checksums})
    transformer = components["transformer"]
    return Report(target, sizes, transformer.initialised, transformer.dropped, mask_token is None)


@dataclasses.dataclass(frozen=True)
class PublicPipeline:
    """A public pipeline directory, opened; nothing of its tensors is read yet.

    Attributes:
      model: config fields of the networks by name, as `networks.build_networks` takes them.
      tokenizer: directory of the text encoder's, or None.
    """

    model: dict[str, Any]
    tokenizer: pathlib.Path | None
    _components: dict[str, Component]

    def read(self, network: str, abstract: Any) -> dict[str, Any]:
        """A network's parameters as jax arrays, read leaf by leaf: each host keeps its own parts of one at a time.

        Args:
          network: one of the model.
          abstract: tree of `jax.ShapeDtypeStruct` with the wanted dtypes and shardings.
        """
        component = self._components[network]
        wanted = traverse_util.flatten_dict(abstract, sep="/")
        leaves = {}
        for row in component.rows:
            parts = [read_part(row, component.tensors[name]) for name in row.names]
            like = wanted[row.path]
            value = (np.stack(parts) if row.layers else parts[0]).astype(like.dtype, copy=False)
            leaves[row.path] = jax.make_array_from_callback(value.shape, like.sharding, lambda index, x=value: x[index])
        return traverse_util.unflatten_dict(leaves, sep="/")


def open_pipeline(source: epath.PathLike) -> PublicPipeline:
    """Opens a local public pipeline directory, as `to_jax` does, without writing anything.

    Raises:
      ConversionError: see `to_jax`. Also for SD3 and D-DiT directories that lack tensors: a model can't be sampled with
        parts that were drawn.
    """
    source = local_path(source, "public pipeline directory")
    folders = _Folders.find(source, None)
    components = _open(folders, None, 0)
    sources.raise_problems(list(components.values()))
    if drawn := _drawn(components):
        raise ConversionError(
            f"{source} lacks {len(drawn)} tensors of the network, such as {drawn[0]}: training starts from "
            "it (launch/convert.py --to=jax prepares it), but it is no model to sample from"
        )
    return PublicPipeline(_model(folders, components), folders.tokenizer, components)


@dataclasses.dataclass(frozen=True)
class _Folders:
    """Where the parts of a pipeline directory are; `tokenizer` and `teacher` may be None."""

    source: pathlib.Path
    transformer: pathlib.Path
    text_encoder: pathlib.Path
    vae: pathlib.Path
    scheduler: pathlib.Path
    tokenizer: pathlib.Path | None
    teacher: pathlib.Path | None

    @classmethod
    def find(cls, source: pathlib.Path, teacher: pathlib.Path | None) -> "_Folders":
        """Raises ConversionError for anything but a pipeline directory of this family."""
        if not source.is_dir():
            raise ConversionError(f"{source} is not a directory; expected a pipeline directory with transformer/ in it")
        if (source / store.MODEL_FILE).exists():
            raise ConversionError(f"{source} is a converted checkpoint already; --to=torch goes the other way")
        if not (source / "transformer").is_dir():
            index = source / "model_index.json"
            said = f", which calls itself {configs.read_json(index).get('_class_name')}," if index.exists() else ""
            inside = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
            raise ConversionError(
                f"{source}{said} holds no transformer/ (it holds {inside}); expected a UniAlignment, D-DiT or SD3 "
                "pipeline directory"
            )
        # SD3 has CLIP under the plain names, and T5 third.
        suffix = "_3" if (source / "text_encoder_3").is_dir() else ""
        folders = {
            "transformer": source / "transformer",
            "text_encoder": source / f"text_encoder{suffix}",
            "vae": source / "vae",
            "scheduler": source / "scheduler",
        }
        absent = [f"{folder.name}/" for folder in folders.values() if not folder.is_dir()]
        if absent:
            raise ConversionError(f"{source} holds no {' and no '.join(absent)}; copy the whole pipeline directory")
        tokenizer = source / f"tokenizer{suffix}"
        if teacher is None and (source / "teacher").is_dir():
            teacher = source / "teacher"
        return cls(source, **folders, tokenizer=tokenizer if tokenizer.is_dir() else None, teacher=teacher)


def _open(folders: _Folders, mask_token: pathlib.Path | None, seed: int) -> dict[str, Component]:
    """All networks, in the order in which they are written."""
    components = {}
    teacher = None if folders.teacher is None else sources.open_teacher(folders.teacher)
    absent = _vocabulary(folders)
    if teacher is not None:
        absent["semantic_dim"] = teacher.fields["out_hidden_size"]
    transformer = components["transformer"] = sources.open_transformer(folders.transformer, absent, seed)
    mask_token_id = transformer.fields["mask_token_id"]
    components["text_encoder"] = sources.open_text_encoder(folders.text_encoder, mask_token, mask_token_id)
    if not configs.is_pixel_codec(folders.vae / "config.json"):
        components["autoencoder"] = sources.open_autoencoder(folders.vae)
    if teacher is not None:
        components["teacher"] = teacher
    return components


def _vocabulary(folders: _Folders) -> dict[str, Any]:
    """Size of the text head's vocabulary and the mask's id: the public code takes both from the tokenizer."""
    size, mask = sources.read_fields(folders.text_encoder, "text_encoder")["vocab_size"], None
    file = None if folders.tokenizer is None else folders.tokenizer / "tokenizer.json"
    if file is not None and file.exists():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ConversionError(f"{file} cannot be read as a tokenizer: {error}") from error
        size, mask = tokenizer.get_vocab_size(), tokenizer.token_to_id(MASK_TOKEN)
    # T5's embedding table has more rows than its tokenizer has ids.
    size = configs.read_json(folders.transformer / "config.json").get("vocab_size", min(size, T5_VOCABULARY))
    return {"vocab_size": size, "mask_token_id": size - 1 if mask is None else mask}


def _model(folders: _Folders, components: dict[str, Component]) -> dict[str, Any]:
    """What goes into model.json. Raises ConversionError if the networks do not fit together."""
    model: dict[str, Any] = {network: part.fields for network, part in components.items()}
    if "autoencoder" not in components:
        model["pixel_codec"] = sources.read_fields(folders.vae, "pixel_codec")
    try:
        build_networks(model)
    except ValueError as error:
        raise ConversionError(f"{folders.source}: its networks do not fit together: {error}") from error
    file = folders.scheduler / "scheduler_config.json"
    model["scheduler"] = configs.from_public("scheduler", configs.read_json(file), file)
    model["dtypes"] = {
        network: sorted({str(tensor.dtype) for tensor in part.tensors.values()}) for network, part in components.items()
    }
    index = folders.source / "model_index.json"
    model["pipeline"] = configs.pipeline_classes(configs.read_json(index) if index.exists() else {})
    drawn, file = _drawn(components), folders.source / store.SAMPLING_FILE
    if file.exists():
        sampling = configs.read_json(file)
        drawn += sampling.pop("drawn", [])
        if sampling:
            configs.check_fields("sampling", sampling, file)
            model["sampling"] = sampling
    if drawn:
        model["drawn"] = drawn
    return {**store.HEADER, **model}


def _drawn(components: dict[str, Component]) -> list[str]:
    """PyTorch names of what sampling needs and the source lacks."""
    return [name for name in components["transformer"].initialised if "siglip_adapter" not in name]


def _written_bytes(component: Component) -> int:
    """Of a network's leaves, of which the position table is smaller than its tensor."""
    return sum(math.prod(row.jax_shape) * component.tensors[row.names[0]].dtype.itemsize for row in component.rows)


def _stream(row: Row, tensors: dict[str, Tensor], done: Callable[[int], object]) -> store.Stream:
    """A leaf of our tree, read and laid out as it is written; `done` is called with the bytes of each written piece."""
    parts = [tensors[name] for name in row.names]
    shape, dtype = row.jax_shape, parts[0].dtype
    if row.layers:
        rows = 1
    elif row.layout is names.SAME:  # rows stay rows, so that a large table can go in pieces
        rows = min(shape[0], max(1, store.CHUNK_BYTES // (nbytes(parts[0]) // shape[0])))
    else:
        rows = shape[0]

    def pieces() -> Iterator[np.ndarray]:
        if row.layers:
            made = (read_part(row, part)[None] for part in parts)
        elif row.layout is names.SAME:
            made = (parts[0].read(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows))
        else:
            made = iter([read_part(row, parts[0])])
        for piece in made:
            yield piece
            done(piece.nbytes)

    return store.Stream(shape, dtype, rows, pieces)
