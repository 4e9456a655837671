"""How many floating-point operations a training step needs, counted from the shapes.

XLA's own count takes a loop's body once, and counts what is recomputed; here neither happens. A multiply-add is 2.
Only matrix products are counted (norms, activations and softmax are below 1 % at every size). The backward pass of a
product is two products of its size, so a step needs 3 times its forward passes.

Per sample, with width D and `S` tokens in all, a stream of n tokens in one joint block needs

    modulation           2 * D * 6D          once per sample
    key, value           2 * n * D * 2D
    query, out           2 * n * D * 2D      only tokens whose result is read
    attention            2 * 2 * n * S * D   only tokens whose result is read (scores, and their sum of values)
    MLP                  2 * n * D * 8D      only tokens whose result is read

In all blocks but the last every token's result is read, as later blocks attend to it. From the last one, the image pass
reads the target's tokens and the text pass the text's.
"""

from unialign_jax.models.t5 import T5Config
from unialign_jax.models.unialign import TIME_FEATURES, TransformerConfig

BACKWARD_TO_FORWARD = 2


def train_step_flops(
    config: TransformerConfig,
    *,
    batch: int,
    image_tokens: int,
    text_tokens: int,
    references: int,
    aligned: bool,
    image_pass: bool = True,
    text_pass: bool = True,
) -> int:
    """FLOPs that one update of the transformer needs: the passes that run, forward and backward.

    The frozen encoders, the optimizer and anything recomputed do not count, as is usual for model FLOPs. All parameters
    are taken for trained: where some are frozen, or adapted by LoRA, the backward pass needs up to half less.

    Args:
      config: the transformer's shape.
      batch: global batch size, in samples.
      image_tokens: patches of one image (512 x 512 pixels of SD3: 1 024).
      text_tokens: text length T.
      references: number of reference images N; absent ones count as present, since shapes are static.
      aligned: whether the semantic adapters run.
      image_pass, text_pass: whether that pass runs.
    """
    image = image_pass_flops(config, image_tokens, text_tokens, references)
    text = text_pass_flops(config, image_tokens, text_tokens)
    if aligned:
        adapter = 2 * (config.width * config.adapter_hidden + config.adapter_hidden * config.semantic_dim)
        image, text = image + adapter, text + adapter
    return (1 + BACKWARD_TO_FORWARD) * batch * (image * image_pass + text * text_pass)


def image_pass_flops(config: TransformerConfig, image_tokens: int, text_tokens: int, references: int = 0) -> int:
    """Forward FLOPs of one sample when only the image is wanted: one step of the image sampler."""
    tokens = image_tokens * (1 + references)
    patch = config.patch_size**2
    head = 2 * config.width * 2 * config.width + 2 * image_tokens * config.width * patch * config.out_channels
    return _trunk(config, tokens, text_tokens, read_image=image_tokens, read_text=0) + head


def text_pass_flops(config: TransformerConfig, image_tokens: int, text_tokens: int) -> int:
    """Forward FLOPs of one sample when only the text is wanted: one step of the text sampler."""
    head = 2 * text_tokens * config.width * config.vocab_size
    return _trunk(config, image_tokens, text_tokens, read_image=0, read_text=text_tokens) + head


def _trunk(config: TransformerConfig, image_tokens: int, text_tokens: int, *, read_image: int, read_text: int) -> int:
    """Embeddings and all blocks; `read_*` tokens are those whose result the last block is asked for."""
    width = config.width
    embed = 2 * image_tokens * config.patch_size**2 * config.in_channels * width
    embed += 2 * text_tokens * config.joint_attention_dim * width
    embed += 2 * (TIME_FEATURES * width + width * width)
    joint = image_tokens + text_tokens
    inner = _stream(width, image_tokens, joint, image_tokens) + _stream(width, text_tokens, joint, text_tokens)
    last = _stream(width, image_tokens, joint, read_image) + _stream(width, text_tokens, joint, read_text)
    return embed + (config.num_layers - 1) * inner + last


def _stream(width: int, tokens: int, joint: int, read: int) -> int:
    modulation = 2 * width * 6 * width
    keys_values = 2 * tokens * width * 2 * width
    per_read = 2 * width * 2 * width + 4 * joint * width + 2 * width * 8 * width
    return modulation + keys_values + read * per_read


def recomputed_flops(
    config: TransformerConfig,
    remat: str,
    *,
    batch: int,
    image_tokens: int,
    text_tokens: int,
    references: int,
    image_pass: bool = True,
    text_pass: bool = True,
) -> int:
    """FLOPs that one update computes a second time, or for nothing: what a remat policy costs, and the kernel.

    The loop over blocks treats all of them alike, so the last one works for tokens whose result is not read, forward
    and backward. A flash kernel computes the scores once more for its backward pass under every policy.

    Args:
      config: the transformer's shape.
      remat: a key of `models.blocks.REMAT_POLICIES`.
      batch, image_tokens, text_tokens, references, image_pass, text_pass: as for `train_step_flops`.
    """
    passes = []
    if image_pass:
        passes.append((image_tokens * (1 + references), {"read_image": image_tokens, "read_text": 0}))
    if text_pass:
        passes.append((image_tokens, {"read_image": 0, "read_text": text_tokens}))
    total = 0
    for images, read in passes:
        joint = images + text_tokens
        block = _stream(config.width, images, joint, images) + _stream(config.width, text_tokens, joint, text_tokens)
        needed = _trunk(config, images, text_tokens, **read)
        all_read = _trunk(config, images, text_tokens, read_image=images, read_text=text_tokens)
        product = 2 * joint * joint * config.width
        again = {
            "none": 0,
            "dots+attention": 0,
            "dots": 2 * product,
            "attention+mlp": block - 2 * product - 2 * joint * 4 * config.width**2,  # less the MLP's second product
            "attention": block - 2 * product,
            "full": block,
        }[remat]
        total += (1 + BACKWARD_TO_FORWARD) * (all_read - needed) + config.num_layers * (again + product)
    return batch * total


def text_encoder_flops(config: T5Config, *, texts: int, tokens: int) -> int:
    """Forward FLOPs of the text encoder on this many texts of `tokens` tokens."""
    inner = config.num_heads * config.d_kv
    block = 2 * tokens * (4 * config.d_model * inner + 3 * config.d_model * config.d_ff) + 4 * tokens * tokens * inner
    return texts * config.num_layers * block
