"""Trains one stage of a config, or resumes it.

    python launch/train.py --config=configs/photos_tiny.py --workdir=runs/photos [--config.key=value ...]

A config file may take a stage after a colon: --config=configs/sd3_medium.py:unify
"""

from absl import flags
from ml_collections import config_flags

from unialign_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, and after a colon the stage.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and the tokenizer go, by stage.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    # Late: a wrong flag is said without loading JAX.
    from unialign_jax.training.loop import train

    train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
