"""The dual-stream objective: binds the network to the two diffusions and the two alignments.

Source: arXiv 2509.23760, section 3. Two passes go through the same weights: the image pass denoises the target's latent
under the instruction and the references; the text pass unmasks the caption under the clean target. Alignments tie each
pass to the frozen teacher, and both passes to each other.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from unialign_jax.batch import Batch, Draws, Features
from unialign_jax.diffusion import flow_matching, masked_text
from unialign_jax.models.layers import mean_tokens
from unialign_jax.models.unialign import Outputs, Pass

Transformer = Callable[..., list[Outputs]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights and constants of the loss; the defaults are the published ones.

    Attributes:
      image_weight, text_weight, contrastive_weight, alignment_weight: factors of the five terms (the two alignments
        with the teacher share one).
      temperature: of the contrastive loss.
      semantic_depth: block after which the adapters read the streams.
      image_pass, text_pass: factors of all terms of one pass, set for each source of the data. At 0 the pass is not
        run at all, and neither is the contrastive term, which needs both; published: every sample feeds both.
      time_shift: moves the image pass's noise levels toward noise, see `flow_matching.shift_levels`; published: 1.
      image_loss: what the image term compares, of `flow_matching.LOSS_SPACES`; published: "x0".
      text_dropout: probability that a sample's text condition becomes that of " ".
      reference_dropout: probability that a sample loses its references; 0 is published.
      pool_padding: whether the pooled text features (of the adapter and of the contrastive loss) average padding in, as
        published, or only what comes before it.
      mask_token_id, end_token_id: ids of the mask and of the end token that pads the text.

    Raises:
      ValueError: a value out of its range.
    """

    image_weight: float = 1.0
    text_weight: float = 0.2
    contrastive_weight: float = 0.05
    alignment_weight: float = 0.1
    temperature: float = 0.07
    semantic_depth: int = 8
    image_pass: float = 1.0
    text_pass: float = 1.0
    time_shift: float = 1.0
    image_loss: str = "x0"
    text_dropout: float = 0.1
    reference_dropout: float = 0.0
    pool_padding: bool = True
    mask_token_id: int = 32099
    end_token_id: int = 1

    def __post_init__(self):
        if self.image_pass < 0 or self.text_pass < 0 or self.image_pass == self.text_pass == 0:
            raise ValueError(
                f"image_pass is {self.image_pass} and text_pass {self.text_pass}; expected 0 or more, and one above 0"
            )
        for name in ("image_weight", "text_weight", "contrastive_weight", "alignment_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, expected more than 0")
        for name in ("text_dropout", "reference_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a probability")
        if self.time_shift <= 0:
            raise ValueError(f"time_shift is {self.time_shift}, expected more than 0 (1 is as published)")
        if self.image_loss not in flow_matching.LOSS_SPACES:
            raise ValueError(f"image_loss is {self.image_loss!r}; choose one of {flow_matching.LOSS_SPACES}")

    def texts(self, batch: Batch | Features, draws: Draws) -> jax.Array | None:
        """Ids int32 `[B, n, T]` of the texts whose states the loss of a batch reads, those of a sample together.

        First the image pass's condition, where the batch does not bring its states, then the masked caption; each only
        of a pass that runs. None: no text at all.
        """
        texts = []
        if self.image_pass and batch.instruction_states is None:
            # A dropped condition is the text " ": the encoder reads each row by itself, so its ids can be replaced.
            texts.append(jnp.where(self._dropped(draws)[:, None], batch.null_ids, batch.instruction_ids))
        if self.text_pass:
            texts.append(self._masked(batch, draws))
        return jnp.stack(texts, axis=1) if texts else None

    def __call__(
        self, transformer: Transformer, states: jax.Array | None, features: Features, draws: Draws
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch, deterministic in its arguments.

        All terms are means over samples, so the mean over equal micro-batches is exactly the full batch's value,
        except for the contrastive term: its negatives are the samples of the batch it is given, so under gradient
        accumulation each micro-batch contrasts only its own samples.

        Args:
          transformer: `UniAlign.apply` with its parameters bound.
          states: of the `texts`, floating `[B, n, T, E]`.
          features: the encoded batch.
          draws: the step's randomness.

        Returns:
          The weighted sum and the terms by name (`image`, `text`, `contrastive`, and with a teacher `image_align`,
          `text_align`; only those of passes that run), float32 scalars, unweighted.
        """
        depth = self.semantic_depth if features.teacher_image is not None else None
        passes, terms, weights = {}, {}, {}

        if self.image_pass:
            if features.instruction_states is None:
                instruction = states[:, 0]
            else:
                dropped = self._dropped(draws)[:, None, None]
                instruction = jnp.where(dropped, features.null_states, features.instruction_states)
            sigma = flow_matching.noise_levels(draws.image_time)
            if self.time_shift != 1:
                sigma = flow_matching.shift_levels(sigma, self.time_shift)
            noisy = flow_matching.add_noise(features.target, draws.noise, sigma)
            passes["image"] = Pass(
                noisy,
                instruction,
                sigma * flow_matching.NUM_TRAIN_TIMES,
                references=features.references,
                reference_mask=self._kept_references(features, draws),
                want_text=False,
            )
        if self.text_pass:
            pool_mask = None if self.pool_padding else _before_padding(features.caption_ids, self.end_token_id)
            passes["text"] = Pass(
                features.target,
                states[:, -1],
                jnp.zeros(len(states)),
                text_pool_mask=pool_mask,
                want_image=False,
            )
        outputs = dict(zip(passes, transformer(*passes.values(), semantic_depth=depth), strict=True))

        if self.image_pass:
            image_pass = outputs["image"]
            terms["image"] = flow_matching.loss(image_pass.image, noisy, features.target, sigma, space=self.image_loss)
            weights["image"] = self.image_weight * self.image_pass
            if depth is not None:
                terms["image_align"] = alignment_loss(image_pass.image_semantic, features.teacher_image)
                weights["image_align"] = self.alignment_weight * self.image_pass
        if self.text_pass:
            text_pass = outputs["text"]
            terms["text"] = masked_text.loss(
                text_pass.text_logits,
                self._masked(features, draws),
                features.caption_ids,
                draws.text_time,
                features.caption_loss_mask,
                self.mask_token_id,
            )
            weights["text"] = self.text_weight * self.text_pass
            if depth is not None:
                terms["text_align"] = alignment_loss(text_pass.text_semantic, features.teacher_text)
                weights["text_align"] = self.alignment_weight * self.text_pass

        if self.image_pass and self.text_pass:
            terms["contrastive"] = contrastive_loss(
                mean_tokens(image_pass.image_hidden), mean_tokens(text_pass.text_hidden, pool_mask), self.temperature
            )
            weights["contrastive"] = self.contrastive_weight
        return sum(weights[name] * term for name, term in terms.items()), terms

    def _dropped(self, draws: Draws) -> jax.Array:
        """bool `[B]`: whose text condition is left out."""
        return draws.text_drop < self.text_dropout

    def _masked(self, batch: Batch | Features, draws: Draws) -> jax.Array:
        """The caption's ids `[B, T]`, masked as the step drew it."""
        return masked_text.mask_tokens(
            batch.caption_ids, draws.text_time, draws.text_mask, batch.caption_loss_mask, self.mask_token_id
        )

    def _kept_references(self, features: Features, draws: Draws) -> jax.Array | None:
        """The reference mask, bool `[B, N]`, False throughout where a sample loses its references."""
        mask = features.reference_mask
        if features.references is None or not self.reference_dropout:
            return mask
        if mask is None:
            mask = jnp.ones(features.references.shape[:2], bool)
        return mask & (draws.reference_drop >= self.reference_dropout)[:, None]


def _before_padding(ids: jax.Array, end_id: int) -> jax.Array:
    """bool `[B, T]`: positions up to and with the first end token; what follows is padding."""
    is_end = ids == end_id
    return jnp.cumsum(is_end, axis=1) - is_end == 0


def _normalize(x: jax.Array) -> jax.Array:
    # torch.nn.functional.normalize: the norm is bounded from below, so a zero vector stays zero and has a gradient.
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def alignment_loss(predicted: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 - mean cosine of adapter outputs and teacher vectors, both float32 `[B, S]`; a scalar in [0, 2]."""
    return 1 - jnp.mean(jnp.sum(_normalize(predicted) * _normalize(teacher), axis=-1))


def contrastive_loss(image: jax.Array, text: jax.Array, temperature: float) -> jax.Array:
    """Symmetric InfoNCE between pooled features `[B, D]` of the two passes: row i of one belongs to row i of the other.

    The negatives are all other samples of the (global) batch. Returns a float32 scalar.
    """
    logits = jnp.dot(_normalize(image), _normalize(text).T, precision=jax.lax.Precision.HIGHEST) / temperature
    rows = jnp.arange(len(logits))
    # As jnp.diagonal, which hides its collectives in a conditional: XLA for CPUs does not keep the order of those.
    matched = logits[rows, rows]
    to_text = jax.nn.logsumexp(logits, axis=1) - matched
    to_image = jax.nn.logsumexp(logits, axis=0) - matched
    return jnp.mean(to_text + to_image) / 2
