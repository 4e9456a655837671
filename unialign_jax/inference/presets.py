"""Published protocols: the prompts, lengths, steps and guidance with which results of this family were made."""

import dataclasses
from typing import Any

from unialign_jax.data.samples import TEXT_TASKS

NEGATIVE_PROMPT = (
    "low quality, blurry, low resolution, backlit, cartoon, animated, deformed, oversaturated, undersaturated, "
    "out of frame"
)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a call takes where it says nothing else.

    Attributes:
      steps: Euler steps of an image.
      generate_guidance, edit_guidance: classifier-free guidance without and with reference images.
      negative_prompt: what guidance leads away from.
      caption_steps, answer_steps: times of the ancestral text sampler.
      fast: whether texts are decoded by confidence instead (`masked_text.sample_confident`), in `fast_steps`.
      caption_length, answer_length: tokens of a text, a question included; a model trained on shorter texts keeps its
        own length.
      caption: the prompt of a caption; published: none.
      question: the prompt of an answer. Its end token is stripped, and the answer is cut at its first one.
    """

    steps: int = 50
    generate_guidance: float = 7.0
    edit_guidance: float = 9.0
    negative_prompt: str = NEGATIVE_PROMPT
    caption_steps: int = 32
    fast: bool = False
    fast_steps: int = 16
    caption_length: int = 256
    answer_steps: int = 32
    answer_length: int = 128
    caption: str = ""
    question: str = "Q: {} Answer the question using a single word or phrase. A:"

    def settle(self, task: str, **given: Any) -> dict[str, Any]:
        """The settings of a call, each the protocol's where `given` has None or nothing.

        Args:
          task: of the pipeline's.
          given: `steps`; of images, `guidance` and `negative_prompt`; of texts, `fast`.
        """
        if task in TEXT_TASKS:
            fast = self.fast if given.get("fast") is None else given["fast"]
            ancestral = self.caption_steps if task == "caption" else self.answer_steps
            mine = {"steps": self.fast_steps if fast else ancestral, "fast": fast}
        else:
            guidance = self.generate_guidance if task == "generate" else self.edit_guidance
            mine = {"steps": self.steps, "guidance": guidance, "negative_prompt": self.negative_prompt}
        return {name: value if given.get(name) is None else given[name] for name, value in mine.items()}


# Sources: glimmer16/UniAlignment, infer.py and the defaults of its pipeline; zijieli-Jlee/Dual-Diffusion, the demo
# notebook, the defaults of its pipeline and its VQA script, which is the one that states how questions are asked.
PROTOCOLS = {
    "unialignment": Protocol(),
    "plain": Protocol(question="{}"),  # questions as they stand: what a model trained on such rows has seen
    # Models trained on `data.scenes`: there a dropped condition is the text " ", so guidance leads away from that. What
    # is to be said is certain but for its wording, of which confident decoding keeps to one.
    "scenes": Protocol(
        steps=28,
        generate_guidance=3.0,
        edit_guidance=3.0,
        negative_prompt=" ",
        fast=True,
        fast_steps=32,
        caption=":",
        question="{}",
    ),
    "d-dit": Protocol(steps=28, caption_steps=128),
    "d-dit-open": Protocol(steps=28, caption_steps=128, question="Q: {} A:"),
    "vizwiz": Protocol(
        question="Q: {} Answer the question using a single word or phrase. Reply unanswerable if information is not "
        "present in the image. A:"
    ),
}


def protocol(name: str | Protocol) -> Protocol:
    """The protocol of a name in `PROTOCOLS`; one of your own is returned as it is.

    Raises:
      ValueError: there is none of that name.
    """
    if isinstance(name, Protocol):
        return name
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r} is unknown; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
