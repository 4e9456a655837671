"""Scenes: an embedded world of coloured shapes, for training without data and for scoring without a judge.

Everything is a pure function of a seed and a number, at any image size, and what a model makes of it (an image, a
caption, an answer) can be checked exactly. See docs/scenes.md. Two ways to files:

    python -m unialign_jax.data.scenes --target=DIR --count=N       published JSONL rows and PNG files
    tfds.builder("scenes/edit_32")                                  ArrayRecord, after importing `scenes.builder`
"""

from unialign_jax.data.scenes.corpus import write_corpus
from unialign_jax.data.scenes.rendering import MAPS, render, render_map
from unialign_jax.data.scenes.tasks import SETS, Example, Picture, draw, usable_counts
from unialign_jax.data.scenes.world import Scene, Thing, draw_scene, split_of

__all__ = [
    "MAPS",
    "SETS",
    "Example",
    "Picture",
    "Scene",
    "Thing",
    "draw",
    "draw_scene",
    "render",
    "render_map",
    "split_of",
    "usable_counts",
    "write_corpus",
]
