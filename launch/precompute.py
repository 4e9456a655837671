"""Makes caches of what a stage's frozen networks compute of its data, so that training need not. Interrupted, goes on.

    python launch/precompute.py --config=configs/sd3_medium.py:unify --target=DIR \\
        --config.init=converted --config.cached='("latents", "instructions", "teacher")' [--config.key=value ...]

It is then trained on with the same config and --config.cache_directory=DIR. What is cached, what it takes and what it
depends on: docs/data.md. A stage that goes on from another needs --config.init here: its frozen networks are there.

Of a run on several hosts, every host starts this command, as with launch/train.py.
"""

from absl import flags
from ml_collections import config_flags

from unialign_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, and after a colon the stage.", lock_config=True)
_TARGET = flags.DEFINE_string("target", None, "Directory of the caches, local or gs://.")
_SOURCE = flags.DEFINE_list("source", [], "Names of sources of the config, separated by commas; all if empty.")
_ROWS = flags.DEFINE_integer("rows_per_shard", 2000, "Rows that go into one file.", lower_bound=1)
_BATCH = flags.DEFINE_integer(
    "batch", None, "Rows encoded at once, over all devices; 8 for each part of a batch if not set.", lower_bound=1
)
_start = cli.define_cluster()
flags.mark_flags_as_required(["config", "target"])


def main() -> None:
    # Late: a wrong flag is said without loading JAX.
    from unialign_jax.training.precompute import precompute

    _start()
    precompute(
        _CONFIG.value,
        _TARGET.value,
        sources=_SOURCE.value,
        rows_per_shard=_ROWS.value,
        batch=_BATCH.value,
    )


if __name__ == "__main__":
    cli.run(main)
