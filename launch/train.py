"""Trains one stage of a config, or resumes it.

    python launch/train.py --config=configs/photos_tiny.py --workdir=runs/photos [--config.key=value ...]

A config file may take a stage after a colon: --config=configs/sd3_medium.py:unify
"""

from absl import flags
from ml_collections import config_flags

from unialign_jax import cli, compilation_cache

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, and after a colon the stage.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and the tokenizer go, by stage.")
_CACHE = flags.DEFINE_string("compilation_cache", None, compilation_cache.HELP)
_PROFILE = flags.DEFINE_string("profile_steps", None, "START:STOP: record these steps for XProf.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    # Late: a wrong flag is said without loading JAX.
    from unialign_jax.training.loop import train
    from unialign_jax.training.profiling import parse_steps

    profile_steps = parse_steps(_PROFILE.value)
    compilation_cache.enable(_CACHE.value)
    train(_CONFIG.value, _WORKDIR.value, profile_steps=profile_steps)


if __name__ == "__main__":
    cli.run(main)
