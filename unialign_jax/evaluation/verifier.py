"""How well the verifier of scenes reads: what is clean without an error, what was made worse the less the worse it is.

    python -m unialign_jax.evaluation.verifier

prints the figures of docs/scenes.md; it takes one core some two minutes.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageFilter

from unialign_jax import cli
from unialign_jax.data.scenes import Scene, draw_scene, language, render, verify

CLEAN = {32: 10_000, 64: 2_000, 48: 300, 256: 300, 512: 50}  # pixels a side -> number of scenes
WORSENED = 500  # scenes, for each way
_ATTRIBUTES = ("place", "shape", "colour", "size", "direction")
COLUMNS = ("exact", "no scene, named", "wrong", *(f"{attribute}s" for attribute in _ATTRIBUTES))

# An image uint8 [S, S, 3] and its number, which is the seed of what is random -> the same made worse.
Way = Callable[[np.ndarray, int], np.ndarray]


def noise(sigma: float) -> Way:
    """Gaussian, of grey levels."""

    def worsen(image: np.ndarray, number: int) -> np.ndarray:
        return _pixels(image + np.random.default_rng(number).normal(0, sigma, image.shape))

    return worsen


def blur(sigma: float) -> Way:
    """Gaussian, of pixels."""
    return lambda image, _: np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def jpeg(quality: int) -> Way:
    """Coded with full colour."""

    def worsen(image: np.ndarray, _: int) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
        return np.asarray(Image.open(file))

    return worsen


def contrast(factor: float) -> Way:
    """Drawn towards the middle grey."""
    return lambda image, _: _pixels(127.5 + factor * (image - 127.5))


def _pixels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


WAYS: Mapping[str, Way] = {
    **{f"Gaussian noise, sigma {sigma} of 255": noise(sigma) for sigma in (16, 32, 48, 64, 80, 96, 128)},
    **{f"Gaussian blur, {sigma} pixels": blur(sigma) for sigma in (0.5, 0.75, 1, 1.25, 1.5, 2)},
    **{f"JPEG, quality {quality}, full colour": jpeg(quality) for quality in (95, 75, 50)},
    **{f"contrast {factor}": contrast(factor) for factor in (0.9, 0.75, 0.6)},
}


def draw(count: int) -> list[Scene]:
    """Scenes of one to four things, of all splits."""
    return [draw_scene(np.random.default_rng([11, i]), None) for i in range(count)]


def misread(scenes: Sequence[Scene], side: int) -> list[Scene]:
    """Those whose clean rendering, of `side` pixels, is read as none or as another, if only in a direction."""
    return [scene for scene in scenes if verify.read_image(render(scene, side)) != scene]


def captions(scenes: Sequence[Scene]) -> Iterator[tuple[str, bool]]:
    """Every caption of the scenes, in every wording, with whether it is read as its scene."""
    for scene in scenes:
        for held_out in (False, True):
            for _, text in language.captions(scene, held_out):
                yield text, verify.caption_exact(text, scene)


def shares(worsen: Way, scenes: Sequence[Scene]) -> dict[str, float]:
    """What is read of renderings of 32 pixels a side that were made worse, by `COLUMNS`.

    Returns:
      Of all images the share that is exact, read as no scene, and read as a wrong one; of all things the share at whose
      place a thing is read, and that of those read there with the right shape, colour, size and direction.
    """
    kinds, right, things = np.zeros(3), np.zeros(len(_ATTRIBUTES)), 0
    for number, scene in enumerate(scenes):
        read = verify.read_image(worsen(render(scene, verify.SIDE), number))
        found = {thing.place: thing for thing in read.things} if isinstance(read, Scene) else {}
        kinds[1 if not isinstance(read, Scene) else 0 if read.spoken() == scene.spoken() else 2] += 1
        things += len(scene.things)
        for thing in scene.things:
            if other := found.get(thing.place):
                right += [getattr(other, name) == getattr(thing, name) for name in _ATTRIBUTES]
    return dict(zip(COLUMNS, [*(kinds / len(scenes)).tolist(), *(right / things).tolist()], strict=True))


def rows() -> Iterator[str]:
    """The table of docs/scenes.md, in percent, a line at a time."""
    yield f"| made worse by | {' | '.join(COLUMNS)} |"
    yield "| --- " * (1 + len(COLUMNS)) + "|"
    scenes = draw(WORSENED)
    for name, worsen in WAYS.items():
        yield f"| {name} | {' | '.join(f'{100 * share:.1f}' for share in shares(worsen, scenes).values())} |"


def main() -> None:
    for side, count in CLEAN.items():
        print(f"{side} pixels: {len(misread(draw(count), side))} errors in {count} scenes", flush=True)
    exact = [right for _, right in captions(draw(max(CLEAN.values())))]
    print(f"{exact.count(False)} errors in their {len(exact)} captions", flush=True)
    for row in rows():
        print(row, flush=True)


if __name__ == "__main__":
    cli.run(main)
