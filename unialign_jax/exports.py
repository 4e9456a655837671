"""A model's weights alone, as a directory: ours of a run, or the public PyTorch one of any model that is not."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from unialign_jax import convert, lineage, pretrained
from unialign_jax.networks import build_networks


def to_jax(
    source: epath.PathLike, target: epath.PathLike, *, average: bool = True, progress: bool = True
) -> convert.Report:
    """Writes a run's model as a converted directory: its weights alone, of all networks, in float32.

    Memory holds one network at a time, and no accelerator is needed: adapters are added, and what a run neither read
    nor trained is drawn, on the CPU.

    Args:
      source: a run's stage directory (its newest step), or a step in one; local or `gs://`.
      target: a local directory that does not exist or is empty.
      average: take the moving average of the parameters where one was kept.
      progress: whether to show a progress bar.

    Raises:
      FileNotFoundError: there is no run, or no tokenizer of its teacher where its config names one.
      ValueError: it is damaged, the target is not free, or the source is a converted directory already.
    """
    path = lineage.locate(source)
    if convert.is_converted(path):
        raise convert.ConversionError(f"{path} is a converted checkpoint already; copy it")
    config = lineage.config_of(path)
    return convert.write_jax(
        config["model"] | {"drawn": lineage.drawn_of(path)},
        _in_turn(path, config["model"], average),
        target,
        sampling=lineage.sampling_of(config),
        tokenizer=lineage.tokenizer_directory(path),
        teacher_tokenizer=_teacher_tokenizer(path, config),
        progress=progress,
    )


def to_torch(
    source: epath.PathLike, target: epath.PathLike, *, average: bool = True, progress: bool = True
) -> convert.Report:
    """Writes a model as a public PyTorch pipeline directory: of a run all but the teacher, in float32.

    Args:
      source: as of `to_jax`; or a local converted directory or a shipped checkpoint's name, which keep their dtypes.
      target, average, progress: see `to_jax`, also for what is in memory.

    Raises:
      FileNotFoundError: see `lineage.locate`.
      ValueError: it is damaged, the target is not free, or the source is a public directory already.
    """
    if lineage.is_public(source):
        raise convert.ConversionError(f"{source} is a public pipeline directory already; --to=jax goes the other way")
    path = lineage.locate(source)
    if convert.is_converted(path):
        return convert.to_torch(path, target, progress=progress)
    config = lineage.config_of(path)
    networks = _in_turn(path, config["model"] | {"teacher": None}, average)
    model = config["model"] | {"sampling": lineage.sampling_of(config), "drawn": lineage.drawn_of(path)}
    tokenizer = lineage.tokenizer_directory(path)
    return convert.write_torch(model, networks, target, tokenizer=tokenizer, progress=progress)


def _teacher_tokenizer(path: epath.Path, config: Mapping[str, Any]) -> epath.Path | None:
    """Where the tokenizer of a run's teacher is; None: it has none of its own."""
    if not config["model"].get("teacher"):
        return None
    return lineage.teacher_tokenizer_directory(config.get("teacher_tokenizer"), path)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """An array that is read when it is asked for, a `convert.exporter.Leaf`. `read` returns the whole of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.read()[index]


def _in_turn(path: epath.Path, model: Mapping[str, Any], average: bool) -> dict[str, dict[str, _Leaf]]:
    """The networks of a run's step, float32, by name and "/"-joined path.

    Reading any leaf reads its whole network, and frees the one that was read before.
    """
    here = jax.sharding.SingleDeviceSharding(_host_device())
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=here),
        nn.unbox(build_networks(model).abstract()),
    )
    held: dict[str, dict[str, jax.Array]] = {}

    def read(name: str, leaf: str) -> np.ndarray:
        if name not in held:
            held.clear()  # before the next is read, not after it
            params = pretrained.step_params(path, {name: wanted[name]}, average)[name]
            held[name] = traverse_util.flatten_dict(params, sep="/")
        return np.asarray(held[name][leaf])

    return {
        name: {
            leaf: _Leaf(x.shape, x.dtype, lambda name=name, leaf=leaf: read(name, leaf))
            for leaf, x in traverse_util.flatten_dict(tree, sep="/").items()
        }
        for name, tree in wanted.items()
    }


def _host_device() -> jax.Device:
    """A CPU, where JAX may use one: what only becomes files need not fit an accelerator."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others alone
        return jax.local_devices()[0]
