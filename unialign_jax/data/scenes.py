"""A small drawn corpus, for machines with no data: coloured shapes on plain backgrounds, described and recoloured.

Everything is a function of the seed and the scene's number. Written in the published JSONL form:

    python -m unialign_jax.data.scenes --target=DIR --count=N

DIR/generate.jsonl (N rows), DIR/edit.jsonl (N rows: one shape changes its colour), DIR/images/*.png.
"""

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
from absl import app, flags
from etils import epath
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 40),
}
BACKGROUNDS = {"grey": (128, 128, 128), "white": (250, 250, 250), "black": (10, 10, 10)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 0.10, "large": 0.14}  # radius, of the image's side
PLACES = {
    "top left": (0.2, 0.2),
    "top": (0.5, 0.2),
    "top right": (0.8, 0.2),
    "left": (0.2, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.8, 0.5),
    "bottom left": (0.2, 0.8),
    "bottom": (0.5, 0.8),
    "bottom right": (0.8, 0.8),
}
_SUPERSAMPLING = 4


@dataclasses.dataclass(frozen=True)
class Thing:
    """One shape of a scene; each attribute is a key (or member) of the table above that is called like it."""

    shape: str
    colour: str
    size: str
    place: str

    def describe(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} at the {self.place}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two things, of different shapes and in different places, on a plain background."""

    things: tuple[Thing, ...]
    background: str

    def caption(self) -> str:
        return f"{' and '.join(thing.describe() for thing in self.things)} on a {self.background} background"


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene."""
    count = int(rng.integers(1, 3))

    def pick(options: Sequence[str]) -> list[str]:
        return [str(option) for option in rng.choice(list(options), count, replace=False)]

    sizes = [str(size) for size in rng.choice(list(SIZES), count)]
    things = tuple(map(Thing, pick(SHAPES), pick(COLOURS), sizes, pick(PLACES)))
    return Scene(things, str(rng.choice(list(BACKGROUNDS))))


def recolour(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
    """The scene with one thing in a colour that no thing had, and the instruction for it."""
    which = int(rng.integers(len(scene.things)))
    taken = {thing.colour for thing in scene.things}
    colour = str(rng.choice([colour for colour in COLOURS if colour not in taken]))
    things = list(scene.things)
    things[which] = dataclasses.replace(things[which], colour=colour)
    return dataclasses.replace(scene, things=tuple(things)), f"make the {things[which].shape} {colour}"


def render(scene: Scene, size: int) -> Image.Image:
    """RGB image of `size` x `size` pixels, anti-aliased."""
    side = size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        # Pillow counts from pixel centres and draws the last pixel too: half a pixel off each side.
        x, y = (side * part - 0.5 for part in PLACES[thing.place])
        radius, fill = side * SIZES[thing.size] - 0.5, COLOURS[thing.colour]
        if thing.shape == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
        elif thing.shape == "square":
            half = radius * 0.9
            canvas.rectangle((x - half, y - half, x + half, y + half), fill)
        else:
            foot, half = y + radius / 2, radius * math.sqrt(3) / 2
            canvas.polygon(((x, y - radius), (x - half, foot), (x + half, foot)), fill)
    return image.reduce(_SUPERSAMPLING)


def write_corpus(directory: epath.PathLike, count: int, size: int = 32, seed: int = 0) -> None:
    """Writes the corpus described above; the same arguments write the same bytes.

    Args:
      directory: made if absent; files of an earlier corpus are overwritten.
      count: number of scenes.
      size: side of the images in pixels.
      seed: of the scenes. Different seeds share no random draw.
    """
    directory = epath.Path(directory)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    generate, edit = [], []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        before = draw_scene(rng)
        after, instruction = recolour(before, rng)
        names = [f"images/{i:06d}.png", f"images/{i:06d}_edited.png"]
        for name, scene in zip(names, (before, after), strict=True):
            with (directory / name).open("wb") as file:
                render(scene, size).save(file, "PNG")
        generate.append({"image": names[:1], "conversations": _turns(before, "<image>")})
        edit.append({"image": names, "conversations": _turns(after, ""), "instruction": instruction})
    for name, rows in (("generate.jsonl", generate), ("edit.jsonl", edit)):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _turns(scene: Scene, reply: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": scene.caption()}, {"from": "gpt", "value": reply}]


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    write_corpus(_TARGET.value, _COUNT.value, _SIZE.value, _SEED.value)
    print(f"{_COUNT.value} scenes: {_TARGET.value}/generate.jsonl and {_TARGET.value}/edit.jsonl")


if __name__ == "__main__":
    _TARGET = flags.DEFINE_string("target", None, "Directory to write to.", required=True)
    _COUNT = flags.DEFINE_integer("count", 1000, "Number of scenes.", lower_bound=1)
    _SIZE = flags.DEFINE_integer("size", 32, "Side of the images in pixels.", lower_bound=8)
    _SEED = flags.DEFINE_integer("seed", 0, "Seed of the scenes.", lower_bound=0)
    app.run(main)
