"""Unified image-text diffusion transformers (UniAlignment, arXiv 2509.23760) in JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unialign_jax.pipeline import UniAlignPipeline

__all__ = ["UniAlignPipeline"]


def __getattr__(name: str):
    # Late, so that a module of the package can be imported without all the others.
    if name == "UniAlignPipeline":
        from unialign_jax.pipeline import UniAlignPipeline

        return UniAlignPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
