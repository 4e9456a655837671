"""Which parameters a run trains: whole networks, parts of them by name, or low-rank adapters beside them (LoRA).

Everything here is a function of parameter trees: what is trained and what is frozen are two trees that `merge` makes
one again, inside the loss and wherever a whole model is wanted. Networks know nothing of it.
"""

import dataclasses
import fnmatch
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from unialign_jax import typed

Params = Any
ADAPTERS = ("lora_a", "lora_b")
FLOAT32_LAYERS = ("autoencoder/*/conv_out",)  # see `models.autoencoder`


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685): a kernel `[..., in, out]` is used as `kernel + alpha / rank * a @ b`.

    Attributes:
      rank: of the update: `a` is `[..., in, rank]`, `b` is `[..., rank, out]`. Kernels that are stacked over blocks
        have one pair for each block. 0: no adapters.
      targets: patterns as in `Tuning`; the linear kernels that they match get adapters.
      alpha: see above; None: the rank, so that the factor is 1.
    """

    rank: int = 0
    targets: tuple[str, ...] = tuple(f"transformer/blocks/*/{name}" for name in ("query", "key", "value", "out"))
    alpha: float | None = None

    def __post_init__(self):
        if self.rank < 0 or not self.targets:
            raise ValueError(f"rank is {self.rank}, expected 0 or more; targets {self.targets}, expected 1 or more")

    @property
    def scale(self) -> float:
        """Factor of `a @ b`."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The split of a model's parameters in trained and frozen ones.

    Patterns are those of file names (`*`, `?`, `[…]`) on paths such as `transformer/blocks/image/query/kernel`; one
    that matches a path also matches all below it, so that a network's name stands for the whole network.

    Attributes:
      trained: patterns of what is trained.
      frozen: patterns of what is not, although `trained` matches it.
      lora: with a rank, adapters are trained, and only these: `trained` and `frozen` then have no effect.
    """

    trained: tuple[str, ...] = ("transformer",)
    frozen: tuple[str, ...] = ()
    lora: LoraConfig = LoraConfig()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a saved run config, where sections are mappings and tuples may be lists."""
        return typed.build(cls, {key: config[key] for key in ("trained", "frozen", "lora") if key in config})

    def trained_of(self, params: Params, key: jax.Array | None = None) -> Params:
        """What is trained of a model, as nested dicts: some of its leaves, or with LoRA new adapters for some of them.

        Args:
          params: parameters of some or all networks by name: arrays, or `jax.ShapeDtypeStruct`s with shardings.
            Adapters of the latter are such again, split as their kernels are, and whole along the rank.
          key: of the first values of adapters that are arrays. The update is zero at first.
        """
        trained = {}
        for path, leaf in _flat(params):
            name = "/".join(path)
            if not self._is_changed(name):
                continue
            if not self.lora.rank:
                trained[path] = leaf
            else:
                pair = _adapters(leaf, self.lora.rank, key if key is None else _fold(key, name))
                trained |= {(*path, part): value for part, value in zip(ADAPTERS, pair, strict=True)}
        return flax.traverse_util.unflatten_dict(trained)

    def frozen_of(self, params: Params) -> Params:
        """The leaves of a model that stay as they are, with LoRA all of them, as nested dicts."""
        kept = {path: leaf for path, leaf in _flat(params) if self.lora.rank or not self._is_changed("/".join(path))}
        return flax.traverse_util.unflatten_dict(kept)

    def cast_frozen_kernels(self, abstract: Params, dtype: jnp.dtype) -> Params:
        """A model's description with `dtype` for the kernels of linear layers and convolutions that are not changed.

        Layers cast them to their compute dtype anyway. Biases, norms and tables are small or used as they are, and so
        is what computes in float32 always (`FLOAT32_LAYERS`).

        Args:
          abstract: `jax.ShapeDtypeStruct`s of some or all networks by name, float32.
          dtype: the compute dtype.
        """

        def cast(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if not name.endswith("/kernel") or _matches(name, FLOAT32_LAYERS) or self._is_changed(name):
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

        return jax.tree.map_with_path(cast, abstract)

    def merge(self, frozen: Params, trained: Params) -> Params:
        """The whole model of both parts, adapters added to their kernels; differentiable."""
        return merge(frozen, trained, lora_scale=self.lora.scale)

    def check(self, params: Params) -> None:
        """Refuses patterns that match nothing of a model's parameters (all networks), and a split that trains nothing.

        Raises:
          ValueError: naming the pattern, and names that would match.
        """
        flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
        wanted = {"trained": self.trained, "frozen": self.frozen}
        if self.lora.rank:
            wanted = {"lora.targets": self.lora.targets}
        for key, pattern in ((key, pattern) for key, patterns in wanted.items() for pattern in patterns):
            found = [name for name in flat if _matches(name, (pattern,))]
            if not found:
                raise ValueError(
                    f"{key}: {pattern!r} matches no parameter of the model, which has {', '.join(params)} with names "
                    f"such as {', '.join(list(flat)[:: max(len(flat) // 4, 1)][:4])}"
                )
            if self.lora.rank and not any(map(self._is_changed, found)):
                raise ValueError(f"{key}: {pattern!r} matches no linear kernel, only {', '.join(found[:4])}")
        if not any(map(self._is_changed, flat)):
            raise ValueError(f"trained {self.trained} without frozen {self.frozen} leaves nothing to train")

    def _is_changed(self, name: str) -> bool:
        if self.lora.rank:
            return name.endswith("/kernel") and _matches(name, self.lora.targets)
        return _matches(name, self.trained) and not _matches(name, self.frozen)


def merge(frozen: Params, trained: Params, *, lora_scale: float = 1.0) -> Params:
    """Two nested dicts as one. Where one has an array and the other its adapters, the adapted array stands."""
    if not isinstance(frozen, Mapping):
        a, b = (trained[part] for part in ADAPTERS)
        return frozen + lora_scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    both = {name: merge(frozen[name], trained[name], lora_scale=lora_scale) for name in frozen.keys() & trained.keys()}
    return {**frozen, **trained, **both}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}/*") for p in patterns)


def _flat(params: Params) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Path and leaf; a network without parameters (the pixel codec) counts as a leaf."""
    return flax.traverse_util.flatten_dict(dict(params), keep_empty_nodes=True).items()


def _fold(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _adapters(kernel: Any, rank: int, key: jax.Array | None) -> tuple[Any, Any]:
    """`(a, b)` of a kernel `[..., in, out]`: a of variance 1 / in, b zeros."""
    *stacked, inputs, outputs = kernel.shape
    shapes = ((*stacked, inputs, rank), (*stacked, rank, outputs))
    if not isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.random.normal(key, shapes[0]) * inputs**-0.5, jnp.zeros(shapes[1])
    shardings = (kernel.sharding,) * 2
    if isinstance(kernel.sharding, NamedSharding):
        mesh, spec = kernel.sharding.mesh, kernel.sharding.spec
        *outer, of_inputs, of_outputs = (*spec, *(None,) * (len(kernel.shape) - len(spec)))
        specs = (PartitionSpec(*outer, of_inputs, None), PartitionSpec(*outer, None, of_outputs))
        shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    return tuple(jax.ShapeDtypeStruct(x, kernel.dtype, sharding=y) for x, y in zip(shapes, shardings, strict=True))
