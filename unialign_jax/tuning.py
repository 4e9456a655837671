"""Which parameters a run trains: whole networks, parts of them by name, or low-rank adapters beside them (LoRA).

Everything here is a function of parameter trees: what is trained and what is frozen are two trees that `merge` makes one
again, inside the loss and wherever a whole model is wanted. Networks know nothing of it.
"""

import dataclasses
import fnmatch
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

Params = Any
ADAPTERS = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685): a kernel `[..., in, out]` is used as `kernel + alpha / rank * a @ b`.

    Attributes:
      rank: of the update: `a` is `[..., in, rank]`, `b` is `[..., rank, out]`. Kernels that are stacked over blocks have
        one pair for each block.
      targets: patterns as in `Tuning`; the linear kernels that they match get adapters.
      alpha: see above; None: the rank, so that the factor is 1.
    """

    rank: int
    targets: tuple[str, ...] = ("transformer/blocks/*/query", "transformer/blocks/*/key", "transformer/blocks/*/value")
    alpha: float | None = None

    def __post_init__(self):
        if self.rank < 1 or not self.targets:
            raise ValueError(f"rank is {self.rank} and targets {self.targets}; expected 1 or more of each")

    @property
    def scale(self) -> float:
        """Factor of `a @ b`."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The split of a model's parameters in trained and frozen ones.

    Patterns are those of file names (`*`, `?`, `[…]`) on paths such as `transformer/blocks/image/query/kernel`; one
    that matches a path also matches all below it, so that a network's name stands for the whole network.

    Attributes:
      trained: patterns of what is trained.
      frozen: patterns of what is not, although `trained` matches it.
      lora: train adapters, and only these; `trained` and `frozen` then have no effect.
    """

    trained: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    lora: LoraConfig | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a saved run config, where sections are mappings and tuples may be lists."""
        lora = config.get("lora")
        if lora:
            lora = LoraConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in lora.items()})
        return cls(tuple(config["trained"]), tuple(config.get("frozen", ())), lora or None)

    def split(self, params: Params, key: jax.Array) -> tuple[Params, Params]:
        """`(trained, frozen)`: nested dicts that hold every leaf once, and with LoRA new adapters as what is trained.

        Args:
          params: parameters of some or all networks by name; arrays, or boxes with logical axis names, which adapters
            inherit from their kernels.
          key: of the adapters' first values. The update is zero at first.
        """
        trained, frozen = {}, {}
        for path, leaf in flax.traverse_util.flatten_dict(dict(params), keep_empty_nodes=True).items():
            name = "/".join(path)
            if leaf is flax.traverse_util.empty_node or not self._is_changed(name):
                frozen[path] = leaf
            elif self.lora is None:
                trained[path] = leaf
            else:
                frozen[path] = leaf
                pair = _new_adapter(leaf, self.lora.rank, jax.random.fold_in(key, zlib.crc32(name.encode())))
                trained |= {(*path, part): value for part, value in zip(ADAPTERS, pair, strict=True)}
        return flax.traverse_util.unflatten_dict(trained), flax.traverse_util.unflatten_dict(frozen)

    def merge(self, frozen: Params, trained: Params) -> Params:
        """The whole model of both parts, adapters added to their kernels; inverse of `split`, and differentiable."""
        return merge(frozen, trained, lora_scale=self.lora.scale if self.lora else 1.0)

    def check(self, params: Params) -> None:
        """Refuses patterns that match nothing of a model's parameters (all networks), and a split that trains nothing.

        Raises:
          ValueError: naming the pattern, and names that would match.
        """
        flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
        for key in ("trained", "frozen") if self.lora is None else ("lora.targets",):
            for pattern in self.lora.targets if self.lora else getattr(self, key):
                if not (found := [name for name in flat if _matches(name, (pattern,))]):
                    raise ValueError(
                        f"{key}: {pattern!r} matches no parameter of the model; it has {', '.join(params)}, and names "
                        f"such as {', '.join(list(flat)[:: max(len(flat) // 4, 1)][:4])}"
                    )
                if self.lora and not any(map(self._is_changed, found)):
                    raise ValueError(f"{key}: {pattern!r} matches no linear kernel, only {', '.join(found[:4])}")
        if not any(map(self._is_changed, flat)):
            raise ValueError(f"trained {self.trained} without frozen {self.frozen} leaves nothing to train")

    def _is_changed(self, name: str) -> bool:
        if self.lora:
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


def _new_adapter(kernel: Any, rank: int, key: jax.Array) -> tuple[Any, Any]:
    """`(a, b)` of a kernel `[..., in, out]`: a of variance 1 / in, b zeros. Their outer axes are split as the kernel's."""
    boxed = isinstance(kernel, nn.LogicallyPartitioned)
    *stacked, inputs, outputs = (kernel.value if boxed else kernel).shape
    a = jax.random.normal(key, (*stacked, inputs, rank)) * inputs**-0.5
    b = jnp.zeros((*stacked, rank, outputs))
    if not boxed:
        return a, b
    *names, of_inputs, of_outputs = kernel.names
    return (
        nn.LogicallyPartitioned(a, (*names, of_inputs, None)),
        nn.LogicallyPartitioned(b, (*names, None, of_outputs)),
    )
