"""Scene -> pixels: the picture, and its perception maps. Pure functions, at any size.

In 32nds of the image's side: places are centred at 8, 16 and 24; small things have a radius of 4, large ones of 5.5, so
neighbours overlap by up to 3, and the nearer one hides that much of the other. The marker, a dot of radius 1.2 at a
distance of 1.3 from the centre, stays within 2.5 of it: nothing ever hides it. The outermost 2.5 are always background.

All centres are corners of the 4-pixel patches of a 32-pixel image (and of 8-pixel patches at 64): what a thing looks
like to a network that sees patches does not depend on its place.
"""

import functools

import numpy as np

from unialign_jax.data.scenes.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, Scene

MAPS = ("depth", "edges", "pose", "segmentation")
GRID = 32
CENTRES = (8 / GRID, 16 / GRID, 24 / GRID)
RADII = {"small": 4 / GRID, "large": 5.5 / GRID}
MARKER_OFFSET, MARKER_RADIUS = 1.3 / GRID, 1.2 / GRID
STICK = 2.5 / GRID  # length of the pose map's strokes
# What shape has which colour in the segmentation map, and what direction in the pose map; the rest is black.
SEGMENT_COLOURS = dict(zip(SHAPES, COLOURS.values(), strict=True))
POSE_COLOURS = {"up": (255, 60, 60), "right": (60, 220, 60), "down": (70, 90, 255), "left": (255, 230, 60)}
FAR, NEAR = 95, 255  # grey levels of the depth map: of the farthest and the nearest place, evenly spaced
_SUBSAMPLES = 512  # coverage is sampled at this many points a side, or at 4 a pixel if that is more

_STEPS = {"up": (0.0, -1.0), "right": (1.0, 0.0), "down": (0.0, 1.0), "left": (-1.0, 0.0)}
_COLOUR_ARRAYS = {name: np.array(colour, np.float32) for name, colour in COLOURS.items()}
_BACKGROUND_ARRAYS = {name: np.array(colour, np.float32) for name, colour in BACKGROUNDS.items()}


def render(scene: Scene, size: int) -> np.ndarray:
    """The picture, anti-aliased, farthest thing first: uint8 `[size, size, 3]`.

    Raises:
      ValueError: size is less than 8.
    """
    _check_size(size)
    image = np.empty((size, size, 3), np.float32)
    image[:] = _BACKGROUND_ARRAYS[scene.background]
    for thing in scene.things:
        window, keep, body = stamp(thing.shape, thing.size, thing.place, thing.direction, size)
        image[window] *= keep
        image[window] += body * _COLOUR_ARRAYS[thing.colour]
    return np.rint(image).astype(np.uint8)


def render_map(scene: Scene, kind: str, size: int) -> np.ndarray:
    """A perception map as a picture: uint8 `[size, size, 3]`.

    Args:
      kind: "segmentation" (each thing in the colour of its shape, `SEGMENT_COLOURS`), "depth" (nearer is lighter,
        background black), "edges" (white where neighbouring pixels are of different things) or "pose" (a stroke from
        each thing's centre in its direction, in the colour of the direction). The first three have hard borders.

    Raises:
      ValueError: no such map, or size is less than 8.
    """
    _check_size(size)
    if kind not in MAPS:
        raise ValueError(f"no map {kind!r}; there are {', '.join(MAPS)}")
    if kind == "pose":
        return _pose(scene, size)
    owner = owners(scene, size)
    if kind == "edges":
        edges = np.zeros((size, size), bool)
        edges[:, :-1] |= owner[:, :-1] != owner[:, 1:]
        edges[:-1] |= owner[:-1] != owner[1:]
        return np.where(edges[..., None], np.uint8(255), np.uint8(0)).repeat(3, axis=-1)
    palette = [(0, 0, 0)]
    for thing in scene.things:
        level = FAR + (NEAR - FAR) * PLACES.index(thing.place) // (len(PLACES) - 1)
        palette.append((level,) * 3 if kind == "depth" else SEGMENT_COLOURS[thing.shape])
    return np.array(palette, np.uint8)[owner]


def owners(scene: Scene, size: int) -> np.ndarray:
    """Which thing most of each pixel shows: int `[size, size]`, 0 the background, i + 1 the scene's i-th thing."""
    layers = np.zeros((1 + len(scene.things), size, size), np.float32)
    layers[0] = 1
    for i, thing in enumerate(scene.things):
        window, keep, _ = stamp(thing.shape, thing.size, thing.place, thing.direction, size)
        layers[(slice(None), *window)] *= keep[..., 0]
        layers[(i + 1, *window)] = 1 - keep[..., 0]
    return layers.argmax(axis=0)


def centre(place: str) -> tuple[float, float]:
    """(x, y) of a place, as parts of the image's side."""
    index = PLACES.index(place)
    return CENTRES[index % 3], CENTRES[index // 3]


Window = tuple[slice, slice]


@functools.lru_cache(maxsize=2048)
def stamp(shape: str, extent: str, place: str, direction: str, size: int) -> tuple[Window, np.ndarray, np.ndarray]:
    """How a thing is laid over an image: `image[window] * keep + body * colour`. The marker is black.

    Returns:
      The window (rows, columns); keep and body, float32 `[h, w, 1]` in [0, 1]: how much of what was there stays, and
      how much of the thing's colour comes.
    """
    x0, y0 = centre(place)
    radius = RADII[extent]
    window, x, y = _sample_points(x0, y0, radius, size)
    inside = _INSIDE[shape]((x - x0) / radius, (y - y0) / radius)
    step_x, step_y = _STEPS[direction]
    marker = np.hypot(x - x0 - MARKER_OFFSET * step_x, y - y0 - MARKER_OFFSET * step_y) <= MARKER_RADIUS
    return window, 1 - _coverage(inside | marker, window), _coverage(inside & ~marker, window)


def _pose(scene: Scene, size: int) -> np.ndarray:
    image = np.zeros((size, size, 3), np.float32)
    for thing in scene.things:
        window, stroke = pose_stroke(thing.place, thing.direction, size)
        image[window] += stroke * np.array(POSE_COLOURS[thing.direction], np.float32)  # strokes never meet
    return np.rint(image).astype(np.uint8)


@functools.lru_cache(maxsize=256)
def pose_stroke(place: str, direction: str, size: int) -> tuple[Window, np.ndarray]:
    """The pose map's stroke: its window, and its coverage, float32 `[h, w, 1]`."""
    x0, y0 = centre(place)
    window, x, y = _sample_points(x0, y0, STICK + MARKER_RADIUS, size)
    step_x, step_y = _STEPS[direction]
    along = np.clip((x - x0) * step_x + (y - y0) * step_y, 0, STICK)
    stroke = np.hypot(x - x0 - along * step_x, y - y0 - along * step_y) <= MARKER_RADIUS
    return window, _coverage(stroke, window)


def _sample_points(x0: float, y0: float, radius: float, size: int) -> tuple[Window, np.ndarray, np.ndarray]:
    """The pixels around a disc, and where in them coverage is sampled: x `[1, w, 1, n]` and y `[h, 1, n, 1]`."""
    n = max(4, -(-_SUBSAMPLES // size))
    slices, points = [], []
    for middle in (y0, x0):
        first = max(0, int(np.floor((middle - radius) * size - 1e-6)))
        last = min(size, int(np.ceil((middle + radius) * size + 1e-6)))
        slices.append(slice(first, last))
        points.append((np.arange(first * n, last * n) + 0.5).reshape(-1, n) / (n * size))
    y, x = points
    return (slices[0], slices[1]), x[None, :, None, :], y[:, None, :, None]


def _coverage(inside: np.ndarray, window: Window) -> np.ndarray:
    shape = tuple(part.stop - part.start for part in window)
    n = inside.shape[-1]
    part = np.broadcast_to(inside, (*shape, n, n)).mean(axis=(2, 3), dtype=np.float32)[..., None]
    part.flags.writeable = False  # cached
    return part


def _in_polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Even-odd rule; corners `[n, 2]`."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return inside


_TRIANGLE = np.array([(0, -1), (1, 0.85), (-1, 0.85)])
_ANGLES = np.arange(10) * np.pi / 5
_STAR = np.where(np.arange(10) % 2, 0.42, 1.0)[:, None] * np.stack([np.sin(_ANGLES), -np.cos(_ANGLES)], axis=1)
_STAR = 2 * (_STAR - _STAR.min(axis=0)) / np.ptp(_STAR, axis=0) - 1  # as wide and high as the others

# Shapes in coordinates in which the radius is 1; y goes down.
_INSIDE = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": lambda x, y: _in_polygon(x, y, _TRIANGLE),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,
    "cross": lambda x, y: ((abs(x) <= 0.25) & (abs(y) <= 1)) | ((abs(y) <= 0.25) & (abs(x) <= 1)),
    "star": lambda x, y: _in_polygon(x, y, _STAR),
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.5**2),
    # Two discs above a triangle that touches them.
    "heart": lambda x, y: (np.hypot(abs(x) - 0.47, y + 0.4) <= 0.53) | ((y >= -0.2) & (abs(x) <= (1 - y) * 0.8)),
}


def _check_size(size: int) -> None:
    if size < 8:
        raise ValueError(f"size is {size} pixels, expected at least 8")
