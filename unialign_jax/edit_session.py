"""Several edits in a row on one image, any of which can be taken back."""

from typing import Unpack

from PIL import Image

from unialign_jax.inference import inputs
from unialign_jax.inference.options import ImageOptions
from unialign_jax.pipeline import UniAlignPipeline


class EditSession:
    """An image, an instruction, an instruction, …, undo.

        session = EditSession(pipeline, "street.jpg", guidance=7)
        session.edit("make it night")
        session.edit("add rain")
        session.undo()
        session.image  # at night, without rain

    Args:
      pipeline: what edits.
      image: where the session starts; scaled and cropped to the size of the edits.
      **options: of every edit, see `ImageOptions`; an edit may give others.

    Raises:
      ValueError: the image can't be read, or the size can't be.
    """

    def __init__(self, pipeline: UniAlignPipeline, image: inputs.ImageLike, **options: Unpack[ImageOptions]):
        size = inputs.image_size(pipeline.networks, pipeline.size, options.get("size"), options.pop("aspect", None))
        self._pipeline, self._options = pipeline, options | {"size": size}
        self._images = [Image.fromarray(inputs.pixels(image, *size))]
        self._instructions: list[str] = []

    @property
    def image(self) -> Image.Image:
        """As it is now."""
        return self._images[-1]

    @property
    def images(self) -> list[Image.Image]:
        """The first image and what each instruction made of it."""
        return list(self._images)

    @property
    def instructions(self) -> list[str]:
        """The edits that stand, oldest first."""
        return list(self._instructions)

    def edit(self, instruction: str, **options: Unpack[ImageOptions]) -> Image.Image:
        """Edits the image as it is now, and returns the result. See `UniAlignPipeline.edit`."""
        made = self._pipeline.edit(self.image, instruction, **(self._options | options))
        self._images.append(made)
        self._instructions.append(instruction)
        return made

    def undo(self) -> Image.Image:
        """Takes the last edit back and returns the image before it.

        Raises:
          ValueError: there is nothing left to take back.
        """
        if not self._instructions:
            raise ValueError("there is no edit to take back: this is the image that the session started with")
        self._images.pop()
        self._instructions.pop()
        return self.image
