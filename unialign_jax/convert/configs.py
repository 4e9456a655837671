"""The public config.json of each network against our config dataclasses, both ways.

Every public key is used, or must have a value that we can honour, or is known not to matter. A key that is none of the
three is refused: what silently changes nothing here may change the network there.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from unialign_jax.convert.errors import ConversionError
from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.pixel_codec import PixelCodecConfig
from unialign_jax.models.t5 import T5Config
from unialign_jax.models.teachers import QwenTeacherConfig
from unialign_jax.models.unialign import TransformerConfig

_PIPELINE = "UniAlignmentPipeline"
_SD3, _TRANSFORMER, _PIXEL_CODEC = "SD3Transformer2DModel", "SD3JointModelFlexible", "PixelCodec"


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What of the public scheduler matters here; by default SD3's.

    Attributes:
      shift: of the noise levels, see `flow_matching.euler_sigmas`.
    """

    shift: float = 3.0

    def __post_init__(self):
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; expected a number above 0")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What samplers of a model trained here take where they are told nothing else; any of it may be left out.

    Attributes:
      text_length: tokens of every text.
      size: height and width in pixels.
      protocol: a name in `inference.presets.PROTOCOLS`.
    """

    text_length: int = 256
    size: tuple[int, int] = (512, 512)
    protocol: str = "unialignment"

    def __post_init__(self):
        if self.text_length < 1:
            raise ValueError(f"text_length is {self.text_length}; expected 1 or more")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size is {list(self.size)}; expected height and width, each 1 or more")


SCHEDULER = dataclasses.asdict(SchedulerConfig())
_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class _Schema:
    """Keys of one public config.

    Attributes:
      kind: our dataclass; its fields are the keys that are used.
      absent: what the absence of a used key means, `_REQUIRED` if it may not be absent (default: `_REQUIRED`).
      fixed: key -> the values we can honour; the first is what we write.
      means: key of `fixed` -> what its absence means, where that is not the first value.
      written: keys that do not matter here -> what we write for the libraries that read them.
      ignored: more keys that do not matter.
    """

    kind: type
    absent: Mapping[str, Any]
    fixed: Mapping[str, tuple]
    means: Mapping[str, Any]
    written: Mapping[str, Any]
    ignored: frozenset[str] = frozenset()


_DIFFUSERS = frozenset({"_diffusers_version", "_name_or_path", "_commit_hash"})
# What transformers writes about any model; none of it reaches an encoder's forward pass.
_TRANSFORMERS = frozenset({
    "_name_or_path", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "decoder_start_token_id", "dtype",
    "id2label", "is_decoder", "label2id", "n_positions", "num_decoder_layers", "output_attentions",
    "output_hidden_states", "output_past", "problem_type", "return_dict", "scale_decoder_outputs",
    "task_specific_params", "tie_encoder_decoder", "torch_dtype", "transformers_version",
})  # fmt: skip

_SCHEMAS = {
    "transformer": _Schema(
        kind=TransformerConfig,
        # Four keys are ours: the public class holds them as constants, or is given them apart from its config.
        absent={
            "out_channels": 16,
            "vocab_size": 32100,
            "adapter_hidden": 2048,
            "semantic_dim": 3584,
            "mask_token_id": 32099,
            "qk_norm": None,
        },
        fixed={"_class_name": (_TRANSFORMER, _SD3), "dual_attention_layers": ([], None)},
        means={},
        written={},
        ignored=_DIFFUSERS | {"pooled_projection_dim"},
    ),
    "text_encoder": _Schema(
        kind=T5Config,
        absent={
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
        },
        fixed={
            "model_type": ("t5",),
            "feed_forward_proj": ("gated-gelu",),
            "dense_act_fn": ("gelu_new",),
            "is_gated_act": (True,),
        },
        means={"feed_forward_proj": "relu"},
        written={
            "architectures": ["T5EncoderModel"],
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "initializer_factor": 1.0,
            "is_encoder_decoder": False,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "use_cache": False,
        },
        ignored=_TRANSFORMERS,
    ),
    "autoencoder": _Schema(
        kind=AutoencoderConfig,
        absent={"in_channels": 3, "out_channels": 3, "norm_num_groups": 32},
        fixed={
            "_class_name": ("AutoencoderKL",),
            "act_fn": ("silu",),
            "latents_mean": (None,),
            "latents_std": (None,),
            "mid_block_add_attention": (True,),
            "use_quant_conv": (False,),
            "use_post_quant_conv": (False,),
        },
        means={"use_quant_conv": True, "use_post_quant_conv": True},
        written={"force_upcast": True, "sample_size": 1024},
        ignored=_DIFFUSERS | {"down_block_types", "up_block_types"},
    ),
    "teacher": _Schema(
        kind=QwenTeacherConfig,
        absent={
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": (7, 15, 23, 31),
            "min_pixels": QwenTeacherConfig.min_pixels,
            "max_pixels": QwenTeacherConfig.max_pixels,
        },
        fixed={
            "model_type": ("qwen2_5_vl",),
            "hidden_act": ("silu",),
            "in_channels": (3,),
            "in_chans": (3,),
            "rope_parameters": (None, {"rope_theta": 10000.0, "rope_type": "axial"}),
        },
        means={},
        written={"tokens_per_second": 2},
        ignored=_TRANSFORMERS | {"initializer_range", "spatial_patch_size"},
    ),
    "pixel_codec": _Schema(PixelCodecConfig, {}, {"_class_name": (_PIXEL_CODEC,)}, {}, {}),
    "sampling": _Schema(SamplingConfig, {}, {}, {}, {}),
    "scheduler": _Schema(
        kind=SchedulerConfig,
        absent={},
        fixed={
            "_class_name": ("FlowMatchEulerDiscreteScheduler",),
            "num_train_timesteps": (1000,),
            "use_dynamic_shifting": (False,),
            "invert_sigmas": (False,),
            "shift_terminal": (None,),
            "stochastic_sampling": (False,),
            "use_beta_sigmas": (False,),
            "use_exponential_sigmas": (False,),
            "use_karras_sigmas": (False,),
        },
        means={},
        written={"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15},
        ignored=_DIFFUSERS | {"time_shift_type"},
    ),
}


def _used(schema: _Schema) -> dict[str, Any]:
    return {field.name: schema.absent.get(field.name, _REQUIRED) for field in dataclasses.fields(schema.kind)}


def from_public(network: str, raw: Mapping[str, Any], file: epath.PathLike) -> dict[str, Any]:
    """The fields of our config dataclass that a public config describes.

    Args:
      network: one of `names.NETWORKS`, "pixel_codec" or "scheduler".
      raw: the parsed config.json (of the teacher: see `flatten_teacher`).
      file: where it came from, for messages.

    Raises:
      ConversionError: naming every key that is unknown, missing, or has a value that the network cannot honour.
    """
    schema = _SCHEMAS[network]
    used = _used(schema)
    known = used.keys() | schema.fixed.keys() | schema.written.keys() | schema.ignored
    wrong = {}
    for key, allowed in schema.fixed.items():
        value = raw.get(key, schema.means.get(key, allowed[0]))
        if value not in allowed:
            said = "" if key in raw else " (meant by its absence)"
            wrong[key] = f"{key} = {_show(value)}{said}; only {' or '.join(map(_show, allowed))} can be honoured"
    for key in ("_class_name", "model_type"):
        if key in wrong:  # all other keys are those of something else
            raise ConversionError(f"{file}: of another architecture: {wrong[key]}")
    problems = [f"unknown key {key} = {_show(raw[key])}" for key in sorted(raw) if key not in known]
    problems += wrong.values()
    fields = {key: raw.get(key, absent) for key, absent in used.items()}
    problems += [f"key {key} is missing" for key, value in fields.items() if value is _REQUIRED]
    if problems:
        raise ConversionError(f"{file}: {'; '.join(problems)}")
    check_fields(network, fields, file)
    return fields


def check_fields(network: str, fields: Mapping[str, Any], file: epath.PathLike) -> None:
    """Builds the dataclass once: what contradicts itself is refused.

    Args:
      network: see `from_public`; also "sampling", for `SamplingConfig`.
      fields: by name; some may be left out.
      file: where they came from, for messages.

    Raises:
      ConversionError: naming the file, and the field where one is at fault.
    """
    kind = _SCHEMAS[network].kind
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    problems = [f"{network} has no field {key}" for key in sorted(fields.keys() - defaults.keys())]
    problems += [
        f"{key} = {_show(value)}; expected {_EXPECTED[type(defaults[key])]}"
        for key, value in fields.items()
        if key in defaults and not _same_type(value, defaults[key])
    ]
    if problems:
        raise ConversionError(f"{file}: {'; '.join(problems)}")
    try:
        kind(**fields)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{file}: {error}") from error


def with_defaults(network: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a network's config dataclass, of which some are given. Raises ConversionError for wrong ones."""
    check_fields(network, fields, network)
    return dataclasses.asdict(_SCHEMAS[network].kind(**fields))


def to_public(network: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The public config.json of a network with these fields (of the teacher: flat, see `flatten_teacher`)."""
    schema = _SCHEMAS[network]
    fixed = {key: allowed[0] for key, allowed in schema.fixed.items()}
    # What is None or empty is meant by absence, and the public transformer class warns of keys that it does not know.
    public = {key: v for key, v in {**fixed, **schema.written, **fields}.items() if v is not None and v != []}
    if network == "autoencoder":
        blocks = len(fields["block_out_channels"])
        public["down_block_types"] = ["DownEncoderBlock2D"] * blocks
        public["up_block_types"] = ["UpDecoderBlock2D"] * blocks
    return public


def flatten_teacher(raw: Mapping[str, Any], processor: Mapping[str, Any], file: pathlib.Path) -> dict[str, Any]:
    """The parts of a Qwen2.5-VL config.json that describe the vision tower and the embedding table, as one level.

    Args:
      raw: config.json.
      processor: preprocessor_config.json, or {}.
      file: config.json's path, for messages.

    Raises:
      ConversionError: if it is no Qwen2.5-VL.
    """
    if raw.get("model_type") != "qwen2_5_vl" or not isinstance(raw.get("vision_config"), dict):
        raise ConversionError(f"{file}: model_type = {_show(raw.get('model_type'))}; a teacher must be a qwen2_5_vl")
    text = raw.get("text_config", raw)
    flat = {**raw["vision_config"], "model_type": "qwen2_5_vl", "vocab_size": text.get("vocab_size", _REQUIRED)}
    if text.get("hidden_size") != flat.get("out_hidden_size"):
        raise ConversionError(
            f"{file}: hidden_size = {_show(text.get('hidden_size'))} but vision_config.out_hidden_size = "
            f"{_show(flat.get('out_hidden_size'))}; image and caption vectors must have one width"
        )
    size = processor.get("size", {})
    for key, newer in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if processor.get(key, size.get(newer)) is not None:
            flat[key] = processor.get(key, size.get(newer))
    return flat


def unflatten_teacher(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and preprocessor_config.json of a teacher with these fields."""
    vision = to_public("teacher", fields)
    processor = {key: vision.pop(key) for key in ("min_pixels", "max_pixels")}
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": vision.pop("model_type"),
        "hidden_size": fields["out_hidden_size"],
        "vocab_size": vision.pop("vocab_size"),
        "vision_config": vision,
    }
    return config, {"image_processor_type": "Qwen2VLImageProcessor", **processor}


def is_sd3(file: epath.Path | pathlib.Path) -> bool:
    """Whether a transformer's config.json is that of a plain SD3."""
    return read_json(file).get("_class_name") == _SD3


def is_pixel_codec(file: epath.Path | pathlib.Path) -> bool:
    """Whether a codec's config.json is that of our pixel codec, which has no tensors."""
    return read_json(file).get("_class_name") == _PIXEL_CODEC


def pipeline_classes(index: Mapping[str, Any]) -> dict[str, list[str]]:
    """Module and class of the transformer in a UniAlignment pipeline's model_index.json; of any other, the public ones.

    diffusers imports the module by this name, which depends on how the public code was started.
    """
    classes = index.get("transformer") if index.get("_class_name") == _PIPELINE else None
    return {"transformer": classes or ["modules.unialignment_model", _TRANSFORMER]}


def model_index(model: Mapping[str, Any], has_tokenizer: bool) -> dict[str, Any]:
    """The model_index.json of the public pipeline, for a `model.json`."""
    codec = ["unialign_jax", _PIXEL_CODEC] if model.get("pixel_codec") else ["diffusers", "AutoencoderKL"]
    return {
        "_class_name": _PIPELINE,
        **pipeline_classes({"_class_name": _PIPELINE, **model.get("pipeline", {})}),
        "text_encoder": ["transformers", "T5EncoderModel"],
        **({"tokenizer": ["transformers", "T5TokenizerFast"]} if has_tokenizer else {}),
        "vae": codec,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }


def read_json(file: epath.Path | pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ConversionError: naming the file, if it is absent or holds no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{file} does not exist") from error
    except (ValueError, OSError) as error:
        raise ConversionError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{file} holds a JSON {type(value).__name__}; expected an object")
    return value


def write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, readable, with a final newline."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_EXPECTED = {int: "a whole number", float: "a number", tuple: "a list of whole numbers", str: "a text"}


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(type(v) is int for v in value)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default) if isinstance(default, int | str) else True


def _show(value: Any) -> str:
    return json.dumps(value, default=str)
