"""What a model in training makes of a few samples: images beside their targets, texts beside the true ones."""

import numpy as np

from unialign_jax.data.images import image_grid
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.inference.inputs import MAX_REFERENCES
from unialign_jax.networks import Networks, Params
from unialign_jax.pipeline import UniAlignPipeline
from unialign_jax.training.run_config import LogConfig


def sample_grid(
    networks: Networks,
    params: Params,
    tokenizer: Tokenizer,
    batch: dict[str, np.ndarray],
    settings: LogConfig,
    protocol: str,
) -> tuple[np.ndarray, str]:
    """Samples an image for each instruction and a text for each target of a host batch: its caption or its answer.

    Args:
      networks, params: the model; parameters of all networks by name.
      tokenizer: of the text encoder.
      batch: as `data.pipeline.Batches` gives it, with or without references.
      settings: `sample_steps` and `guidance` are read.
      protocol: of the run, for what these leave out.

    Returns:
      A grid of rows `[references | target | sampled image]`, uint8 `[height, width, 3]`, and a Markdown table of the
      true and the sampled texts, after what is given of them.
    """
    count, height, width, _ = batch["target"].shape
    pipeline = UniAlignPipeline(
        networks,
        params,
        tokenizer,
        text_length=batch["caption_ids"].shape[1],
        size=(height, width),
        protocol=protocol,
    )
    prompts = [tokenizer.decode(ids) for ids in batch["instruction_ids"]]
    # Training drops the condition by replacing it with " ", so this is the negative prompt that any model knows.
    options = {"steps": settings.sample_steps, "guidance": settings.guidance, "negative_prompt": " "}
    columns = [batch["target"]]
    references = batch.get("references", np.zeros((count, 0, height, width, 3), np.uint8))
    present = batch.get("reference_mask", np.ones(references.shape[:2], bool))
    if present.any():
        pairs = zip(references, present, strict=True)
        made = pipeline.compose([list(images[there])[:MAX_REFERENCES] for images, there in pairs], prompts, **options)
        columns = [*references.swapaxes(0, 1), *columns]
    else:
        made = pipeline.generate(prompts, **options)
    columns.append(np.stack([np.asarray(image) for image in made]))
    rows = np.stack(columns, axis=1).reshape(count * len(columns), height, width, 3)

    given = ~batch["caption_loss_mask"]  # a question, or the prompt of captions
    made = pipeline.complete(list(batch["target"]), batch["caption_ids"], given, steps=settings.sample_steps)
    lines = ["| given | true | sampled |", "| --- | --- | --- |"]
    for ids, prompt, sampled in zip(batch["caption_ids"], given, made, strict=True):
        cells = tokenizer.decode(ids[prompt]), tokenizer.decode(ids[~prompt]), sampled
        lines.append("| " + " | ".join(text.replace("|", "/") for text in cells) + " |")
    return image_grid(rows, columns=len(columns)), "\n".join(lines)
