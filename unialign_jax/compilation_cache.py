"""The persistent compilation cache: a program that was compiled once is read from disk by every later process.

Keys hold the program, its devices and the versions of JAX and XLA, so an entry never serves anything else. Entries are
programs that will be executed: only a directory that others can't write to may be used.

Not for several CPU devices: XLA for CPUs (jaxlib 0.10.2) reads a program back without the order between collectives
inside a loop or a conditional and those outside. Each device then begins them in its own, and they mix or hang.
"""

import os

from absl import logging
from etils import epath

HELP = (
    "Directory of compiled programs, local or gs://, that later processes read. Default: JAX_COMPILATION_CACHE_DIR, or "
    "~/.cache/unialign_jax. Empty: none."
)
# What compiles faster than this is not worth a file.
_MIN_SECONDS = 0.3
_XLA_CACHES = "xla_gpu_per_fusion_autotune_cache_dir"  # JAX's default


def default_directory() -> str:
    """`JAX_COMPILATION_CACHE_DIR`, or `unialign_jax` in the user's cache directory."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(user, "unialign_jax")


def enable(directory: str | None) -> None:
    """Uses the cache in `directory`, local or `gs://`; on several CPU devices, none, and by several processes with GPUs
    none that is not named.

    Must come before anything is compiled, and after the processes have met.

    Args:
      directory: made if absent. Empty: no cache. None: `default_directory()`; where that can't be made, a warning says
        so and there is no cache.

    Raises:
      OSError: the directory can't be made.
    """
    import jax  # late: commands refuse wrong flags without loading it

    from unialign_jax import storage  # late: it loads clients of object stores

    unordered = jax.default_backend() == "cpu" and jax.device_count() > 1
    if directory == "" or unordered:
        if unordered:
            logging.info("programs for several CPU devices are compiled anew: read from a cache, they could hang")
        jax.config.update("jax_compilation_cache_dir", None)
        return
    named = directory is not None or "JAX_COMPILATION_CACHE_DIR" in os.environ
    if not named and jax.default_backend() == "gpu" and jax.process_count() > 1:
        # Process 0 alone writes to it. On another host the program would be compiled again, and XLA, which has the
        # processes divide the tuning among them, would wait there for a share that process 0 has no cause to make.
        logging.warning("programs are compiled anew: name a --compilation_cache that all hosts share to keep them")
        jax.config.update("jax_compilation_cache_dir", None)
        return
    path = epath.Path(default_directory() if directory is None else directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if directory is not None:
            raise
        logging.warning("programs are compiled anew by every process, no cache: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    # XLA for GPUs keeps its own tuning in a directory of the cache, and knows local ones only.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none" if storage.is_remote(path) else _XLA_CACHES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
