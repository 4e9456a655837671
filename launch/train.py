"""Trains the stages of a config one after another, or one of them; started again, goes on where it was.

    python launch/train.py --config=configs/scenes_tiny.py:all --workdir=runs/scenes
        Every stage in turn, each from the one before. Keys are those of a stage: --config.stages.unify.steps=100

    python launch/train.py --config=configs/scenes_tiny.py:unify --workdir=runs/scenes [--config.key=value ...]
        One stage. It starts from the stage before it in the same --workdir, or from --config.init.

Stages are named after a colon; a file with one stage needs none: --config=configs/photos_tiny.py
"""

from absl import flags
from ml_collections import config_flags

from unialign_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, and after a colon the stage.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and the tokenizer go, by stage.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    # Late: a wrong flag is said without loading JAX.
    from unialign_jax.training import stages

    stages.train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
