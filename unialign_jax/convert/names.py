"""PyTorch tensor names of the four networks against paths in our parameter trees: one table each, read both ways.

A row says that a PyTorch tensor (or, where blocks are stacked, one tensor per block) and a leaf of our tree hold the
same numbers, and how their layouts differ. Import, export, the check of a file's names and shapes, and the count of
what is missing all read these tables and nothing else.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

NETWORKS = ("transformer", "text_encoder", "autoencoder", "teacher")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one PyTorch tensor is laid out in our tree. All three functions are exact inverses in pairs, and views.

    Attributes:
      shape: PyTorch shape -> our shape.
      to_jax: PyTorch array -> ours.
      to_torch: (our array, PyTorch shape) -> PyTorch array.
    """

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


SAME = Layout(lambda s: s, lambda a: a, lambda a, s: a)
# [out, in] -> [in, out]
LINEAR = Layout(lambda s: s[::-1], lambda a: a.T, lambda a, s: a.T)
# [out, in, kh, kw] -> [kh, kw, in, out]
CONV = Layout(lambda s: (*s[2:], s[1], s[0]), lambda a: a.transpose(2, 3, 1, 0), lambda a, s: a.transpose(3, 2, 0, 1))
# [1, ...] -> [...]
FIRST = Layout(lambda s: s[1:], lambda a: a[0], lambda a, s: a[None])
# A convolution whose stride is its kernel is a matmul on flattened patches: [D, C, ph, pw] -> [ph * pw * C, D]
PATCH = Layout(
    lambda s: (math.prod(s[1:]), s[0]),
    lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
    lambda a, s: a.reshape(s[2], s[3], s[1], s[0]).transpose(3, 2, 0, 1),
)
# The same for patches flattened channels first, as Qwen's image processor does: [D, C, t, ph, pw] -> [C*t*ph*pw, D]
FLAT_PATCH = Layout(
    lambda s: (math.prod(s[1:]), s[0]),
    lambda a: a.reshape(a.shape[0], -1).T,
    lambda a, s: a.T.reshape(s),
)


# A table of both coordinates' features -> those of one: [1, n * n, D] -> [n, D / 2].
TABLE = Layout(
    lambda s: (math.isqrt(s[1]), s[2] // 2),
    lambda a: a[0, : math.isqrt(a.shape[1]), : a.shape[2] // 2],
    lambda a, s: np.concatenate(
        [np.broadcast_to(x, (len(a), *a.shape)) for x in (a[None], a[:, None])], axis=2
    ).reshape(s),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of our tree and where its numbers are in a PyTorch file.

    Attributes:
      torch: tensor name; `{}` stands for the block number where blocks are stacked.
      path: "/"-joined path in our tree.
      shape: shape of one PyTorch tensor (of the whole fused tensor, where one is split).
      layout: how one tensor (one part of a fused tensor) is laid out here.
      layers: number of stacked blocks, our leading axis; 0: not stacked.
      part: (i, n): the leaf is the i-th of n equal parts of the tensor's first axis.
    """

    torch: str
    path: str
    shape: tuple[int, ...]
    layout: Layout = SAME
    layers: int = 0
    part: tuple[int, int] = (0, 1)

    @property
    def names(self) -> tuple[str, ...]:
        """PyTorch names, one per block (one in all where blocks are not stacked)."""
        return tuple(self.torch.format(i) for i in range(self.layers)) if self.layers else (self.torch,)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """PyTorch shape of this leaf's part of one tensor."""
        return (self.shape[0] // self.part[1], *self.shape[1:])

    @property
    def jax_shape(self) -> tuple[int, ...]:
        """Shape of our leaf, with the leading axis of stacked blocks."""
        shape = self.layout.shape(self.part_shape)
        return (self.layers, *shape) if self.layers else shape


def table(network: str, config: Mapping[str, Any]) -> tuple[Row, ...]:
    """Every tensor of a network.

    Args:
      network: one of `NETWORKS`.
      config: the fields of the network's config dataclass.

    Returns:
      One row per leaf of our tree. Tensors that repeat another (`ALIASES`) are in no row.
    """
    return _TABLES[network](config)


def torch_shapes(rows: tuple[Row, ...]) -> dict[str, tuple[int, ...]]:
    """Every PyTorch tensor name of a table and its shape."""
    return {name: row.shape for row in rows for name in row.names}


# The fixed position table, stored in public transformer checkpoints as a buffer.
POSITION_TABLE = "pos_embed.pos_embed"
# Tensors that repeat another one of the same file.
ALIASES = {"text_encoder": {"encoder.embed_tokens.weight": "shared.weight"}}


def _linear(torch: str, path: str, out: int, into: int, layers: int = 0, bias: bool = True) -> list[Row]:
    rows = [Row(f"{torch}.weight", f"{path}/kernel", (out, into), LINEAR, layers)]
    return rows + ([Row(f"{torch}.bias", f"{path}/bias", (out,), SAME, layers)] if bias else [])


def _conv(torch: str, path: str, out: int, into: int, size: int) -> list[Row]:
    return [
        Row(f"{torch}.weight", f"{path}/kernel", (out, into, size, size), CONV),
        Row(f"{torch}.bias", f"{path}/bias", (out,)),
    ]


def _norm(torch: str, path: str, width: int) -> list[Row]:
    return [Row(f"{torch}.weight", f"{path}/scale", (width,)), Row(f"{torch}.bias", f"{path}/bias", (width,))]


def _transformer(config: Mapping[str, Any]) -> tuple[Row, ...]:
    width, layers = config["caption_projection_dim"], config["num_layers"]
    patch, channels = config["patch_size"], config["in_channels"]
    hidden, semantic = config["adapter_hidden"], config["semantic_dim"]
    block, time = "transformer_blocks.{}", "time_text_embed.timestep_embedder"
    rows = [
        Row("null_image_embd", "null_image_tokens", (1, 8, width), FIRST),
        Row(POSITION_TABLE, "positions", (1, config["pos_embed_max_size"] ** 2, width), TABLE),
        Row("pos_embed.proj.weight", "patch_embed/kernel", (width, channels, patch, patch), PATCH),
        Row("pos_embed.proj.bias", "patch_embed/bias", (width,)),
        *_linear(f"{time}.linear_1", "time_embed/up", width, 256),
        *_linear(f"{time}.linear_2", "time_embed/down", width, width),
        *_linear("context_embedder", "text_embed", width, config["joint_attention_dim"]),
        *_linear("image_norm_out.linear", "image_modulation", 2 * width, width),
        *_linear("image_proj_out", "image_head", patch * patch * config["out_channels"], width),
        *_linear("text_proj_out", "text_head", config["vocab_size"], width),
    ]
    for short, path in (("img", "image_adapter"), ("text", "text_adapter")):
        rows += _linear(f"siglip_adapter_{short}.fc.0", f"{path}/up", hidden, width)
        rows += _linear(f"siglip_adapter_{short}.fc.2", f"{path}/down", semantic, hidden)
    streams = {
        "image": ("norm1", "to_q", "to_k", "to_v", "to_out.0", "ff", "norm_q", "norm_k"),
        "text": (
            "norm1_context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context",
            "norm_added_q", "norm_added_k",
        ),
    }  # fmt: skip
    for stream, (norm, query, key, value, out, mlp, query_norm, key_norm) in streams.items():
        path = f"blocks/{stream}"
        rows += _linear(f"{block}.{norm}.linear", f"{path}/modulation", 6 * width, width, layers)
        for torch, ours in ((query, "query"), (key, "key"), (value, "value"), (out, "out")):
            rows += _linear(f"{block}.attn.{torch}", f"{path}/{ours}", width, width, layers)
        rows += _linear(f"{block}.{mlp}.net.0.proj", f"{path}/mlp_up", 4 * width, width, layers)
        rows += _linear(f"{block}.{mlp}.net.2", f"{path}/mlp_down", width, 4 * width, layers)
        if config["qk_norm"] is not None:
            for torch, ours in ((query_norm, "query_norm"), (key_norm, "key_norm")):
                shape = (config["attention_head_dim"],)
                rows.append(Row(f"{block}.attn.{torch}.weight", f"{path}/{ours}/scale", shape, SAME, layers))
    return tuple(rows)


def _text_encoder(config: Mapping[str, Any]) -> tuple[Row, ...]:
    width, layers, mlp = config["d_model"], config["num_layers"], config["d_ff"]
    heads = config["num_heads"] * config["d_kv"]
    attention, dense = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rows = [
        Row("shared.weight", "token_embed/embedding", (config["vocab_size"], width)),
        Row(bias, "relative_bias/embedding", (config["relative_attention_num_buckets"], config["num_heads"])),
        Row(f"{attention}.layer_norm.weight", "blocks/attention_norm/scale", (width,), SAME, layers),
        Row(f"{dense}.layer_norm.weight", "blocks/mlp_norm/scale", (width,), SAME, layers),
        Row("encoder.final_layer_norm.weight", "final_norm/scale", (width,)),
    ]
    for torch, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        rows += _linear(f"{attention}.SelfAttention.{torch}", f"blocks/{ours}", heads, width, layers, bias=False)
    rows += _linear(f"{attention}.SelfAttention.o", "blocks/out", width, heads, layers, bias=False)
    for torch, ours, out, into in (
        ("wi_0", "gate", mlp, width),
        ("wi_1", "up", mlp, width),
        ("wo", "down", width, mlp),
    ):
        rows += _linear(f"{dense}.DenseReluDense.{torch}", f"blocks/{ours}", out, into, layers, bias=False)
    return tuple(rows)


def _resnet(torch: str, path: str, into: int, out: int) -> list[Row]:
    rows = _norm(f"{torch}.norm1", f"{path}/norm1", into) + _conv(f"{torch}.conv1", f"{path}/conv1", out, into, 3)
    rows += _norm(f"{torch}.norm2", f"{path}/norm2", out) + _conv(f"{torch}.conv2", f"{path}/conv2", out, out, 3)
    return rows + (_conv(f"{torch}.conv_shortcut", f"{path}/shortcut", out, into, 1) if into != out else [])


def _middle(side: str, width: int) -> list[Row]:
    rows, torch, path = [], f"{side}.mid_block", f"{side}/mid"
    for i in range(2):
        rows += _resnet(f"{torch}.resnets.{i}", f"{path}/resnet_{i}", width, width)
    rows += _norm(f"{torch}.attentions.0.group_norm", f"{path}/attention/norm", width)
    for name, ours in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out")):
        rows += _linear(f"{torch}.attentions.0.{name}", f"{path}/attention/{ours}", width, width)
    return rows


def _autoencoder(config: Mapping[str, Any]) -> tuple[Row, ...]:
    widths, depth, latent = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    last = len(widths) - 1
    rows = _conv("encoder.conv_in", "encoder/conv_in", widths[0], config["in_channels"], 3)
    rows += _middle("encoder", widths[-1]) + _norm("encoder.conv_norm_out", "encoder/norm_out", widths[-1])
    rows += _conv("encoder.conv_out", "encoder/conv_out", 2 * latent, widths[-1], 3)
    into = widths[0]
    for i, width in enumerate(widths):
        torch, path = f"encoder.down_blocks.{i}", f"encoder/down_{i}"
        for j in range(depth):
            rows += _resnet(f"{torch}.resnets.{j}", f"{path}/resnet_{j}", into if j == 0 else width, width)
        if i < last:
            rows += _conv(f"{torch}.downsamplers.0.conv", f"{path}/downsample", width, width, 3)
        into = width
    rows += _conv("decoder.conv_in", "decoder/conv_in", widths[-1], latent, 3)
    rows += _middle("decoder", widths[-1]) + _norm("decoder.conv_norm_out", "decoder/norm_out", widths[0])
    rows += _conv("decoder.conv_out", "decoder/conv_out", config["out_channels"], widths[0], 3)
    into = widths[-1]
    for i, width in enumerate(reversed(widths)):
        torch, path = f"decoder.up_blocks.{i}", f"decoder/up_{i}"
        for j in range(depth + 1):
            rows += _resnet(f"{torch}.resnets.{j}", f"{path}/resnet_{j}", into if j == 0 else width, width)
        if i < last:
            rows += _conv(f"{torch}.upsamplers.0.conv", f"{path}/upsample", width, width, 3)
        into = width
    return tuple(rows)


def _teacher(config: Mapping[str, Any]) -> tuple[Row, ...]:
    width, mlp, layers = config["hidden_size"], config["intermediate_size"], config["depth"]
    merged = width * config["spatial_merge_size"] ** 2
    patch = (3, config["temporal_patch_size"], config["patch_size"], config["patch_size"])
    block, path = "visual.blocks.{}", "vision/blocks"
    rows = [
        Row("model.embed_tokens.weight", "token_embed/embedding", (config["vocab_size"], config["out_hidden_size"])),
        Row("visual.patch_embed.proj.weight", "vision/patch_embed/kernel", (width, *patch), FLAT_PATCH),
        Row("visual.merger.ln_q.weight", "vision/merger/norm/scale", (width,)),
        *_linear("visual.merger.mlp.0", "vision/merger/up", merged, merged),
        *_linear("visual.merger.mlp.2", "vision/merger/down", config["out_hidden_size"], merged),
        Row(f"{block}.norm1.weight", f"{path}/norm1/scale", (width,), SAME, layers),
        Row(f"{block}.norm2.weight", f"{path}/norm2/scale", (width,), SAME, layers),
        *_linear(f"{block}.attn.proj", f"{path}/out", width, width, layers),
        *_linear(f"{block}.mlp.gate_proj", f"{path}/gate", mlp, width, layers),
        *_linear(f"{block}.mlp.up_proj", f"{path}/up", mlp, width, layers),
        *_linear(f"{block}.mlp.down_proj", f"{path}/down", width, mlp, layers),
    ]
    for i, ours in enumerate(("query", "key", "value")):
        fused = f"{block}.attn.qkv"
        rows.append(Row(f"{fused}.weight", f"{path}/{ours}/kernel", (3 * width, width), LINEAR, layers, (i, 3)))
        rows.append(Row(f"{fused}.bias", f"{path}/{ours}/bias", (3 * width,), SAME, layers, (i, 3)))
    return tuple(rows)


_TABLES = {
    "transformer": _transformer,
    "text_encoder": _text_encoder,
    "autoencoder": _autoencoder,
    "teacher": _teacher,
}
