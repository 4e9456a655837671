"""The Qwen teacher against transformers' modules with the same random weights, and against torch's resize."""

import dataclasses
import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from unialign_jax.models.qwen_vision import QwenVisionConfig, QwenVisionTower, extract_patches, resized_size
from unialign_jax.models.teachers import QwenTeacher, QwenTeacherConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

# Windows of 4x4 patches; five blocks with full attention in the second and the last: no multiple of any group.
TINY = QwenTeacherConfig(
    depth=5,
    hidden_size=32,
    intermediate_size=44,
    num_heads=2,
    patch_size=4,
    window_size=16,
    out_hidden_size=24,
    fullatt_block_indexes=(1, 4),
    min_pixels=0,
    vocab_size=50,
)


def to_torch(config: QwenVisionConfig, seed: int) -> Qwen2_5_VisionTransformerPretrainedModel:
    """transformers' tower of that shape, with every parameter random (norms and biases too)."""
    names = ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size")
    names += ("temporal_patch_size", "window_size", "out_hidden_size", "fullatt_block_indexes")
    model = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**{n: getattr(config, n) for n in names}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or "ln_q" in name
            parameter.copy_(1 + 0.3 * noise if is_norm else noise * (0.1 if parameter.ndim == 1 else 0.2))
    return model.eval()


def from_torch(model: Qwen2_5_VisionTransformerPretrainedModel, depth: int) -> dict:
    """The torch tower's weights as the parameter tree of `QwenVisionTower`."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def linear(names):
        kernels = np.stack([weights[f"{name}.weight"].T for name in names])
        return {"kernel": kernels, "bias": np.stack([weights[f"{name}.bias"] for name in names])}

    blocks = [f"blocks.{index}" for index in range(depth)]
    qkv = linear([f"{block}.attn.qkv" for block in blocks])
    parts = {name: np.split(value, 3, axis=-1) for name, value in qkv.items()}
    tree = {name: {k: v[i] for k, v in parts.items()} for i, name in enumerate(("query", "key", "value"))}
    tree["out"] = linear([f"{block}.attn.proj" for block in blocks])
    for name in ("gate", "up", "down"):
        tree[name] = linear([f"{block}.mlp.{name}_proj" for block in blocks])
    for name in ("norm1", "norm2"):
        tree[name] = {"scale": np.stack([weights[f"{block}.{name}.weight"] for block in blocks])}
    merger = {name: {k: v[0] for k, v in linear([f"merger.mlp.{i}"]).items()} for name, i in (("up", 0), ("down", 2))}
    return {
        "patch_embed": {
            "kernel": weights["patch_embed.proj.weight"].reshape(len(weights["blocks.0.norm1.weight"]), -1).T
        },
        "blocks": tree,
        "merger": merger | {"norm": {"scale": weights["merger.ln_q.weight"]}},
    }


def merge_order(patches: np.ndarray, merge: int) -> np.ndarray:
    """`[B, rows, columns, F]` -> `[B * rows * columns, F]` in the order of Qwen's processor: by merged square."""
    batch, rows, columns, width = patches.shape
    squares = patches.reshape(batch, rows // merge, merge, columns // merge, merge, width)
    return np.ascontiguousarray(squares.transpose(0, 1, 3, 2, 4, 5)).reshape(-1, width)


def torch_tokens(model, patches: np.ndarray, merge: int) -> np.ndarray:
    """Merged tokens `[B, N, out]` of transformers' tower, which packs the images into one sequence."""
    batch, rows, columns, _ = patches.shape
    with torch.no_grad():
        out = model(torch.from_numpy(merge_order(patches, merge)), torch.tensor([[1, rows, columns]] * batch))
    return out.pooler_output.numpy().reshape(batch, rows * columns // merge**2, -1)


@functools.cache
def tiny_pair():
    model = to_torch(TINY, seed=0)
    return model, from_torch(model, TINY.depth)


# With windows of 4: whole windows, smaller ones at both edges, at one, less than one window in one or both directions.
@pytest.mark.parametrize(
    ("batch", "rows", "columns"), [(2, 8, 8), (3, 10, 14), (1, 6, 6), (2, 8, 6), (1, 2, 2), (2, 2, 10)]
)
def test_tower_equals_transformers(batch, rows, columns):
    model, params = tiny_pair()
    patches = np.random.default_rng(rows).normal(size=(batch, rows, columns, TINY.patch_values)).astype(np.float32)
    tokens = jax.jit(QwenVisionTower(TINY, jnp.float32).apply)({"params": params}, patches)
    np.testing.assert_allclose(tokens, torch_tokens(model, patches, 2), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("full", "merge", "window", "rows", "columns"),
    [((), 3, 24, 12, 9), ((0,), 2, 28, 14, 8), ((0, 1, 2), 2, 28, 8, 10)],
)
def test_other_shapes_equal_transformers(full, merge, window, rows, columns):
    """Blocks all of one kind, another merge, and a window that is not a multiple of the merged patch."""
    config = QwenVisionConfig(
        depth=3,
        hidden_size=24,
        intermediate_size=20,
        num_heads=3,
        patch_size=4,
        spatial_merge_size=merge,
        temporal_patch_size=1,
        window_size=window,
        out_hidden_size=16,
        fullatt_block_indexes=full,
    )
    model = to_torch(config, seed=1)
    patches = np.random.default_rng(0).normal(size=(2, rows, columns, config.patch_values)).astype(np.float32)
    params = {"params": from_torch(model, config.depth)}
    tokens = jax.jit(QwenVisionTower(config, jnp.float32).apply)(params, patches)
    np.testing.assert_allclose(tokens, torch_tokens(model, patches, merge), atol=2e-5, rtol=0)


def test_the_kind_of_attention_matters():
    """Shows that the cases above would notice a wrong flag."""
    _, params = tiny_pair()
    patches = np.random.default_rng(0).normal(size=(1, 8, 8, TINY.patch_values)).astype(np.float32)
    first, second = (
        jax.jit(QwenVisionTower(dataclasses.replace(TINY, fullatt_block_indexes=full), jnp.float32).apply)(
            {"params": params}, patches
        )
        for full in ((1, 4), (2, 4))
    )
    assert np.abs(first - second).max() > 1e-2


def test_names_and_shapes_of_the_full_size():
    """Every parameter of the public 7B checkpoint has its place, and there are no others (abstract values only)."""
    manifest = json.loads((GOLDEN / "state_dict_manifest.json").read_text())["qwen2_5_vl_visual"]
    expected = sum(int(np.prod(shape)) for shape in manifest.values()) + 152064 * 3584
    tree = nn.unbox(jax.eval_shape(QwenTeacher(QwenTeacherConfig()).init, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == expected
    assert tree["token_embed"]["embedding"].shape == (152064, 3584)
    vision = tree["vision"]
    assert vision["patch_embed"]["kernel"].shape == (3 * 2 * 14 * 14, 1280)
    assert vision["blocks"]["query"]["kernel"].shape == (32, 1280, 1280)
    assert vision["blocks"]["down"]["kernel"].shape == (32, 3420, 1280)
    assert vision["merger"]["up"]["kernel"].shape == (5120, 5120)


@pytest.mark.parametrize("limits", [(56 * 56, 28 * 28 * 16384), (200 * 200, 400 * 400)])
def test_resized_size_equals_the_processor(limits):
    config = QwenVisionConfig(min_pixels=limits[0], max_pixels=limits[1])
    sides = (1, 9, 14, 27, 28, 41, 42, 43, 70, 98, 224, 500, 511, 512, 513, 768, 1024, 5000)
    for height in sides:
        for width in sides:
            if max(height, width) <= 200 * min(height, width):
                expected = smart_resize(height, width, 28, *limits)
                assert resized_size(config, height, width) == expected, (height, width)


def test_small_images_stay_small_without_a_minimum():
    assert resized_size(QwenVisionConfig(min_pixels=0), 32, 32) == (28, 28)
    assert resized_size(QwenVisionConfig(min_pixels=0), 8, 8) == (28, 28)
    assert resized_size(TINY, 32, 48) == (32, 48)
    assert resized_size(QwenVisionConfig(), 32, 32) == (56, 56)


def photo(batch: int, height: int, width: int) -> np.ndarray:
    """uint8 images with edges, gradients and noise."""
    random = np.random.default_rng(height)
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows * 255 / height, columns * 255 / width, 127 + 127 * np.sin(rows * columns / 50)], axis=-1)
    image = np.stack([image] * batch)
    image[:, height // 4 : height // 2, width // 3 : width // 2] = (255, 0, 40)
    return np.clip(image + random.normal(0, 20, image.shape), 0, 255).astype(np.uint8)


SIZES = pytest.mark.parametrize(("height", "width"), [(64, 64), (70, 45), (37, 90), (20, 24), (112, 84)])


@SIZES
def test_patches_equal_torchvision(height, width):
    """The published path: float pixels through torch's antialiased bicubic resize, then the processor's own patches."""
    config = QwenVisionConfig()
    images = photo(2, height, width)
    patches = np.asarray(jax.jit(functools.partial(extract_patches, config))(images / np.float32(127.5) - 1))
    floats = torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2)
    size = resized_size(config, height, width)
    resized = torch.nn.functional.interpolate(floats, size, mode="bicubic", antialias=True, align_corners=False)
    processor = Qwen2VLImageProcessorPil(do_resize=False, do_rescale=False)
    expected = processor(list(resized.numpy()), return_tensors="np", input_data_format="channels_first")
    assert [[1, *patches.shape[1:3]]] * 2 == expected["image_grid_thw"].tolist()
    np.testing.assert_allclose(merge_order(patches, 2), expected["pixel_values"], atol=1e-5, rtol=0)


@SIZES
def test_patches_are_near_pillow(height, width):
    """The whole processor, which rounds to 8 bits. Pale pixels: Pillow also clips, the published path does not."""
    images = (photo(2, height, width) * 0.4 + 70).astype(np.uint8)
    patches = np.asarray(extract_patches(QwenVisionConfig(), images / np.float32(127.5) - 1))
    expected = Qwen2VLImageProcessorPil()(list(images), return_tensors="np")
    assert [[1, *patches.shape[1:3]]] * 2 == expected["image_grid_thw"].tolist()
    np.testing.assert_allclose(merge_order(patches, 2), expected["pixel_values"], atol=1.6 / 255 / 0.26, rtol=0)


def test_images_outside_the_range_are_clipped():
    config = TINY
    images = photo(1, 32, 32) / np.float32(127.5) - 1
    loud = np.where(images > 0.5, images * 3, images)
    expected = extract_patches(config, np.minimum(loud, 1))
    np.testing.assert_array_equal(extract_patches(config, loud), expected)
    assert np.abs(extract_patches(config, images) - expected).max() > 0.1


def test_image_vectors_are_the_mean_of_the_tokens():
    model, vision = tiny_pair()
    teacher = QwenTeacher(TINY, jnp.float32)
    images = photo(2, 44, 27) / np.float32(127.5) - 1
    vectors = jax.jit(teacher.image_vectors)({"vision": vision}, images)
    patches = np.asarray(extract_patches(TINY, images))
    assert patches.shape[1:3] == (12, 6)  # 44 is 5.5 squares of 8, rounded to the even 6; 27 becomes 24
    np.testing.assert_allclose(vectors, torch_tokens(model, patches, 2).mean(axis=1), atol=2e-5, rtol=0)
    assert vectors.shape == (2, teacher.dim)
    assert vectors.dtype == jnp.float32


def test_bfloat16_points_the_same_way():
    _, vision = tiny_pair()
    images = photo(2, 32, 32) / np.float32(127.5) - 1
    exact = jax.jit(QwenTeacher(TINY, jnp.float32).image_vectors)({"vision": vision}, images)
    rough = jax.jit(QwenTeacher(TINY).image_vectors)({"vision": vision}, images)
    assert rough.dtype == jnp.float32
    cosine = jnp.sum(exact * rough, axis=1) / jnp.linalg.norm(exact, axis=1) / jnp.linalg.norm(rough, axis=1)
    assert jnp.all(cosine > 0.999)
    assert not np.array_equal(exact, rough)


def random_table(teacher: QwenTeacher) -> dict:
    """Parameters of the text side alone."""
    table = np.random.default_rng(0).normal(size=(teacher.config.vocab_size, teacher.dim)).astype(np.float32)
    return {"token_embed": {"embedding": table}}


def test_text_vectors_are_the_mean_of_the_embeddings():
    teacher = QwenTeacher(TINY, jnp.float32)
    params = random_table(teacher)
    ids = np.array([[3, 7, 7, 0, 0], [49, 1, 2, 5, 9]], np.int32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    table = torch.nn.Embedding.from_pretrained(torch.from_numpy(params["token_embed"]["embedding"]))
    expected = [table(torch.tensor(row[kept])).mean(dim=0).numpy() for row, kept in zip(ids, mask, strict=True)]
    vectors = jax.jit(teacher.text_vectors)(params, ids, mask)
    np.testing.assert_allclose(vectors, expected, atol=1e-7)
    assert vectors.dtype == jnp.float32


def test_text_vectors_do_not_depend_on_padding():
    teacher = QwenTeacher(TINY, jnp.float32)
    params = random_table(teacher)
    ids = np.array([[3, 7, 8]], np.int32)
    short = teacher.text_vectors(params, ids, np.ones((1, 3), bool))
    for filler in (0, 12, 10_000):
        padded = np.pad(ids, ((0, 0), (0, 5)), constant_values=filler)
        np.testing.assert_array_equal(teacher.text_vectors(params, padded, np.arange(8)[None] < 3), short)
    assert not np.any(teacher.text_vectors(params, ids, np.zeros((1, 3), bool)))
    assert np.all(np.isnan(teacher.text_vectors(params, ids + TINY.vocab_size, np.ones((1, 3), bool))))


def test_parameters_carry_axis_names():
    tree = jax.eval_shape(QwenTeacher(TINY).init, jax.random.key(0))
    assert tree["vision"]["blocks"]["query"]["kernel"].names == ("layers", "embed", "heads")
    assert tree["token_embed"]["embedding"].names == ("vocab", "embed")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nn.unbox(tree)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 36}, "hidden_size 36"),
        ({"window_size": 7}, "window_size 7"),
        ({"fullatt_block_indexes": [1, 5]}, r"fullatt_block_indexes \[5\]"),
        ({"min_pixels": 99, "max_pixels": 9}, "min_pixels 99"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        QwenTeacherConfig(**{**vars(TINY), **change})


def test_extreme_aspect_ratio_is_refused():
    with pytest.raises(ValueError, match="2010x10"):
        resized_size(TINY, 2010, 10)


def test_a_random_teacher_tells_images_apart():
    """What the small configurations align to: frozen random weights."""
    teacher = QwenTeacher(TINY, jnp.float32)
    params = nn.unbox(jax.jit(teacher.init)(jax.random.key(0)))
    images = np.full((3, 32, 32, 3), 0.8, np.float32)
    images[1, 4:20, 4:20] = (-1, 1, -1)
    images[2, 4:20, 4:20] = (1, -1, -1)
    vectors = np.asarray(jax.jit(teacher.image_vectors)(params, images))
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    assert np.all(cosines[np.triu_indices(3, 1)] < 0.99)
