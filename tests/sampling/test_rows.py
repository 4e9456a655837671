"""What a sampling run is asked for: rows of files, streamed, those of training data among them."""

import json

import pytest

from unialign_jax.sampling.rows import FileRows


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_long_file_is_streamed(tmp_path):
    with (tmp_path / "many.txt").open("w") as file:
        file.writelines(f"prompt {i}\n" for i in range(200_000))
    rows = FileRows("generate", 5, tmp_path / "many.txt")
    assert rows.count == 200_000
    stream = iter(rows)
    assert next(stream).prompt == "prompt 0"
    last = list(stream)[-1]
    assert (last.index, last.prompt, last.seed) == (199_999, "prompt 199999", 200_004)


CAPTIONED = {"conversations": [{"from": "human", "value": "a dog"}, {"from": "gpt", "value": "…"}]}


@pytest.mark.parametrize(
    ("task", "row", "prompt", "images"),
    [
        ("generate", {"image": ["x.png"], **CAPTIONED}, "a dog", ()),
        ("edit", {"image": ["a.png", "b.png"], "instruction": "swap", **CAPTIONED}, "swap", ("a.png",)),
        ("perceive", {"image": ["a.png", "b.png"], "instruction": "depth", **CAPTIONED}, "depth", ("a.png",)),
        ("compose", {"original_images": ["a.png"], "generated_images": ["x.png"], "caption": "c",
                     "edit_prompt": ' \\"both\\" '}, "both", ("a.png",)),
        ("caption", {"image": ["a.png"], **CAPTIONED}, "", ("a.png",)),
        ("answer", {"image": ["a.png"], "question": "which?", "answer": "that"}, "which?", ("a.png",)),
        ("generate", {"prompt": ' \\"said\\"'}, ' \\"said\\"', ()),
    ],
)  # fmt: skip
def test_rows_of_training_data_are_prompts_too(tmp_path, task, row, prompt, images):
    (made,) = FileRows(task, 0, jsonl(tmp_path / "rows.jsonl", [row]))
    assert (made.error, made.prompt) == (None, prompt)
    assert made.images == tuple(str(tmp_path / image) for image in images)


def test_questions_about_images_are_no_prompts(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a dog"}]
    (row,) = FileRows("generate", 0, jsonl(tmp_path / "rows.jsonl", [{"image": "a.png", "conversations": turns}]))
    assert "generate needs a prompt" in row.error


def test_two_images_are_one_too_many_where_no_row_of_training_has_them(tmp_path):
    (row,) = FileRows("edit", 0, jsonl(tmp_path / "rows.jsonl", [{"instruction": "swap", "image": ["a", "b"]}]))
    assert "takes one image a row, not 2" in row.error


def test_a_line_that_is_nested_too_deep_is_no_row(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + '\n{"prompt": "a red square"}\n')
    deep, whole = FileRows("generate", 0, tmp_path / "deep.jsonl")
    assert "deep.jsonl, line 1: " in deep.error and whole.error is None


def test_files_that_are_no_lists_of_rows_are_refused(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "a red square"}], indent=1))
    with pytest.raises(ValueError, match=r"rows.json: expected JSONL, .*; jq -c '.\[\]' makes JSONL of an array"):
        FileRows("generate", 0, tmp_path / "rows.json")
    with pytest.raises(ValueError, match=r"s3://bucket/p.txt: expected a local path or gs://"):
        FileRows("generate", 0, "s3://bucket/p.txt")
