"""The shipped small config made tiny, for runs on several devices and processes: two sources that take turns."""

import pathlib
import runpy

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
VOCABULARY = 64
WIDTH, HEADS = 32, 4


def get_config(corpus: str = "", aligned: bool = False):
    """`corpus` is a directory that `data.scenes.write_corpus` has filled; `aligned` adds a teacher and trains T5."""
    config = runpy.run_path(str(CONFIGS / "photos_tiny.py"))["get_config"]()
    config.data.sources = {
        name: {"path": f"{corpus}/generate.jsonl", "task": "generate", "weight": 1.0} for name in ("draw", "paint")
    }
    changes = {
        "steps": 8,
        "trained": ("transformer",),
        "model.transformer.num_layers": 2,
        "model.transformer.attention_head_dim": WIDTH // HEADS,
        "model.transformer.num_attention_heads": HEADS,
        "model.transformer.caption_projection_dim": WIDTH,
        "model.transformer.joint_attention_dim": 16,
        "model.transformer.vocab_size": VOCABULARY,
        "model.transformer.mask_token_id": VOCABULARY - 1,
        "model.text_encoder.vocab_size": VOCABULARY,
        "model.text_encoder.d_model": 16,
        "model.text_encoder.d_kv": 8,
        "model.text_encoder.d_ff": 16,
        "model.text_encoder.num_layers": 1,
        "model.text_encoder.num_heads": 2,
        "tokenizer.learn_vocab_size": VOCABULARY,
        "data.global_batch": 8,
        "data.height": 16,
        "data.width": 16,
        "data.text_length": 12,
        "data.threads": 1,
        "optimizer.warmup_steps": 1,
        "log.every": 1,
        "log.samples_every": 0,
        "log.sample_count": 2,
        "log.sample_steps": 1,
        "checkpoint.every": 2,
        "checkpoint.keep": 20,
    }
    config.update_from_flattened_dict(changes)
    if aligned:
        config.trained = ("transformer", "text_encoder")
        config.model.transformer.adapter_hidden = 8
        config.model.teacher.update({"vocab_size": VOCABULARY, "min_pixels": 16 * 16, "max_pixels": 16 * 16})
    else:
        config.model.teacher = None
    return config
