"""A small model from scratch, for a few hundred captioned photographs on a laptop's CPU: minutes, not hours.

The same code as the full size, with what nothing pretrained is needed for: pixels rearranged instead of an autoencoder,
a small T5 trained with the rest, a tokenizer learned from the captions, and as teacher a random, frozen tower.
"""

import ml_collections
from ml_collections import config_dict

STAGES = ("photos",)
VOCABULARY = 512  # what the captions of a hundred photographs yield; tokenizer.learn_vocab_size sets another everywhere
TEXT_LENGTH = 64
IMAGE = 48  # pixels
WIDTH, HEADS = 128, 4
TEACHER_WIDTH = 64


def get_config(stage: str = "photos") -> ml_collections.ConfigDict:
    """The one stage: generation and captioning of the photographs in `data.sources.photos.path`."""
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}; this config has {', '.join(STAGES)}")
    vocabulary = config_dict.FieldReference(VOCABULARY)
    config = ml_collections.ConfigDict()
    config.stage = stage
    config.seed = 0
    config.steps = 1000
    config.dtype = "float32"  # CPUs have no fast bfloat16
    config.remat = "none"
    config.attention = "auto"
    config.unroll = 1
    config.strategy = "fsdp"
    config.trained = ("transformer", "text_encoder")
    config.after = config_dict.placeholder(str)
    config.frozen = ()
    adapted = tuple(f"transformer/blocks/*/{name}" for name in ("query", "key", "value", "out"))
    config.lora = {"rank": 0, "targets": adapted, "alpha": config_dict.placeholder(float)}
    config.init = config_dict.placeholder(str)
    config.init_average = True
    config.cached = ()
    config.cache_directory = config_dict.placeholder(str)
    config.micro_batches = 1

    config.model = {
        "transformer": {
            "sample_size": IMAGE // 2,
            "patch_size": 2,
            # 4 x 4 pixels are one token of 48 numbers. A velocity holds all of the noise: it must fit into the width.
            "in_channels": 12,
            "out_channels": 12,
            "num_layers": 5,
            "attention_head_dim": WIDTH // HEADS,
            "num_attention_heads": HEADS,
            "caption_projection_dim": WIDTH,
            "joint_attention_dim": 128,
            "pos_embed_max_size": 24,
            "vocab_size": vocabulary,
            "mask_token_id": vocabulary - 1,
            "adapter_hidden": 128,
            "semantic_dim": TEACHER_WIDTH,
            "qk_norm": config_dict.placeholder(str),
        },
        # Photographs in [-1, 1] have a standard deviation of about 0.5: twice that is what the noise has.
        "pixel_codec": {"patch": 2, "scaling_factor": 2.0, "shift_factor": 0.0},
        "text_encoder": {
            "vocab_size": vocabulary,
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 256,
            "num_layers": 2,
            "num_heads": 4,
        },
        "teacher": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 8,
            "window_size": 32,
            "out_hidden_size": TEACHER_WIDTH,
            "fullatt_block_indexes": (1,),
            "min_pixels": IMAGE * IMAGE,
            "max_pixels": IMAGE * IMAGE,
            "vocab_size": vocabulary,
        },
    }
    config.tokenizer = {"path": config_dict.placeholder(str), "learn_vocab_size": vocabulary, "more_texts": {}}
    config.teacher_tokenizer = config_dict.placeholder(str)

    config.data = {
        "root": "",
        "sources": {
            "photos": {
                "path": "data/photos/generate.jsonl",
                "format": "rows",
                "task": "generate",
                "references": 0,
                "weight": 1.0,
                "image_pass": 1.0,
                "text_pass": 1.0,
            }
        },
        "global_batch": 16,
        "height": IMAGE,
        "width": IMAGE,
        "max_aspect": 1.0,  # all images are cropped to a square; more keeps their aspect, in buckets
        "side_multiple": 8,
        "text_length": TEXT_LENGTH,
        "caption_prompt": "",
        "teacher_length": TEXT_LENGTH,
        "seed": config.get_ref("seed"),
        "refused_share": 0.01,
        "threads": 2,
        "workers": 0,
        "prefetch": 2,
    }

    config.objective = {
        "image_weight": 1.0,
        "text_weight": 0.2,
        "contrastive_weight": 0.05,
        "alignment_weight": 0.1,
        "temperature": 0.07,
        "semantic_depth": 2,
        "time_shift": 1.0,
        "image_loss": "x0",
        "text_dropout": 0.1,
        "reference_dropout": 0.0,
        "pool_padding": True,
    }
    config.optimizer = {
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "decay_steps": 0,
        "weight_decay": 1e-2,
        "decay_matrices_only": True,
        "muon": False,
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "clip_norm": 1.0,
        "ema_rate": 0.99,
        "ema_warmup": False,
    }
    config.log = {"every": 20, "samples_every": 500, "sample_count": 8, "sample_steps": 28, "guidance": 3.0}
    config.checkpoint = {"every": 500, "keep": 2, "keep_period": config_dict.placeholder(int)}
    config.protocol = "unialignment"
    config.resume_step = config_dict.placeholder(int)
    config.allow_changed = ()
    return config
