"""Trains the stages of a config one after another, or one of them; started again, goes on where it was.

    python launch/train.py --config=configs/scenes_tiny.py:all --workdir=runs/scenes
        Every stage in turn, each from the one before. Keys are those of a stage: --config.stages.unify.steps=100

    python launch/train.py --config=configs/scenes_tiny.py:unify --workdir=runs/scenes [--config.key=value ...]
        One stage. It starts from the stage before it in the same --workdir, or from --config.init.

A stage is named after a colon; a file with one stage needs none: --config=configs/photos_tiny.py

Of a run on several hosts, every host starts this command. On Cloud TPU, SLURM and Open MPI 4 the processes find
each other; elsewhere give --coordinator, --num_processes and --process_id.
"""

import sys

from absl import flags
from ml_collections import config_flags

from unialign_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, and after a colon the stage.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and the tokenizer go, by stage.")
_PROFILE = flags.DEFINE_string("profile_steps", None, "START:STOP: record these steps for XProf.")
_start = cli.define_cluster(preemption=True)
_PREEMPTED = flags.DEFINE_integer(
    "preempted_exit_code", 0, "Exit code after a SIGTERM, once the step is saved, if it was not the last.", 0, 255
)
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    # Late: a wrong flag is said without loading JAX.
    from unialign_jax.training import stages
    from unialign_jax.training.profiling import parse_steps

    profile_steps = parse_steps(_PROFILE.value)
    _start()
    if not stages.train(_CONFIG.value, _WORKDIR.value, profile_steps=profile_steps):
        sys.exit(_PREEMPTED.value)


if __name__ == "__main__":
    cli.run(main)
