"""Weights between public PyTorch checkpoints and ours, both ways, for all four networks."""

from unialign_jax.convert.errors import ConversionError
from unialign_jax.convert.exporter import to_torch, write_jax, write_torch
from unialign_jax.convert.importer import Report, open_pipeline, to_jax
from unialign_jax.convert.load import load_torch
from unialign_jax.convert.store import is_converted, read_config, restore_network

__all__ = [
    "ConversionError",
    "Report",
    "is_converted",
    "load_torch",
    "open_pipeline",
    "read_config",
    "restore_network",
    "to_jax",
    "to_torch",
    "write_jax",
    "write_torch",
]
