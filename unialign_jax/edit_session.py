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
      **options: of every edit, see `ImageOptions`, without `output` and `gather`; an edit may give others.

    Raises:
      ValueError: the image can't be read, or the size can't be, or an option is not for sessions.
    """

    def __init__(self, pipeline: UniAlignPipeline, image: inputs.ImageLike, **options: Unpack[ImageOptions]):
        _check_options(options)
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
        """Edits the image as it is now, and returns the result. See `UniAlignPipeline.edit`.

        Raises:
          ValueError: as there, or an option is not for sessions. The session is as before.
        """
        _check_options(options)
        kept = self._options
        if options.get("aspect") is not None:  # instead of the session's size
            kept = {name: value for name, value in kept.items() if name != "size"}
        made = self._pipeline.edit(self.image, instruction, **(kept | options))
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


def _check_options(options: ImageOptions) -> None:
    if refused := [name for name in ("output", "gather") if name in options]:
        raise ValueError(
            f"{' and '.join(refused)}: no option of an edit session, whose every process keeps a PIL image to edit "
            "next; leave it out, and convert what `edit` returns"
        )
    if unknown := sorted(options.keys() - ImageOptions.__annotations__.keys()):
        raise ValueError(
            f"{' and '.join(unknown)}: no such option; there are {', '.join(ImageOptions.__annotations__)}"
        )
