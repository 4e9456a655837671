"""What a run's caches must have been made with: of its data by their settings, of its networks by their weights."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from unialign_jax import storage
from unialign_jax.data.caches import Cache, Caches
from unialign_jax.data.tokenizer import PlainTokenizer, Tokenizer
from unialign_jax.networks import Networks, Params
from unialign_jax.training.run_config import CACHED, ConfigError, RunConfig
from unialign_jax.tree_checks import checksum


def caches_of(
    run: RunConfig, networks: Networks, tokenizer: Tokenizer, teacher_tokenizer: PlainTokenizer | None
) -> Caches | None:
    """Where a run's caches are, and all settings that they must have; None where it has none.

    Raises:
      ConfigError: parts are cached, but not where.
    """
    if not run.cached:
        return None
    if run.cache_directory is None:
        raise ConfigError(
            f"cached is {', '.join(run.cached)}, but cache_directory is not set; make caches with launch/precompute.py "
            "--target=DIR and set --config.cache_directory=DIR"
        )
    every = {
        "latents": lambda: _fields("autoencoder", networks.codec.config),
        "instructions": lambda: {
            **_fields("text_encoder", networks.text_encoder.config),
            "tokenizer": tokenizer.fingerprint(),
            "text_length": run.data.text_length,
        },
        "teacher": lambda: {
            **_fields("teacher", networks.teacher.config),
            "teacher_tokenizer": teacher_tokenizer.fingerprint(),
            "teacher_length": run.data.teacher_length,
        },
    }
    settings = {part: every[part]() | {"dtype": run.dtype} for part in run.cached}
    return Caches(str(storage.absolute(run.cache_directory)), run.source_names, settings)


def _fields(network: str, config: Any) -> dict[str, Any]:
    return {f"{network}.{name}": value for name, value in dataclasses.asdict(config).items()}


def weights(parts: Iterable[str], params: Params) -> dict[str, int]:
    """The checksum of the network that makes each part.

    Args:
      parts: of `run_config.CACHED`.
      params: of these networks at least, by name.
    """
    return {part: checksum(params[CACHED[part]]) for part in parts}


def check_weights(caches: Iterable[Cache], params: Params) -> None:
    """Refuses caches that other weights have made.

    Raises:
      CacheMismatch: naming the first.
    """
    caches = tuple(caches)
    current = weights({cache.part for cache in caches}, params)
    for cache in caches:
        cache.description.check_weights(cache.path, current[cache.part])


def null_text(caches: Iterable[Cache], tokenizer: Tokenizer, length: int) -> Mapping[str, np.ndarray]:
    """The text " " as batches hold it: `null_states` where instructions are cached, else `null_ids`."""
    for cache in caches:
        if cache.part == "instructions":
            return {"null_states": cache.null_states()}
    return {"null_ids": tokenizer.encode(" ", length)}
