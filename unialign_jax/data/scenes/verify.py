"""The exact verifier: what scene does this image show, does this caption tell; and the scores that follow from it.

An image is read by analysis through synthesis, with no learned part: of all scenes, the one whose rendering is closest
to the image in squared error. It is searched place by place: with all other things as found so far, the exact errors of
all 512 things that may stand at a place, and of none, are computed at once; the largest improvement is made, until
there is none. On clean renders the result is the scene itself.

What is unlike any scene is a named failure, `Unread`, never an exception: an image that holds more than the closest
scene explains, more than four things, or a caption that is not of the language.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from unialign_jax.data.scenes import language, rendering
from unialign_jax.data.scenes.language import Unread
from unialign_jax.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOST_THINGS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
)

SIDE = rendering.GRID  # images are read at this size
LEAST_AVERAGED = 35  # pixels a side; averaging fewer down to `SIDE` smears edges over two pixels
# An image is no scene if the mean difference to the closest one exceeds this (RGB distance) in any square of _PATCH
# pixels a side. Any two colours are more than 100 apart.
UNEXPLAINED = 75.0
_PATCH = 5
_ROUNDS = 60
_LEAST_GAIN = 1.0  # in squared grey levels: rounding; any two things differ by thousands


def read_image(image: np.ndarray) -> Scene | Unread:
    """The scene that an image shows, directions and all, or why it shows none.

    Args:
      image: uint8 `[S, S, 3]`, S at least 32; larger ones are averaged down to 32 first.

    Raises:
      ValueError: not such an array.
    """
    pixels = _at_reading_size(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = min(BACKGROUNDS, key=lambda name: np.square(border.mean(axis=0) - BACKGROUNDS[name]).sum())
    search = _Search(pixels, background)
    things = search.run()
    found = [thing for thing in things if thing is not None]
    if len(found) > MOST_THINGS:
        return Unread(f"{len(found)} things; a scene has at most {MOST_THINGS}")
    names = [(thing.colour, thing.shape) for thing in found]
    if len(set(names)) < len(names):
        return Unread("two things of one colour and shape")
    difference = pixels - search.picture(things)
    worst = np.sqrt(np.square(_patch_means(difference)).sum(axis=-1)).max()
    if worst > UNEXPLAINED:
        return Unread(
            f"no scene explains the image: a patch is {worst:.0f} off, at most {UNEXPLAINED:.0f} was expected"
        )
    return Scene(tuple(found), background)


def read_caption(text: str) -> Scene | Unread:
    """The scene that a caption tells, in the language's training or held-out wordings, or why it tells none.

    Every direction is "up": captions leave it open.
    """
    return language.parse_caption(text)


def image_exact(image: np.ndarray, truth: Scene) -> bool:
    """Generation, editing, composition: every thing's shape, colour, size and place is right, and the background.

    No thing is missing, none is added. Directions do not count: no text tells them.
    """
    read = read_image(image)
    return isinstance(read, Scene) and read.spoken() == truth.spoken()


def caption_exact(text: str, truth: Scene) -> bool:
    """The caption tells the scene: all things with every attribute but the direction, and the background."""
    return read_caption(text) == truth.spoken()


def answer_right(text: str, truth: str) -> bool:
    """Equal up to case, outer white space and a full stop."""
    return text.strip().rstrip(".").strip().lower() == truth


def segmentation_iou(image: np.ndarray, truth: Scene) -> float:
    """Mean intersection over union of a segmentation map's classes, in [0, 1].

    Every pixel counts for the nearest of the palette's colours (background and eight shapes); the mean is over the
    classes that the true map of the same size has.

    Args:
      image: uint8 `[S, S, 3]`, a model's map.
    """
    _check_image(image)
    palette = np.array([(0, 0, 0), *rendering.SEGMENT_COLOURS.values()], np.float32)
    true_map = rendering.render_map(truth, "segmentation", len(image))
    read, wanted = (
        np.square(pixels[..., None, :].astype(np.float32) - palette).sum(axis=-1).argmin(axis=-1)
        for pixels in (image, true_map)
    )
    scores = []
    for label in np.unique(wanted):
        a, b = read == label, wanted == label
        scores.append((a & b).sum() / (a | b).sum())
    return float(np.mean(scores))


def depth_error(image: np.ndarray, truth: Scene) -> float:
    """Mean absolute error of a depth map's grey level, as a part of its whole range: 0 is exact."""
    _check_image(image)
    true_map = rendering.render_map(truth, "depth", len(image))
    return float(np.abs(image.astype(np.float32).mean(axis=-1) - true_map[..., 0]).mean() / rendering.NEAR)


def edge_score(image: np.ndarray, truth: Scene) -> float:
    """F1 of the edge pixels (grey level of 128 or more) against the true ones, pixel on pixel; in [0, 1]."""
    _check_image(image)
    read = image.astype(np.float32).mean(axis=-1) >= 128
    wanted = rendering.render_map(truth, "edges", len(image))[..., 0] > 0
    return float(2 * (read & wanted).sum() / max(1, read.sum() + wanted.sum()))


def pose_exact(image: np.ndarray, truth: Scene) -> bool:
    """Whether a pose map has the right stroke at every thing's place and none elsewhere: at each place the closest of
    five renderings (four strokes, none) decides."""
    pixels = _at_reading_size(image)
    wanted = {thing.place: thing.direction for thing in truth.things}
    for place in PLACES:
        x, y = (int(part * SIDE) for part in rendering.centre(place))
        window = (slice(y - 4, y + 4), slice(x - 4, x + 4))
        error = {None: np.square(pixels[window]).sum()}
        for direction, colour in rendering.POSE_COLOURS.items():
            inner, stroke = rendering.pose_stroke(place, direction, SIDE)
            drawn = np.zeros((SIDE, SIDE, 3), np.float32)
            drawn[inner] = stroke * np.array(colour, np.float32)
            error[direction] = np.square(pixels[window] - drawn[window]).sum()
        if min(error, key=error.get) != wanted.get(place):
            return False
    return True


_MASKS = tuple((shape, size, direction) for shape in SHAPES for size in SIZES for direction in DIRECTIONS)
_PAINT_NAMES = tuple(COLOURS)
_PAINTS = np.array(list(COLOURS.values()), np.float64)


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """Every form that can stand at one place, within the window that holds them all: P pixels, M = 64 `_MASKS`.

    keep, body: float64 `[M, P]`, as `rendering.stamp` has them; the others are their products.
    """

    window: rendering.Window
    keep: np.ndarray
    body: np.ndarray
    keep_keep: np.ndarray
    keep_body: np.ndarray
    body_body: np.ndarray


@functools.cache
def _candidates(place: str) -> _Candidates:
    window, _, _ = rendering.stamp("circle", "large", place, "up", SIDE)
    keep, body = [], []
    for shape, size, direction in _MASKS:
        inner, kept, painted = rendering.stamp(shape, size, place, direction, SIDE)
        whole_keep, whole_body = np.ones((SIDE, SIDE)), np.zeros((SIDE, SIDE))
        whole_keep[inner], whole_body[inner] = kept[..., 0], painted[..., 0]
        keep.append(whole_keep[window].reshape(-1))
        body.append(whole_body[window].reshape(-1))
    keep, body = np.stack(keep), np.stack(body)
    return _Candidates(window, keep, body, keep * keep, keep * body, body * body)


class _Search:
    """Descent from the empty scene; what stands at each of the nine places is a `Thing` or None."""

    def __init__(self, pixels: np.ndarray, background: str):
        self._pixels = pixels
        self._background = BACKGROUNDS[background]

    def run(self) -> list[Thing | None]:
        things: list[Thing | None] = [None] * len(PLACES)
        best = [self._best_at(i, things) for i in range(len(PLACES))]
        for _ in range(_ROUNDS):
            chosen = max(range(len(PLACES)), key=lambda i: best[i][0])
            gain, thing = best[chosen]
            if gain <= 0:
                break
            things[chosen] = thing
            # Only neighbours overlap.
            for i in range(len(PLACES)):
                if abs(i // 3 - chosen // 3) <= 1 and abs(i % 3 - chosen % 3) <= 1:
                    best[i] = self._best_at(i, things)
        return things

    def picture(self, things: Sequence[Thing | None]) -> np.ndarray:
        """Float64 `[32, 32, 3]`."""
        image = np.empty((SIDE, SIDE, 3))
        image[:] = self._background
        for thing in things:
            if thing is not None:
                _paint(image, thing)
        return image

    def _best_at(self, index: int, things: list[Thing | None]) -> tuple[float, Thing | None]:
        """(by how much the squared error falls, what to put there); 0 and the present thing if nothing is better."""
        of = _candidates(PLACES[index])
        behind = self.picture(things[:index])[of.window].reshape(-1, 3)
        # What stands in front, as one layer: image = through * (what is behind) + front.
        through, front = np.ones((SIDE, SIDE, 1)), np.zeros((SIDE, SIDE, 3))
        for thing in things[index + 1 :]:
            if thing is not None:
                _paint(front, thing)
                window, keep, _ = rendering.stamp(thing.shape, thing.size, thing.place, thing.direction, SIDE)
                through[window] *= keep
        through, front = through[of.window].reshape(-1, 1), front[of.window].reshape(-1, 3)
        seen = self._pixels[of.window].reshape(-1, 3) - front
        # The residual of mask m in colour c is seen - through (keep_m behind + body_m c). Multiplied out, the squared
        # errors of all 512 pairs are a few products of the masks with vectors over the pixels.
        empty = np.square(seen - through * behind).sum()
        seen_through, through_through = seen * through, np.square(through)
        forms = (
            np.square(seen).sum()
            - 2 * of.keep @ (seen_through * behind).sum(axis=-1)
            + of.keep_keep @ (through_through * np.square(behind)).sum(axis=-1)
        )
        cross = of.body @ seen_through - of.keep_body @ (through_through * behind)  # [M, 3]
        weight = of.body_body @ through_through  # [M, 1]
        errors = forms[:, None] - 2 * cross @ _PAINTS.T + weight * np.square(_PAINTS).sum(axis=1)  # [M, 8]
        present, now = things[index], empty
        if present is not None:
            mask = _MASKS.index((present.shape, present.size, present.direction))
            now = errors[mask, _PAINT_NAMES.index(present.colour)]
        mask, paint = np.unravel_index(errors.argmin(), errors.shape)
        gain = float(now - min(errors[mask, paint], empty))
        if gain <= _LEAST_GAIN:
            return 0.0, present
        if empty <= errors[mask, paint]:
            return gain, None
        shape, size, direction = _MASKS[mask]
        return gain, Thing(shape, _PAINT_NAMES[paint], size, PLACES[index], direction)


def _paint(image: np.ndarray, thing: Thing) -> None:
    window, keep, body = rendering.stamp(thing.shape, thing.size, thing.place, thing.direction, SIDE)
    image[window] *= keep
    image[window] += body * np.array(COLOURS[thing.colour], np.float32)


def _patch_means(difference: np.ndarray) -> np.ndarray:
    """Means over all squares of `_PATCH` pixels a side: `[S, S, 3]` -> `[S - 4, S - 4, 3]`."""
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(difference, _PATCH, axis=axis)
        difference = windows.mean(axis=-1)
    return difference


def _check_image(image: np.ndarray) -> None:
    shape = np.shape(image)
    if getattr(image, "dtype", None) != np.uint8 or len(shape) != 3 or shape[0] != shape[1] or shape[2] != 3:
        raise ValueError(
            f"expected a square image, uint8 [S, S, 3], found {getattr(image, 'dtype', type(image))} {shape}"
        )


def is_readable(side: int) -> bool:
    """Whether scenes can be read at this many pixels a side."""
    return side == SIDE or side >= LEAST_AVERAGED


def _at_reading_size(image: np.ndarray) -> np.ndarray:
    """Float32 `[32, 32, 3]`, by averaging."""
    _check_image(image)
    if not is_readable(len(image)):
        raise ValueError(f"the image is {len(image)} pixels wide; expected {SIDE}, or {LEAST_AVERAGED} or more")
    if len(image) > SIDE:
        if len(image) % SIDE == 0:
            n = len(image) // SIDE
            return image.reshape(SIDE, n, SIDE, n, 3).mean(axis=(1, 3), dtype=np.float32)
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))
    return image.astype(np.float32)
