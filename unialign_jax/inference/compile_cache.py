"""Compiled programs on disk: a second process with the same networks and sizes starts without compiling."""

import jax
from absl import logging
from etils import epath

DIRECTORY = "~/.cache/unialign_jax/programs"
# Seconds of compilation from which a program is worth a file.
_WORTH = 1.0


def use_compile_cache(directory: epath.PathLike = DIRECTORY) -> None:
    """Turns JAX's persistent cache on for this process, unless it is on already (`JAX_COMPILATION_CACHE_DIR`).

    Args:
      directory: local, or `gs://` for all hosts of a pod.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        logging.info("compiled programs are kept in %s", jax.config.jax_compilation_cache_dir)
        return
    jax.config.update("jax_compilation_cache_dir", str(epath.Path(directory).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH)
