"""The compilation cache: where it is, that it is used, and what happens where it can't be."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from unialign_jax import compilation_cache


@pytest.fixture(autouse=True)
def settings_come_back():
    names = (
        *("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"),
        "jax_persistent_cache_enable_xla_caches",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def test_a_program_is_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_MIN_SECONDS", 0)
    compilation_cache.enable(str(tmp_path / "a" / "b"))
    program = jax.jit(lambda x: jnp.sin(x) @ x)
    program(jnp.ones((3, 3)))
    (kept,) = (tmp_path / "a" / "b").glob("*lambda*-cache")
    written = kept.stat().st_mtime_ns
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    jax.clear_caches()
    program(jnp.ones((3, 3)))
    assert "/jax/compilation_cache/cache_hits" in hits
    assert kept.stat().st_mtime_ns == written


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "environment"))
    compilation_cache.enable(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "environment")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation_cache.enable(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "unialign_jax")
    compilation_cache.enable("")
    assert jax.config.jax_compilation_cache_dir is None


def test_hosts_with_gpus_do_not_keep_programs_each_for_itself(tmp_path, monkeypatch, caplog):
    """Those that find none would wait for the tuning of one that found its own."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compilation_cache.enable(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "unialign_jax")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    compilation_cache.enable(None)
    assert jax.config.jax_compilation_cache_dir is None and "name a --compilation_cache" in caplog.text
    compilation_cache.enable(str(tmp_path / "shared"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared")


def test_xla_keeps_nothing_of_its_own_in_an_object_store(tmp_path, monkeypatch):
    """Of paths, XLA knows local ones only."""
    monkeypatch.setattr(compilation_cache.epath.Path, "mkdir", lambda *_, **__: None)
    compilation_cache.enable("gs://bucket/cache")
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/cache"
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"
    monkeypatch.undo()
    compilation_cache.enable(str(tmp_path))
    assert jax.config.jax_persistent_cache_enable_xla_caches == "xla_gpu_per_fusion_autotune_cache_dir"


def test_a_directory_that_cannot_be_made(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    compilation_cache.enable("")
    with pytest.raises(OSError):
        compilation_cache.enable(str(tmp_path / "file" / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compilation_cache.enable(None)
    assert jax.config.jax_compilation_cache_dir is None and "no cache" in caplog.text


def test_programs_of_several_cpu_devices_are_not_kept(tmp_path, monkeypatch):
    """Read back, they have lost the order of their collectives."""
    compilation_cache.enable(str(tmp_path))
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    compilation_cache.enable(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir is None
