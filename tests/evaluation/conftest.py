"""A model of scenes whose scores are known."""

import numpy as np
import pytest

from unialign_jax.data import scenes as world
from unialign_jax.data.scenes import language, verify
from unialign_jax.evaluation import scenes

COUNT = 12  # most examples of a task that it knows


class Knowing:
    """Answers as the truth does, found from what a model is given: `spoil` changes what it says or draws."""

    size = (32, 32)
    params = {"head": {"bias": np.zeros(3, np.float32)}}

    def __init__(self, spoil=lambda index, result, references: result):
        self.spoil = spoil

    def _truth(self, tasks, asked):
        for task in tasks:
            for i in range(COUNT):
                example = world.draw(task, i, seed=scenes.SEED, subset="test", counts=(1, 2))
                if asked(example):
                    return example
        raise AssertionError("asked for something that is no example")

    def generate(self, prompts, **_):
        # Independent of the examples: the prompt alone says what to draw.
        drawn = [world.render(verify.read_caption(prompt), 32) for prompt in prompts]
        return [self.spoil(i, image, None) for i, image in enumerate(drawn)]

    def compose(self, references, instructions, **_):
        def is_this(example, images, instruction):
            shown = [picture.render(32) for picture in example.references]
            return (
                example.instruction == instruction
                and len(shown) == len(images)
                and all(np.array_equal(a, b) for a, b in zip(shown, images, strict=True))
            )

        out = []
        for i, (images, text) in enumerate(zip(references, instructions, strict=True)):
            example = self._truth(
                ("edit", "perceive", "compose"), lambda e, images=images, text=text: is_this(e, images, text)
            )
            out.append(self.spoil(i, example.target.render(32), images))
        return out

    def caption(self, images, **_):
        # Independent of the examples, too: what is seen in the image is said in words of the language.
        rng = np.random.default_rng(0)
        said = [language.draw_caption(verify.read_image(image), rng)[1] for image in images]
        return [self.spoil(i, text, None) for i, text in enumerate(said)]

    def answer(self, images, questions, **_):
        out = []
        for i, (image, text) in enumerate(zip(images, questions, strict=True)):
            example = self._truth(
                ["answer"],
                lambda e, image=image, text=text: e.question == text and np.array_equal(e.target.render(32), image),
            )
            out.append(self.spoil(i, example.answer, None))
        return out


@pytest.fixture
def knowing():
    """The class, to be called with what spoils its results."""
    return Knowing
