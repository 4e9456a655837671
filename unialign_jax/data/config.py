"""What batches to make, typed: the section `data` of a stage's config."""

import dataclasses

from unialign_jax.data.buckets import bucket_sizes
from unialign_jax.data.sources import SourceConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What batches to make.

    Attributes:
      sources: where the samples come from; every batch is of one source.
      global_batch: samples in a batch, over all hosts.
      height, width: of all images, in pixels; with `max_aspect`, of the images whose aspect ratio is nearest to theirs.
      max_aspect: 1: all images are cropped to `height` x `width`. More: those of other aspect ratios, up to this one,
        are gathered in buckets of other sizes of about the same area, see `buckets`; every batch is of one bucket.
      side_multiple: of the sides of the other buckets, in pixels: what the autoencoder and the patches need, or more
        for fewer buckets, each of which is compiled.
      text_length: token ids per text.
      caption_prompt: stands before every caption, as a question before its answer, and is never masked. The network
        knows a token's place by its distance from others: where all are masked, a first one that never is tells places
        apart. Samplers ask with their protocol's, so a run's is that of its `protocol`. Published: none.
      teacher_length: token ids per caption for the semantic teacher; read only when there is a teacher tokenizer.
      seed: of the shuffles, in [0, 2^32).
      refused_share: highest share of a source's rows that may be unusable, in [0, 1); beyond it training stops.
      threads: reading and decoding threads, of this process or of each worker process.
      workers: worker processes; 0 reads in this process. More than 0 needs a `__main__` guard in the script, and absl
        flags that were parsed.
      prefetch: batches assembled ahead, at least 1.

    Raises:
      ValueError: a value out of its range.
    """

    sources: tuple[SourceConfig, ...]
    global_batch: int
    height: int
    width: int
    max_aspect: float = 1.0
    side_multiple: int = 64
    text_length: int = 256
    caption_prompt: str = ""
    teacher_length: int = 256
    seed: int = 0
    refused_share: float = 0.01
    threads: int = 4
    workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty; expected at least one, of a weight above 0")
        positive = ("global_batch", "height", "width", "side_multiple", "text_length", "teacher_length", "threads")
        for name in (*positive, "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}, expected 0 or more")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect is {self.max_aspect}, expected 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2^32 - 1")
        if not 0 <= self.refused_share < 1:
            raise ValueError(f"refused_share is {self.refused_share}, expected at least 0 and less than 1")

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every bucket that batches may be of."""
        return bucket_sizes(self.height, self.width, self.side_multiple, self.max_aspect)
