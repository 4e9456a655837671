"""UniAlignment at its published size, started from SD3-medium: 2.124 B parameters, 512 x 512 pixels.

Before it runs, the pretrained parts are converted once:

    python launch/convert.py --to=jax --source=SD3_MEDIUM_DIRECTORY --teacher=QWEN2_5_VL_DIRECTORY --target=converted

The stage `published` has the values of the public training configuration, the only ones that are known. The three
stages of the paper's curriculum differ from it only in mixtures and lengths, of which nothing is published.

    python launch/train.py --config=configs/sd3_medium.py:all --workdir=runs/sd3 --config.data.root=DIRECTORY \\
        --config.strategy=data+fsdp=64 --config.data.global_batch=1024 --config.remat=attention

That is for 256 chips; docs/pods.md tells how to ask whether something fits, docs/finetuning.md what one GPU can do.

With ":all", what is the same in all stages is set once: `init`, where the converted parts are, `strategy`, `remat`,
`micro_batches`, `data.root` and `data.global_batch`. The rest belongs to a stage: --config.stages.unify.steps=40000.

What the frozen encoders make of the data can be computed once and read from then on, see "Caches" in docs/data.md:

    python launch/precompute.py --config=configs/sd3_medium.py:pretrain --config.data.root=DIRECTORY \\
        --config.cached='("latents", "teacher")' --target=CACHES
    python launch/train.py --config=configs/sd3_medium.py:pretrain --config.data.root=DIRECTORY \\
        --config.cached='("latents", "teacher")' --config.cache_directory=CACHES --workdir=runs/sd3
"""

import ml_collections
from ml_collections import config_dict

CURRICULUM = ("pretrain", "unify", "personalize")
STEPS = {"published": 80_000, "pretrain": 80_000, "unify": 80_000, "personalize": 20_000}
# Set once for all stages of ":all".
SHARED = {"init": "converted", "strategy": "fsdp", "remat": "dots", "micro_batches": 1}
SHARED_DATA = {"root": "", "global_batch": 384}
TEXT_LENGTH = 256
IMAGE = 512  # pixels


def get_config(stage: str = "published") -> ml_collections.ConfigDict:
    """ "published", one of `CURRICULUM`, or "all": a section `stages` with each of these.

    `data.root` is the directory of the sources' files; every source's `path` can also be set by itself.
    """
    shared = {name: config_dict.FieldReference(value) for name, value in SHARED.items()}
    shared["data"] = {name: config_dict.FieldReference(value) for name, value in SHARED_DATA.items()}
    if stage == "all":
        return ml_collections.ConfigDict({"stages": {name: _stage(name, shared) for name in CURRICULUM}, **shared})
    if stage not in STEPS:
        raise ValueError(f"no stage {stage!r}; this config has {', '.join(STEPS)}, all")
    return _stage(stage, shared)


def _source(path: str, task: str, weight: float, *, references: int = 0) -> dict:
    return {
        "path": path,
        "format": "rows",
        "task": task,
        "references": references,
        "weight": weight,
        "image_pass": 1.0,  # published: every sample feeds both passes
        "text_pass": 1.0,
    }


def _sources(stage: str) -> dict:
    """The mixture of a stage; those of earlier stages are rehearsed."""
    if stage == "published":  # the two take turns; perception is among the edits
        return {
            "generate": _source(config_dict.placeholder(str), "generate", 1.0),
            "edit": _source(config_dict.placeholder(str), "edit", 1.0, references=1),
        }
    weights = {
        "pretrain": {"generate": 1.0, "caption": 1.0},
        "unify": {"generate": 1.0, "caption": 0.5, "edit": 1.0, "perceive": 0.5, "answer": 0.5},
        "personalize": {
            "generate": 0.5,
            "caption": 0.25,
            "edit": 0.5,
            "perceive": 0.25,
            "answer": 0.25,
            "compose": 1.5,
        },
    }
    references = {"edit": 1, "perceive": 1, "compose": 3}
    return {
        task: _source(f"{task}.jsonl", task, weight, references=references.get(task, 0))
        for task, weight in weights[stage].items()
    }


def _stage(stage: str, shared: dict) -> ml_collections.ConfigDict:
    place = CURRICULUM.index(stage) if stage in CURRICULUM else 0
    config = ml_collections.ConfigDict()
    config.stage = stage
    config.after = CURRICULUM[place - 1] if place else config_dict.placeholder(str)
    config.seed = 1234 + place  # each stage draws its own noise and order
    config.steps = STEPS[stage]
    config.dtype = "bfloat16"
    config.remat = shared["remat"]
    config.attention = "auto"
    config.unroll = 1
    config.strategy = shared["strategy"]
    config.trained = ("transformer",)
    config.frozen = ()
    adapted = tuple(f"transformer/blocks/*/{name}" for name in ("query", "key", "value", "out"))
    config.lora = {"rank": 0, "targets": adapted, "alpha": config_dict.placeholder(float)}
    config.init = config_dict.placeholder(str) if place else shared["init"]
    config.init_average = True
    config.cached = ()
    config.cache_directory = config_dict.placeholder(str)
    config.micro_batches = shared["micro_batches"]

    config.model = {
        "transformer": {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pos_embed_max_size": 192,
            "vocab_size": 32100,
            "mask_token_id": 32099,
            "adapter_hidden": 2048,
            "semantic_dim": 3584,
            "qk_norm": config_dict.placeholder(str),
        },
        "autoencoder": {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 16,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
        },
        # T5 v1.1 XXL, SD3's text_encoder_3.
        "text_encoder": {
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
        },
        # Qwen2.5-VL-7B's vision tower and input embeddings.
        "teacher": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": (7, 15, 23, 31),
            "min_pixels": 56 * 56,
            "max_pixels": 28 * 28 * 16384,
            "vocab_size": 152_064,
        },
    }
    config.tokenizer = {
        "path": config_dict.placeholder(str),  # that of what it starts from
        "learn_vocab_size": config_dict.placeholder(int),
        "more_texts": {},
    }
    config.teacher_tokenizer = config_dict.placeholder(str)  # the one that came with the teacher

    config.data = {
        "root": shared["data"]["root"],
        "sources": _sources(stage),
        "global_batch": shared["data"]["global_batch"],
        "height": IMAGE,
        "width": IMAGE,
        "max_aspect": 1.0,  # all images are cropped to a square; more keeps their aspect, in buckets
        "side_multiple": 64,
        "text_length": TEXT_LENGTH,
        "caption_prompt": "",
        "teacher_length": TEXT_LENGTH,
        "seed": config.get_ref("seed"),
        "refused_share": 0.01,
        "threads": 8,
        "workers": 8,
        "prefetch": 2,
    }

    config.objective = {
        "image_weight": 1.0,
        "text_weight": 0.2,
        "contrastive_weight": 0.05,
        "alignment_weight": 0.1,
        "temperature": 0.07,
        "semantic_depth": 8,
        "time_shift": 1.0,
        "image_loss": "x0",
        "text_dropout": 0.1,
        "reference_dropout": 0.0,
        "pool_padding": True,
    }
    config.optimizer = {
        "learning_rate": 3e-5,
        "warmup_steps": 2000,
        "decay_steps": 0,
        "weight_decay": 1e-2,
        "decay_matrices_only": False,
        "muon": False,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "clip_norm": 2.0,
        "ema_rate": 0.9995,
        "ema_warmup": False,
    }
    config.log = {"every": 20, "samples_every": 5000, "sample_count": 8, "sample_steps": 28, "guidance": 7.0}
    config.checkpoint = {"every": 5000, "keep": 3, "keep_period": 20_000}
    # Questions are asked as the rows have them, where answers are learned.
    config.protocol = "plain" if "answer" in config.data.sources else "unialignment"
    config.resume_step = config_dict.placeholder(int)
    config.allow_changed = ()
    return config
