"""Sample -> arrays of static shape: images of one size, texts of one length, references padded to one number."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from unialign_jax.data import images
from unialign_jax.data.caches import Cache
from unialign_jax.data.samples import Cause, Refused, Sample
from unialign_jax.data.tokenizer import PlainTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Loads the images of a sample and encodes its texts. Picklable, so that worker processes can do it.

    Attributes:
      height, width: of target and references, in pixels.
      references: room for reference images; 0 leaves their arrays out.
      masks_references: see `SourceConfig.masks_references`; False leaves their mask out.
      tokenizer, text_length: of the text encoder; longer texts are cut.
      caption_prompt: stands before every caption, as a question before its answer; it is never masked.
      teacher_tokenizer, teacher_length: of the semantic teacher; None leaves its arrays out.
      caches: by part; what these hold is read in place of pixels and ids that nobody else needs.
    """

    height: int
    width: int
    references: int
    masks_references: bool
    tokenizer: Tokenizer
    text_length: int
    caption_prompt: str
    teacher_tokenizer: PlainTokenizer | None
    teacher_length: int
    caches: Mapping[str, Cache] = dataclasses.field(default_factory=dict)

    def __call__(self, sample: Sample, row: int) -> dict[str, np.ndarray]:
        """The arrays of `pipeline.Batches`, without the batch axis.

        Args:
          sample: the row's.
          row: its number in the source.

        Raises:
          Refused: an image can't be used, the sample has more references than there is room for, or its question
            leaves no room for the answer.
          CacheMismatch, CorpusError: see `Cache.read`.
        """
        arrays = {}
        mark = None  # one for all, which are of the same source: it goes through the bytes of the images
        for cache in self.caches.values():  # first: they refuse a row for the reason that its pixels were refused for
            mark = mark or cache.digest(sample)
            arrays |= cache.read(row, mark)
        texts = self.texts(sample)
        if sample.task == "answer" and texts["caption_loss_mask"].sum() < 2:  # what is left is the end of the text
            raise Refused(
                Cause.TEXT_TOO_LONG,
                f"the question fills all {self.text_length} tokens and leaves none for the answer; raise text_length",
            )
        return arrays | self.pixels(sample) | texts

    def pixels(self, sample: Sample) -> dict[str, np.ndarray]:
        """`target`, `references` and `reference_mask`, as far as they are needed; raises `Refused`."""
        count = len(sample.references)
        arrays = {}
        # The teacher looks at the target too; nobody but the autoencoder looks at the references.
        if "latents" not in self.caches or self.teacher_tokenizer is not None:
            arrays["target"] = images.load(sample.target, self.height, self.width)
        if count > self.references:
            raise Refused(
                Cause.IMAGE_COUNT,
                f"a row for {sample.task!r} with {count} reference image(s), but the source is configured for "
                f"{self.references}; set its references to {count}",
            )
        if not self.references:
            return arrays
        if self.masks_references:
            arrays["reference_mask"] = np.arange(self.references) < count
        if "latents" not in self.caches:
            arrays["references"] = np.zeros((self.references, self.height, self.width, 3), np.uint8)
            for i, reference in enumerate(sample.references):
                arrays["references"][i] = images.load(reference, self.height, self.width)
        return arrays

    def texts(self, sample: Sample) -> dict[str, np.ndarray]:
        """The ids, as far as they are needed, and their masks."""
        is_answer = sample.task == "answer"
        if is_answer:
            caption = f"{sample.question} {sample.answer}"
            ids, loss_mask = self.tokenizer.encode_prompted(sample.question, sample.answer, self.text_length)
        else:
            caption = sample.caption
            ids, loss_mask = self.tokenizer.encode_prompted(self.caption_prompt, caption, self.text_length)
        arrays = {"caption_ids": ids, "caption_loss_mask": loss_mask}
        if "instructions" not in self.caches:
            instruction_ids = ids if is_answer else self.tokenizer.encode(sample.instruction, self.text_length)
            arrays["instruction_ids"] = instruction_ids
        if self.teacher_tokenizer is not None:
            teacher_ids, teacher_mask = self.teacher_tokenizer.encode_masked(caption, self.teacher_length)
            arrays |= {"teacher_ids": teacher_ids, "teacher_mask": teacher_mask}
        return arrays
