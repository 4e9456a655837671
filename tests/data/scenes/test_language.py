"""Captions, instructions and questions: that words mean what the scenes are, both ways, in every wording."""

import collections
import dataclasses

import numpy as np
import pytest

from unialign_jax.data.scenes import edits, language, questions, templates
from unialign_jax.data.scenes.edits import Edit
from unialign_jax.data.scenes.language import Unread, parse_caption
from unialign_jax.data.scenes.world import Scene, Thing, draw_scene, holds

RED = Thing("circle", "red", "small", "top left")
ORANGE = Thing("star", "orange", "large", "top right")
BLUE = Thing("ring", "blue", "large", "bottom right")


def scenes(count, split=None):
    return [draw_scene(np.random.default_rng([7, i]), split) for i in range(count)]


def test_every_caption_in_every_wording_reads_back_as_the_scene():
    used = collections.Counter()
    for scene in scenes(600):
        for held_out in (False, True):
            for wording, text in language.captions(scene, held_out):
                assert parse_caption(text) == scene.spoken(), text
                assert templates.length(text) <= 31
                assert wording.held_out == held_out
                used[wording] += 1
            assert language.captions(scene, held_out)
    assert set(used) == set(language.WORDINGS) and min(used.values()) > 50


def test_what_captions_look_like():
    scene = Scene((BLUE, ORANGE, RED), "grey")
    texts = [text for _, text in language.captions(scene)]
    assert texts == [
        "small red circle top left, large orange star top right, large blue ring bottom right, on grey",
        "grey: small red circle top left, large orange star top right, large blue ring bottom right",
        "a small red circle at the top left and a large orange star at the top right and a large blue ring at the "
        "bottom right on a grey background",
        # "on a grey background there is ..." would be 32 words
        "a small red circle at the top left, far right of it a large orange star, far below it a large blue ring, on a "
        "grey background",
        "on grey: a large blue ring at the bottom right, far above it a large orange star, far left of it a small red "
        "circle",
    ]
    # Where nothing shares a row or column there is nothing to relate.
    kinds = {
        wording.kind
        for wording, _ in language.captions(Scene((RED, dataclasses.replace(BLUE, place="centre")), "grey"))
    }
    assert kinds == {"short", "long"}


def test_captions_are_read_with_loose_writing_and_in_any_order():
    expected = Scene((RED, ORANGE), "navy")
    for text in (
        "  A small red circle at the top left and a large ORANGE star at the top right on a navy background. ",
        "a large orange star at the top right and a small red circle at the top left on a navy background",
        "navy : large orange star top right , small red circle top left",
        "a large orange star at the top right, far left of it a small red circle, on a navy background",
    ):
        assert parse_caption(text) == expected, text


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no wording of the language fits: ''"),
        ("a photo of a cat", "words that are not of the language: photo cat"),
        ("a small red circle", "no wording of the language fits"),
        ("small red circle top left, large blue ring top left, on grey", "two things at one place"),
        ("small red circle top left, large red circle top, on grey", "two things of one colour and shape: red circle"),
        ("grey: small red circle top left, just above it a large blue ring", "no wording"),
        ("on grey: a small red circle at the top, just above it a large blue ring", "no place is just above the top"),
        ("on grey: a small red circle at the left, far right of it a large blue", "no wording of the language fits"),
        ("grey: " + ", ".join(f"small {c} star {p}" for c, p in [("red", "top"), ("blue", "left"), ("pink", "right"),
         ("cyan", "bottom"), ("green", "centre")]), "5 things; a scene has at most 4"),
    ],
)  # fmt: skip
def test_what_is_no_caption_is_refused_with_the_reason(text, reason):
    read = parse_caption(text)
    assert isinstance(read, Unread) and reason in read.reason


def test_mutated_captions_never_raise_and_never_mean_the_same():
    """Of a caption with a word lost, doubled, or exchanged, no reading is the scene, and most have none at all."""
    rng = np.random.default_rng(0)
    words = sorted(language.VOCABULARY)
    unread = total = 0
    for scene in scenes(60):
        for _, text in language.captions(scene):
            tokens = text.split()
            for _ in range(4):
                i, kind = int(rng.integers(len(tokens))), int(rng.integers(3))
                new = {0: [], 1: [tokens[i]] * 2, 2: [words[int(rng.integers(len(words)))]]}[kind]
                mutated = " ".join([*tokens[:i], *new, *tokens[i + 1 :]])
                if templates.normalize(mutated) == templates.normalize(text):
                    continue
                read = parse_caption(mutated)
                total += 1
                unread += isinstance(read, Unread)
                assert isinstance(read, Scene) or read.reason
                assert read != scene.spoken() or mutated.replace(",", "") == text.replace(",", ""), mutated
    assert total > 500 and 0.8 < unread / total < 1


def test_edits_in_words_are_edits_of_scenes():
    kinds = collections.Counter()
    for i, scene in enumerate(scenes(400)):
        rng = np.random.default_rng(i)
        done, after = edits.draw_edits(scene, 1 + i % 2, rng)
        assert after != scene and 1 <= len(after.things) <= 4
        kinds.update(edit.kind for edit in done)
        for held_out in (False, True):
            text = edits.instruct(done, rng, held_out)
            assert templates.length(text) <= 31
            read = edits.parse_instruction(text)
            assert edits.apply(scene, read).spoken() == after.spoken(), text
            assert edits.apply(scene.spoken(), read) == after.spoken()
    assert set(kinds) == set(edits.KINDS) and min(kinds.values()) > 30


def test_what_each_edit_does():
    scene = Scene((dataclasses.replace(RED, direction="left"), BLUE), "grey")

    def after(text):
        return edits.apply(scene, edits.parse_instruction(text))

    turned = scene.things[0]
    for text, things, background in [
        ("make the red circle orange", (dataclasses.replace(turned, colour="orange"), BLUE), "grey"),
        ("move the red circle to the centre", (dataclasses.replace(turned, place="centre"), BLUE), "grey"),
        ("make the blue ring small", (turned, dataclasses.replace(BLUE, size="small")), "grey"),
        ("replace the red circle with an orange star",
         (dataclasses.replace(turned, colour="orange", shape="star"), BLUE), "grey"),
        ("add a large orange star at the top right", (turned, BLUE, ORANGE), "grey"),
        ("remove the blue ring", (turned,), "grey"),
        ("change the background to white", (turned, BLUE), "white"),
        ("Make the red circle blue and make the blue ring red.",
         (dataclasses.replace(turned, colour="blue"), dataclasses.replace(BLUE, colour="red")), "grey"),
        ("move the red circle to the bottom right and remove the blue ring",
         (dataclasses.replace(turned, place="bottom right"),), "grey"),
    ]:  # fmt: skip
        assert after(text) == Scene(things, background), text
    for text, message in [
        ("remove the red ring", "remove: the red ring is not in the scene"),
        ("make the red circle small and move the red circle to the top", "the red circle is to be changed twice"),
        ("move the red circle to the bottom right", "two things at one place"),
        ("replace the red circle with a blue ring", "two things of one colour and shape"),
    ]:
        with pytest.raises(edits.NotPossible, match=message):
            after(text)
    for text in ("", "paint it black", "make the circle blue", "remove the red circle and"):
        assert isinstance(edits.parse_instruction(text), Unread), text
    assert edits.parse_instruction("remove the red ring") == (Edit("remove", colour="red", shape="ring"),)
    with pytest.raises(ValueError, match="4 edits; a scene of 2 has room for 1 to 3"):
        edits.draw_edits(scene, 4, np.random.default_rng(0))


def answer(question, scene):
    """An independent reading of the training wordings, from the words alone."""
    words = question.removesuffix("?").split()
    things = scene.things
    numbers = ("zero", "one", "two", "three", "four")
    text = " ".join(words)
    if text.startswith("how many objects are"):
        chosen = [t for t in things if words[-1] in ("there", t.colour, t.size)]
        return numbers[len(chosen)]
    if words[0] == "what":
        known = text.partition(" at the ")[2]
        chosen = [t for t in things if (t.place == known if known else {t.shape, t.colour} & set(words[4:]))]
        assert len(chosen) == 1
        return getattr(chosen[0], words[1])
    if words[:3] == ["is", "there", "a"] or text.startswith("is there an orange"):
        return "yes" if any([t.colour, t.shape] == words[3:] for t in things) else "no"
    if text.startswith("is there an object at the "):
        return "yes" if text.partition(" at the ")[2] in [t.place for t in things] else "no"
    a = scene.find(words[2], words[3])
    if text.endswith("the same size"):
        return "yes" if a.size == scene.find(words[6], words[7]).size else "no"
    b = scene.find(words[-2], words[-1])
    middle = " ".join(words[4:-3])
    truth = (a.size, b.size) == ("large", "small") if middle == "larger than" else holds(middle, a, b)
    return "yes" if truth else "no"


def test_answers_are_right_and_no_answer_is_a_safe_guess():
    given = collections.defaultdict(collections.Counter)
    for i, scene in enumerate(scenes(1500)):
        for kind in questions.KINDS:
            drawn = questions.draw_question(scene, np.random.default_rng(i), kind)
            if drawn is None:
                assert kind in ("relation", "comparison", "colour", "shape")
                continue
            question, told = drawn
            assert templates.length(question) <= 14
            assert answer(question, scene) == told, (question, scene)
            given[kind][told] += 1
    assert set(given) == set(questions.KINDS)
    for kind, counts in given.items():
        assert max(counts.values()) / counts.total() < 0.6, (kind, counts)


def test_held_out_wordings_are_new_and_of_known_words():
    known, new, kept = set(), set(), set()
    for i, scene in enumerate(scenes(300)):
        for held_out, texts in ((False, known), (True, kept)):
            rng = np.random.default_rng(i)
            texts.update(text for _, text in language.captions(scene, held_out))
            texts.add(edits.instruct(edits.draw_edits(scene, 1, rng)[0], rng, held_out))
            for kind in questions.KINDS:
                drawn = questions.draw_question(scene, rng, kind, held_out)
                texts.update(drawn[:1] if drawn else ())
    new = {word for text in kept for word in templates.split(text)} - {
        w for text in known for w in templates.split(text)
    }
    assert not new
    assert not known & kept
