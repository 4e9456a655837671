"""Makes docs/images/tour.png: the six tasks of the README's tour, with what the shipped checkpoint really answers.

python docs/tour.py
"""

import pathlib

from PIL import Image, ImageDraw, ImageFont

from unialign_jax import UniAlignPipeline

SIDE, GAP, LINE = 128, 12, 17
PROMPT = "a small red circle at the top left and a large blue star at the centre on a grey background"


def main() -> None:
    pipeline = UniAlignPipeline.from_pretrained("scenes", dtype="float32", progress=False)
    picture = pipeline.generate(PROMPT, seed=1)
    said = pipeline.caption(picture)
    answer = pipeline.answer(picture, "what colour is the star?")
    edited = pipeline.edit(picture, "make the blue star green and remove the red circle")
    mask = pipeline.perceive(picture, "segmentation")
    ring, heart = pipeline.generate(
        ["a small yellow ring at the centre on a white background", "large pink heart centre, on brown"], seed=[2, 3]
    )
    composed = pipeline.compose(
        [ring, heart], "the ring at the left and the heart at the bottom right on a navy background"
    )
    rows = [
        ("generate", [], PROMPT, picture),
        ("caption", [picture], "", said),
        ("answer", [picture], "what colour is the star?", answer),
        ("edit", [picture], "make the blue star green and remove the red circle", edited),
        ("perceive", [picture], "segmentation", mask),
        (
            "compose",
            [ring, heart],
            "the ring at the left and the heart at the bottom right on a navy background",
            composed,
        ),
    ]
    for task, _, asked, made in rows:
        print(f"{task}: {asked!r} -> {made if isinstance(made, str) else 'image'}")
    draw(rows).save(pathlib.Path(__file__).parent / "images" / "tour.png")


def draw(rows) -> Image.Image:
    """One row a task: its name and what was asked, the inputs, what was made."""
    height = SIDE + GAP
    sheet = Image.new("RGB", (4 * (SIDE + GAP) + 220, len(rows) * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (task, inputs, asked, made) in enumerate(rows):
        top = GAP + number * height
        pen.text((GAP, top), task, "black", ImageFont.load_default(18))
        write(pen, (GAP, top + 2 * LINE), asked, 200, font)
        left = 220
        for image in inputs:
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
            left += SIDE + GAP
        pen.text((left, top + SIDE // 2 - LINE), "->", "black", ImageFont.load_default(26))
        left += 3 * GAP
        if isinstance(made, str):
            write(pen, (left, top + SIDE // 2 - LINE), made, sheet.width - left - GAP, font)
        else:
            sheet.paste(made.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
    return sheet


def write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, font: ImageFont.ImageFont) -> None:
    """Text in lines of at most `width` pixels."""
    left, top = place
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if pen.textlength(longer, font) > width:
            pen.text((left, top), line, "black", font)
            line, top = word, top + LINE
        else:
            line = longer
    pen.text((left, top), line, "black", font)


if __name__ == "__main__":
    main()
