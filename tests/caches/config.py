"""A very small model with frozen encoders of every kind, for drawn scenes in the directory named behind the colon."""

import ml_collections
from ml_collections import config_dict

VOCABULARY = 64


def get_config(corpus: str) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "stage": "cached",
            "seed": 0,
            "steps": 6,
            "dtype": "float32",
            "trained": ("transformer",),
            "after": config_dict.placeholder(str),
            "init": config_dict.placeholder(str),
            "cached": (),
            "cache_directory": config_dict.placeholder(str),
            "resume_step": config_dict.placeholder(int),
            "model": {
                "transformer": {
                    "sample_size": 8,
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_layers": 2,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "caption_projection_dim": 32,
                    "joint_attention_dim": 16,
                    "pos_embed_max_size": 8,
                    "vocab_size": VOCABULARY,
                    "mask_token_id": VOCABULARY - 1,
                    "adapter_hidden": 8,
                    "semantic_dim": 8,
                },
                "autoencoder": {
                    "latent_channels": 4,
                    "block_out_channels": (8, 8),
                    "layers_per_block": 1,
                    "norm_num_groups": 4,
                },
                "text_encoder": {
                    "vocab_size": VOCABULARY,
                    "d_model": 16,
                    "d_kv": 8,
                    "d_ff": 16,
                    "num_layers": 1,
                    "num_heads": 2,
                },
                "teacher": {
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 2,
                    "patch_size": 8,
                    "window_size": 32,
                    "out_hidden_size": 8,
                    "fullatt_block_indexes": (0,),
                    "min_pixels": 256,
                    "max_pixels": 256,
                    "vocab_size": VOCABULARY,
                },
            },
            "tokenizer": {"learn_vocab_size": VOCABULARY},
            "data": {
                "root": corpus,
                "sources": {
                    "draw": {"path": "generate.jsonl", "task": "generate"},
                    "join": {"path": "compose.jsonl", "task": "compose", "references": 3},
                },
                "global_batch": 4,
                "height": 16,
                "width": 16,
                "max_aspect": 1.0,
                "side_multiple": 8,
                "text_length": 12,
                "teacher_length": 12,
                "refused_share": 0.2,
                "threads": 1,
                "workers": 0,
            },
            "objective": {"semantic_depth": 1, "text_dropout": 0.5, "reference_dropout": 0.3},
            "optimizer": {"warmup_steps": 1, "learning_rate": 1e-3},
            "log": {"every": 1, "samples_every": 0, "sample_count": 2, "sample_steps": 2},
            "checkpoint": {"every": 100},
        }
    )
