"""Sample -> arrays of static shape: images of one size, texts of one length, references padded to one number."""

import dataclasses

import numpy as np

from unialign_jax.data import images
from unialign_jax.data.samples import Cause, Refused, Sample
from unialign_jax.data.tokenizer import PlainTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Loads the images of a sample and encodes its texts. Picklable, so that worker processes can do it.

    Attributes:
      height, width: of target and references, in pixels.
      references: room for reference images; 0 leaves their arrays out.
      tokenizer, text_length: of the text encoder; longer texts are cut.
      caption_prompt: stands before every caption, as a question before its answer; it is never masked.
      teacher_tokenizer, teacher_length: of the semantic teacher; None leaves its arrays out.
    """

    height: int
    width: int
    references: int
    tokenizer: Tokenizer
    text_length: int
    caption_prompt: str
    teacher_tokenizer: PlainTokenizer | None
    teacher_length: int

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """The arrays of `pipeline.Batches`, without the batch axis.

        Raises:
          Refused: an image can't be used, or the sample has more references than there is room for.
        """
        arrays = {"target": images.load(sample.target, self.height, self.width)}
        return arrays | self._references(sample) | self._texts(sample)

    def _references(self, sample: Sample) -> dict[str, np.ndarray]:
        count = len(sample.references)
        if count > self.references:
            raise Refused(
                Cause.IMAGE_COUNT,
                f"a row for {sample.task!r} with {count} reference image(s), but the source is configured for "
                f"{self.references}; set its references to {count}",
            )
        if not self.references:
            return {}
        pixels = np.zeros((self.references, self.height, self.width, 3), np.uint8)
        for i, reference in enumerate(sample.references):
            pixels[i] = images.load(reference, self.height, self.width)
        return {"references": pixels, "reference_mask": np.arange(self.references) < count}

    def _texts(self, sample: Sample) -> dict[str, np.ndarray]:
        if sample.task == "answer":
            caption = f"{sample.question} {sample.answer}"
            ids, loss_mask = self.tokenizer.encode_prompted(sample.question, sample.answer, self.text_length)
            instruction_ids = ids
        else:
            caption = sample.caption
            ids, loss_mask = self.tokenizer.encode_prompted(self.caption_prompt, caption, self.text_length)
            instruction_ids = self.tokenizer.encode(sample.instruction, self.text_length)
        arrays = {"caption_ids": ids, "caption_loss_mask": loss_mask, "instruction_ids": instruction_ids}
        if self.teacher_tokenizer is not None:
            teacher_ids, teacher_mask = self.teacher_tokenizer.encode_masked(caption, self.teacher_length)
            arrays |= {"teacher_ids": teacher_ids, "teacher_mask": teacher_mask}
        return arrays
