"""Unified image-text diffusion transformers (UniAlignment, arXiv 2509.23760) in JAX."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unialign_jax.edit_session import EditSession
    from unialign_jax.pipeline import UniAlignPipeline

__all__ = ["EditSession", "UniAlignPipeline"]

_HOMES = {"EditSession": "unialign_jax.edit_session", "UniAlignPipeline": "unialign_jax.pipeline"}


def __getattr__(name: str):
    # Late, so that a module of the package can be imported without all the others.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
