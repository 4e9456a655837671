"""A small model from scratch on the embedded scenes, 32 x 32 pixels: all six tasks, in three stages, on a laptop's CPU.

    python -m unialign_jax.data.scenes --target=data/scenes --count=100000 \\
        --things=1 --things=1 --things=2 --things=2 --things=2 --things=3 --things=4
    python launch/train.py --config=configs/scenes_tiny.py:all --workdir=runs/scenes

Why the recipe is what it is, and how long it takes: docs/recipes.md.
"""

import ml_collections
from ml_collections import config_dict

STAGES = ("pretrain", "unify", "personalize")
STEPS = {"pretrain": 3_000, "unify": 5_000, "personalize": 2_000}
QUICK_STEPS = {"pretrain": 2_200, "unify": 450, "personalize": 75}
LEARNING_RATES = {"pretrain": 4e-3, "unify": 3e-3, "personalize": 2e-3}
# The texts of all tasks have 83 words and marks, of which nearly every one is a token at this size.
VOCABULARY = 256
TEXT_LENGTH = 34  # a text of 31, the prompt of captions and an end
IMAGE = 32  # pixels
WIDTH, HEADS = 96, 4
TEXT_WIDTH = 64
TEACHER_WIDTH = 32


def get_config(stage: str = "all") -> ml_collections.ConfigDict:
    """One of `STAGES`, or "all": a section `stages` with each of them, or "quick": the same in minutes.

    `data.root` is where the scenes' files are.
    """
    root = config_dict.FieldReference("data/scenes")
    if stage in ("all", "quick"):
        sections = {name: _stage(name, root) for name in STAGES}
        if stage == "quick":
            for name, section in sections.items():
                _make_quick(name, section)
        return ml_collections.ConfigDict({"stages": sections, "data": {"root": root}})
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}; this config has {', '.join(STAGES)}, all, quick")
    return _stage(stage, root)


def _make_quick(stage: str, config: ml_collections.ConfigDict) -> None:
    """Minutes, mostly of reading, for scenes of few things: they buy captions; drawing takes hours."""
    sources = config.data.sources
    sources.caption.image_pass = 0.0  # twice as many captions in the same time
    sources.caption.weight = 3.0
    if config.after is None:
        sources.generate.update(task="caption", text_pass=1.0, weight=0.6)  # what has both passes trains all terms
        config.optimizer.decay_steps = QUICK_STEPS[stage] * 5 // 4  # still learning when it ends
    else:
        del sources["generate"]  # edits rehearse drawing too, and a step less is compiled
        # At more, what was read is forgotten.
        config.optimizer.learning_rate = {"unify": 2e-3, "personalize": 5e-4}[stage]
    # What is learned in minutes takes steps, not samples or depth: small ones.
    config.data.global_batch = 16
    config.model.transformer.num_layers = config.unroll = 3
    config.steps = QUICK_STEPS[stage]
    config.optimizer.warmup_steps = 50
    config.optimizer.ema_rate = 0.99
    config.log.update(every=25, samples_every=0)
    config.checkpoint.every = config.steps


def _source(task: str, weight: float, references: int = 0, **passes: float) -> dict:
    return {
        "path": f"{task}.jsonl",
        "format": "rows",
        "task": task,
        "references": references,
        "weight": weight,
        # Published, every sample feeds both passes. Here captions do, which teaches drawing as well; all else that is
        # about images trains the image pass alone, and questions the text pass: twice as many samples in the same time.
        "image_pass": passes.get("image_pass", 1.0),
        "text_pass": passes.get("text_pass", 1.0),
    }


def _sources(stage: str) -> dict:
    """The mixture of a stage; those of earlier stages are rehearsed."""
    if stage == "pretrain":
        return {"generate": _source("generate", 1.0, text_pass=0.0), "caption": _source("caption", 3.0)}
    sources = {
        "generate": _source("generate", 0.5, text_pass=0.0),
        "caption": _source("caption", 2.0),
        "edit": _source("edit", 2.5, references=1, text_pass=0.0),
        "perceive": _source("perceive", 1.5, references=1, text_pass=0.0),
        "answer": _source("answer", 1.5, image_pass=0.0),
    }
    if stage == "personalize":
        for source in sources.values():
            source["weight"] /= 2
        sources["compose"] = _source("compose", 4.0, references=4, text_pass=0.0)
    return sources


def _stage(stage: str, root: config_dict.FieldReference) -> ml_collections.ConfigDict:
    place = STAGES.index(stage)
    config = ml_collections.ConfigDict()
    config.stage = stage
    config.after = STAGES[place - 1] if place else config_dict.placeholder(str)
    config.seed = place
    config.steps = STEPS[stage]
    config.dtype = "float32"  # CPUs have no fast bfloat16
    config.remat = "none"
    config.attention = "xla"  # as fast as "cpu" at these lengths, once the blocks are unrolled
    config.unroll = 5  # all blocks
    config.strategy = "data"
    config.trained = ("transformer", "text_encoder")
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
            # 4 x 4 pixels are one token of 48 numbers: a velocity holds the noise, so a token must fit well into the
            # width.
            "in_channels": 12,
            "out_channels": 12,
            "num_layers": 5,
            "attention_head_dim": WIDTH // HEADS,
            "num_attention_heads": HEADS,
            "caption_projection_dim": WIDTH,
            "joint_attention_dim": TEXT_WIDTH,
            "pos_embed_max_size": 8,
            "vocab_size": VOCABULARY,
            "mask_token_id": VOCABULARY - 1,
            "adapter_hidden": 64,
            "semantic_dim": TEACHER_WIDTH,
            "qk_norm": config_dict.placeholder(str),
        },
        # Pixels of scenes, in [-1, 1], have a standard deviation of 0.62.
        "pixel_codec": {"patch": 2, "scaling_factor": 1.6, "shift_factor": 0.0},
        "text_encoder": {
            "vocab_size": VOCABULARY,
            "d_model": TEXT_WIDTH,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_max_distance": 32,  # farther than that no text goes
        },
        # Random and frozen: what it sees of an image is a fixed function of colours and places.
        "teacher": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "out_hidden_size": TEACHER_WIDTH,
            "fullatt_block_indexes": (0,),
            "min_pixels": IMAGE * IMAGE,
            "max_pixels": IMAGE * IMAGE,
            "vocab_size": VOCABULARY,
        },
    }
    # Learned in the first stage, of what all stages read; the later ones take it over.
    config.tokenizer = {
        "path": config_dict.placeholder(str),
        "learn_vocab_size": VOCABULARY,
        "more_texts": {
            task: {"path": f"{task}.jsonl", "format": "rows"} for task in ("edit", "perceive", "answer", "compose")
        },
    }
    config.teacher_tokenizer = config_dict.placeholder(str)

    config.data = {
        "root": root,
        "sources": _sources(stage),
        "global_batch": 64,
        "height": IMAGE,
        "width": IMAGE,
        "text_length": TEXT_LENGTH,
        "caption_prompt": ":",
        "teacher_length": TEXT_LENGTH,
        "seed": config.get_ref("seed"),
        "refused_share": 0.01,
        "threads": 1,
        "workers": 0,
        "prefetch": 4,
    }

    config.objective = {
        "image_weight": 1.0,
        # Published: 0.2. Reading takes longer to learn here than drawing.
        "text_weight": 0.5,
        "contrastive_weight": 0.05,
        "alignment_weight": 0.1,
        "temperature": 0.07,
        "semantic_depth": 2,
        # What goes where is decided at high noise, which the published times visit rarely.
        "time_shift": 3.0,
        "image_loss": "x0",
        "text_dropout": 0.1,
        "reference_dropout": 0.0,
        "pool_padding": True,
    }
    config.optimizer = {
        "learning_rate": LEARNING_RATES[stage],
        "warmup_steps": 200,
        "decay_steps": config.get_ref("steps").identity(),  # follows the steps, which it would otherwise also set
        "weight_decay": 1e-2,
        "decay_matrices_only": True,
        "muon": True,
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "clip_norm": 1.0,
        "ema_rate": 0.999,
        "ema_warmup": True,
    }
    config.log = {"every": 50, "samples_every": 2000, "sample_count": 8, "sample_steps": 28, "guidance": 3.0}
    config.checkpoint = {"every": 500, "keep": 2, "keep_period": config_dict.placeholder(int)}
    config.protocol = "scenes"
    config.resume_step = config_dict.placeholder(int)
    config.allow_changed = ()
    return config
